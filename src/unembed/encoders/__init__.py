"""Embedding models: text → unit vectors."""
