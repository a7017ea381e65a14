"""Attention views and measurements: maps, heads, needles, outliers. Never in the bundle."""
