"""Vectors of a file: reading them, inverting them."""
