"""LoRA adapters: their layout in a program, their files in PEFT format, and merging them into weights."""
