"""Models that run code compiled ahead of time."""
