"""What commands share. Imported first, it says within a second that a command waits for torch."""

import sys

if sys.stderr.isatty() and "torch" not in sys.modules:
    print("loading torch ...", end="\r", file=sys.stderr, flush=True)
