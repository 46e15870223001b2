"""Loaded artifacts: everything that running one needs, without passes, capture or builder."""
