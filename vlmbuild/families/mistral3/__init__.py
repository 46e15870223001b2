"""Mistral 3 and Ministral 3."""
