"""The frozen base: loading it, its 4-bit grid, and the adapter on top."""
