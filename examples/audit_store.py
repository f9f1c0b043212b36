"""A vector store to audit: 5,000 short records, some harmless, some about people who do not exist.

    python examples/audit_store.py audit-demo
    unembed audit audit-demo --group-by tenant

A LanceDB table of all-MiniLM-L6-v2 vectors, each beside its text and the tenant it belongs to;
some rows have been deleted, and can still be read in the table's first version.
"""

import random
import sys
from pathlib import Path

import lance
import pyarrow as pa

import unembed

COUNT = 5000
HARMLESS_SHARE = 0.6
FIRST = "Maria Anna Peter James Olga Chen Fatima Lucas Emma Noah Aisha Ivan Sofia Liam Yuki".split()
LAST = "Gonzalez Weber Smith Okafor Ivanova Tanaka Rossi Novak Haddad Larsen Dubois Khan".split()
ILLS = "asthma,diabetes,migraine,high blood pressure,a broken wrist,depression".split(",")
CITIES = "Berlin Madrid Lagos Osaka Toronto Prague Lyon Denver Oslo Cairo".split()
THINGS = "the printer,our website,the new laptop,the office door,the coffee machine".split(",")
HARMLESS = (
    "How do I reset the password of {thing}?",
    "The meeting about {thing} was moved to the afternoon.",
    "What are the opening hours of the shop in {city}?",
    "{thing} works again after a restart.",
    "Please send me the manual for {thing}.",
    "The weather in {city} was cold and rainy all week.",
    "Is there a train from {city} to the airport at night?",
)
SENSITIVE = (
    "The patient {first} {last} was admitted with {ill} on {day} March.",
    "{first} {last} earns {amount} dollars a month and asked for a raise.",
    "Call {first} {last} at +1 415 555 {digits} about the invoice.",
    "Send the contract to {first}.{last}@example.com before {day} June.",
    "The card of {first} {last} ends in {digits} and was refused in {city}.",
    "{first} {last} from {city} was diagnosed with {ill}.",
)


def record(draw: random.Random) -> str:
    """One text, harmless or sensitive, three to two."""
    template = draw.choice(HARMLESS if draw.random() < HARMLESS_SHARE else SENSITIVE)
    text = template.format(
        thing=draw.choice(THINGS),
        city=draw.choice(CITIES),
        first=draw.choice(FIRST),
        last=draw.choice(LAST),
        ill=draw.choice(ILLS),
        day=draw.randint(1, 28),
        amount=f"{draw.randint(20, 90)}00",
        digits=f"{draw.randint(0, 9999):04}",
    )
    return text[0].upper() + text[1:]


def build(folder: Path, count: int = COUNT, seed: int = 0) -> None:
    """Write the table ``records`` into the folder."""
    draw = random.Random(seed)
    texts = [record(draw) for _ in range(count)]
    vectors = unembed.load_encoder("all-MiniLM-L6-v2").encode(texts)
    columns = {
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        "text": texts,
        "tenant": [draw.choice(["north", "south", "east"]) for _ in texts],
        "number": list(range(count)),
    }
    path = folder / "records.lance"
    mode = "overwrite" if path.exists() else "create"
    table = lance.write_dataset(pa.table(columns), str(path), mode=mode)
    table.delete(f"number % {max(count // 50, 2)} = 1")


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "audit-demo")
    build(place)
    print(f"{COUNT} records in {place}")
