"""Quantization: what users may ask for, which layers get it, and the formats."""
