"""Cross-entropy from logits in one pass."""
