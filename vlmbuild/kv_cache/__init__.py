"""Derive programs that read and write a key-value cache."""
