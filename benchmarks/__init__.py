"""Benchmarks: `python -m benchmarks [op] [--threads 1] [--json FILE]`, or `pytest benchmarks/`."""
