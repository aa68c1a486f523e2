"""From tokens to thinking, text and tool calls."""
