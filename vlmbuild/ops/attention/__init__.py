"""The attention operator and its backends."""
