"""How much of the text came back: metrics, baselines, tables."""
