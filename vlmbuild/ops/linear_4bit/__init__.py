"""Linear layers on 4-bit weights."""
