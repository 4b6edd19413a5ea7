"""The base model: finding and loading it, LoRA on top, losses, fused operations and the torch scorer."""
