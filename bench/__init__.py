"""Repeatable experiments: options in, a table and JSON out. `python -m bench.NAME --help`."""
