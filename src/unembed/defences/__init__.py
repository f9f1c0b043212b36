"""What protects vectors: each defence, the attackers who know of it, and what both are worth."""
