"""Benchmarks: every speed and size in BENCH.md, measured against a peer. The command is in __main__.py."""

import cli  # noqa: F401 (says that torch is being loaded)
