"""The live demo: a page on which a vector turns back into text, and its API (docs/demo.md)."""
