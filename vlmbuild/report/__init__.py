"""An artifact's graphs to look at: one self-contained page, and files for other viewers."""
