"""GGUF artifacts: where each parameter lies in their files, and what the stored values stand for."""
