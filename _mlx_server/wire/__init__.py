"""Vendors' JSON: from bodies to `Request`s, and from `Event`s to objects. It opens no socket and
touches no MLX array."""
