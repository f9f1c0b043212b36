"""The commands, one file a topic; `main.py` names them."""
