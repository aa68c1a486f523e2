"""A model's passes: prompts read, tokens drawn."""
