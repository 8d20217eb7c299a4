"""LoRA adapters: what they are, reading, writing, checking."""
