"""Rotary position embeddings: tables and rotation."""
