"""The commands, one file a topic; `cli.py` names them."""
