"""From a fully masked sequence, through rounds of edits judged by the encoder, to text."""
