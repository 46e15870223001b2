"""The demo, its task and its data."""
