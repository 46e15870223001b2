"""The LoRA operator."""
