"""Answers that keep to a schema or a budget."""
