"""Measures of how much of the text came back: metrics, baselines, tables."""
