"""Workers: scripts that run in an engine's own interpreter and import nothing of vlmbuild."""
