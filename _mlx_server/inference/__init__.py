"""Models and tokens. It knows no HTTP and no vendor's JSON."""
