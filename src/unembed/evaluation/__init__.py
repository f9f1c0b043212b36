"""How much of the text came back: metrics, controls, tables."""
