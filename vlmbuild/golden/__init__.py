"""Golden cases: what an artifact's program computes for a few prompts, stage by stage, and comparing an engine with it."""
