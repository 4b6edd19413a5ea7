"""Quantization: the blockwise grid, how codes are chosen, frozen layers over quantized weights."""
