"""The former place of `unembed.tokenizer`, kept for scripts until the next release."""

from unembed.tokenizer import TextTokenizer, from_transformers

__all__ = ["TextTokenizer", "from_transformers"]
