"""Plan of a build and its cost, from config.json alone."""
