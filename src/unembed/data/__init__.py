"""Text → pieces → (token ids, embedding) pairs on disk."""
