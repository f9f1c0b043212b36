"""Sentences to try: what people put into vector stores and would not pin to a wall.

Everybody in them is invented.
"""

from __future__ import annotations

EXAMPLES = (
    # health
    "The patient was admitted on Monday with chest pain.",
    "Her biopsy came back positive and she has not told her family.",
    "Mr. Alder takes lithium and asked us not to tell his employer.",
    "Blood pressure 180 over 110, known allergy to penicillin.",
    "She is eleven weeks pregnant and wants to keep it private.",
    "What are the side effects of this drug?",
    "He was treated for addiction twice in the last two years.",
    "The child has a rare disease of the liver.",
    # law
    "The company knew about the defect two years before the recall.",
    "We propose to settle out of court for two million dollars.",
    "My client was at home on the night of the fire.",
    "The witness has changed her name and moved to another city.",
    "This letter is privileged and must not be shown to the other side.",
    "The judge rejected the appeal on Friday.",
    # people at work
    "We will cut two hundred jobs in March and tell nobody before.",
    "Dana Reyes earns 94,000 a year, less than the man she replaced.",
    "His manager called him too old for the new project.",
    "She reported her boss for harassment in confidence.",
    "Do not hire him, his last reference was very bad.",
    "The candidate asked for a higher salary and a later start.",
    # money
    "Please transfer 12,500 euros to the account of my brother.",
    "His credit card was declined three times last week.",
    "How do I reset the password of my bank account?",
    "They have not paid their mortgage since the summer.",
    "We will buy the smaller company before the end of the year.",
    # chat
    "I am moving to Berlin next month, please do not tell Tom.",
    "The key is under the blue pot next to the back door.",
    "I think I want to leave him but I am afraid.",
    "Are you free tonight? My parents are out of town.",
    "I voted for the other party, my father must never know.",
    "He told me that he is gay and asked me to keep it secret.",
    # support
    "My order 48213 never arrived and nobody answers the phone.",
    "I cannot log in since you changed the name of my account.",
    "Somebody in your shop copied the number of my card.",
    "The server password is written in the wiki, please change it.",
    "Please delete all data that you hold about my daughter.",
    # mail and notes
    "Our flight to Lisbon leaves on the third of May at six.",
    "The meeting with the union is not in the public calendar.",
    "The alarm code of the office is 4471, the camera is broken.",
    "Attached are the results of the test, they are worse than expected.",
    "The prototype fails when the battery gets too warm.",
    "Nobody outside this team may know what the new product costs.",
)
