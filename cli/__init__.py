"""What commands share. Imported first, it says within a second that a command waits for torch.

What goes to a stream that was closed (>&-) is thrown away: else a file of ours would get the stream's number,
and with it what libraries print.
"""

import os
import sys

for name in ("stdin", "stdout", "stderr"):
    if getattr(sys, name) is None:
        setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        setattr(sys, f"__{name}__", getattr(sys, name))
if sys.stderr.isatty() and "torch" not in sys.modules:
    print("loading torch ...", end="\r", file=sys.stderr, flush=True)
