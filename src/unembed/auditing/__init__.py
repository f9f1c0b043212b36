"""A vector store → how much of its text comes back, what that means, and what to do about it."""
