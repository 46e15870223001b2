"""Graph rewriting: patterns, near misses, simplification, and the pass manager."""
