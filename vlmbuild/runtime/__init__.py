"""What a loaded artifact needs to run: nothing here imports passes, capture or builder."""
