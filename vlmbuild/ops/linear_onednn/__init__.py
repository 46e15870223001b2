"""float32 linear layers through oneDNN on CPUs."""
