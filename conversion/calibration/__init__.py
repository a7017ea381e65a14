"""Fits a converted model's attention to the source's on text, layer by layer."""
