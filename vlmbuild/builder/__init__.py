"""The build: from a checkpoint and a recipe to an artifact."""
