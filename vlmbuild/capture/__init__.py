"""Capture: trace a model into one graph per variant and outline repeated blocks."""
