"""Graphs under regression: locks of compiled programs, what differs between two, and how a reviewer is told."""
