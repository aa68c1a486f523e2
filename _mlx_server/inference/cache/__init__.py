"""KV states of earlier requests, in memory and on disk."""
