"""Bytes: HTTP, the command line, logs and services. It knows no models."""
