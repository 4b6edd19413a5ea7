"""The base model: find and load it, LoRA on top, losses, fused operations and the torch scorer."""
