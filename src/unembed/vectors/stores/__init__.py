"""Vector stores, each read through its own client behind one protocol; nothing is written."""
