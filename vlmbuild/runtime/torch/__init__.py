"""Trainable models that run their program in torch."""
