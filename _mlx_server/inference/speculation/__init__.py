"""Several tokens a pass."""
