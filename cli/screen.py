"""The terminal: one kind of table, one kind of bar, one way to fail.

What this is not: a log. Figures that must last are written by disk.py.
"""

import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from cli import ranks

# Ctrl-C, a machine that is taken away, a terminal that is closed.
STOPS = [s for s in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)) if s is not None]
# What steers a terminal: control characters but tab and newline, and those that turn the direction of text.
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """Text that a terminal only shows: what steers it, and half surrogate pairs, become \ufffd."""
    return CONTROL.sub("\ufffd", text)


def table(rows: dict[str, dict]) -> str:
    """{name: {column: value}} as aligned text: three decimals for means, counts as they are, "-" for None.
    A name may come from a file of a stranger: it stays in its line."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [["", *columns]]
    cells += [[name, *(cell(row.get(c, "")) for c in columns)] for name, row in rows.items()]
    cells = [[harmless(text.replace("\n", " ")) for text in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *map(str.rjust, values, widths[1:])]).rstrip()
        for name, *values in cells
    )


def cell(value: float | int | str | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def bar(
    label: str, total: int | None = None, unit: str = "episodes", done: int = 0, over: Iterable | None = None,
    delay: float = 0,
):  # fmt: skip
    """A progress bar with rate and time left. It disappears when done and is silent where nobody watches.

    over: iterate through the bar. delay: seconds before it appears, where short waits shall leave no trace.
    """
    calm = {"leave": False, "disable": None, "miniters": 1, "dynamic_ncols": True}
    return tqdm(over, label, total, initial=done, unit=f" {unit}", delay=delay, **calm)


def say(text: str) -> None:
    """Print above the bars."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what a wait without steps is for, as long as it lasts."""
    if sys.stderr.isatty():
        print(f"{what} ...", end="\r", file=sys.stderr, flush=True)
    yield
    clear()


def clear() -> None:
    """Take away a line of `waiting`, or the one about torch."""
    if sys.stderr.isatty():
        print("\033[K", end="", file=sys.stderr, flush=True)


def coloured() -> bool:
    """Whether what is printed goes to a terminal that is to have colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def move(shown, done: int, note: str = "") -> None:
    """Set a bar to `done`, with a note behind it."""
    shown.set_postfix_str(note, refresh=False)
    shown.update(done - shown.n)


# What says that there is no memory: torch on a CPU and C++; the system, at the beginning.
NO_MEMORY = {
    RuntimeError: re.compile("can't allocate memory|std::bad_alloc"),
    (OSError, SafetensorError): re.compile(r"^(\[\w+ 12\] )?Cannot allocate memory"),
}


def run(main: Callable[[], None]) -> None:
    """Run a command. Bad input is one line on stderr and exit code 2; a signal of STOPS exits with 130, and
    one that is ignored already (nohup) stays so."""
    ranks.start()
    for sig in STOPS:
        if signal.getsignal(sig) != signal.SIG_IGN:
            signal.signal(sig, signal.default_int_handler)
    if ranks.world() > 1:
        signal.signal(signal.SIGTERM, ranks.lost)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what a Latin-1 terminal cannot show
    clear()
    try:
        main()
    except torch.OutOfMemoryError as e:
        fail(f"out of memory ({str(e).splitlines()[0]}): give --memory, or fewer --seats")
    except KeyboardInterrupt:
        end("interrupted", 130)
    except Exception as e:
        theirs = any(isinstance(e, kind) and says.search(str(e)) for kind, says in NO_MEMORY.items())
        if theirs or isinstance(e, MemoryError):
            advice = "see --memory, --seats and --micro-tokens, or stop other programs"
            fail(f"out of memory: {advice} ({str(e) or 'Python'})")
        if isinstance(e, (ValueError, OSError, SafetensorError)):
            fail(str(e))
        sys.stderr = sys.__stderr__  # a bug shows in any process
        raise
    finally:
        if ranks.world() > 1:  # torchrun's SIGTERM is late: do not end twice
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


LONGEST = 1_000  # characters of an error: some repeat a file's own text


def fail(message: str) -> None:
    """The end of a command that cannot go on: one line, exit code 2."""
    line = harmless(" ".join(message.split()))
    end(f"error: {line[:LONGEST]}{' ...' * (len(line) > LONGEST)}", 2)


def end(line: str, code: int) -> None:
    """The last line of a command; of several processes one tells it."""
    if ranks.world() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ranks.first("end"):
        print(line, file=sys.__stderr__ if ranks.rank() else sys.stderr)
    sys.exit(code)


def side_by_side(left: str, right: str) -> str:
    """Two texts in two columns of the terminal."""
    half = (shutil.get_terminal_size().columns - 3) // 2
    columns = [
        [w for line in harmless(text).splitlines() for w in textwrap.wrap(line, half)]
        for text in (left, right)
    ]
    return "\n".join(f"{a:{half}} | {b}" for a, b in zip_longest(*columns, fillvalue=""))
