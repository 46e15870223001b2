"""Graphs under regression: locks of compiled programs, differences between two, and their report for reviewers."""
