"""Faults on purpose: killed at any write, full disks, hostile files, texts, numbers and servers.

The quick part runs with the other tests. The long part is one command, which goes on where it was cut:

    python -m tests.faults --long                   # all of it; the table goes to RELIABILITY.md
    python -m tests.faults --long --only fuzz       # one kind
"""
