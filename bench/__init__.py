"""Benchmarks: every speed and size in BENCH.md, measured against a peer. The command is in __main__.py."""
