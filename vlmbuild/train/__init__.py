"""Training: batches from chats, packing, LoRA, audits and callbacks."""
