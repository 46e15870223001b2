"""Source checkpoints: where they are, the tensors they hold, and digests of their files."""
