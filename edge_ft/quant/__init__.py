"""The blockwise grid that is trained over and shipped: its codes, how they are chosen, the layers that hold them."""
