"""The comparison with other servers: ``python -m benchmarks.serving --help``."""
