"""What a build would do and cost, from config.json alone."""
