"""The project's own comparisons and generated pages, run from a checkout; no wheel holds them."""
