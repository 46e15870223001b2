"""Linear layers on 8-bit weights (LLM.int8)."""
