"""Benchmarks, run by hand: ``python -m benchmarks --help``. What counts is the ratios of one run, not its times."""
