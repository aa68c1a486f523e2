"""Images in prompts, and the towers that see them."""
