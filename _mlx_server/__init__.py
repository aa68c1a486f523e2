"""What `mlx_server`, `dialects` and `engine` are built from, a folder for each: `front`, `wire` and
`inference`."""

__version__ = "0.2.0"
