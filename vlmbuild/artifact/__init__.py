"""Artifacts on disk: the manifest, writing them in one step, and verifying them before anything is read."""
