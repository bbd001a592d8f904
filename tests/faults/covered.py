"""The inputs of fuzz.py, guided by coverage: atheris (libFuzzer for Python) chooses what chance chooses
there, and goes on from choices that reach new lines of the readers.

    pip install atheris                                   # there are wheels for Python 3.11 to 3.13
    python -m tests.faults.covered rows -runs=20000       # libFuzzer's flags; what fails goes to runs/
    python -m tests.faults.covered rows runs/crash-0123   # that case again
"""

import importlib.util
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cli import screen

from . import fuzz
from .nursery import ROOT

READERS = ["questions", "search", "rollout", "servers", "words", "simulator", "tokenizer", "weights"]
READERS += ["train", "tasks", "toy", "prepare", "cli.disk", "cli.flags", "cli.parser", "cli.setting"]
RUNS = 10_000  # of each format, or as many as it takes in five minutes
SLOW = ("parquet", "looked_at", "results", "indexes", "tokenizers", "templates")  # or read by a library


class Chosen(random.Random):
    """Chance that spends the bytes of an input, and follows from them when they are spent."""

    def __init__(self, data: bytes):
        self.data, self.rest = data, random.Random(data)
        super().__init__()

    def getrandbits(self, k: int) -> int:
        n = -(-k // 8)
        if len(self.data) < n:
            return self.rest.getrandbits(k)
        head, self.data = self.data[:n], self.data[n:]
        return int.from_bytes(head, "little") & (2**k - 1)

    def random(self) -> float:
        return self.getrandbits(16) / 2**16


def main(argv: list[str]) -> None:
    """In a process of its own: libFuzzer ends it."""
    import atheris

    name, *flags = argv
    Path("runs").mkdir(exist_ok=True)
    flags.insert(0, "-artifact_prefix=runs/")
    with atheris.instrument_imports(include=READERS):
        fuzz.tokenizer(), fuzz.adapter(), fuzz.state()
        for i in range(3):
            fuzz.quiet(partial(fuzz.tried, name, i))
    damage = fuzz.Damage("")

    def once(data: bytes) -> None:
        damage.rng = Chosen(data)
        said = fuzz.quiet(partial(fuzz.tried, name, 0, damage=damage))
        if said not in ("", "refused"):
            raise AssertionError(said)

    atheris.Setup([sys.argv[0], *flags], once)
    atheris.Fuzz()


def cases(folder: Path) -> Iterator[tuple[str, Callable[[], tuple[int, str, str]]]]:
    """So many inputs of each format that Python reads itself, quickly."""
    if not importlib.util.find_spec("atheris"):
        screen.say("covered: atheris is not installed")
        return
    for name in (name for name in fuzz.TARGETS if name not in SLOW):

        def batch(name=name) -> tuple[int, str, str]:
            flags = f"-runs={RUNS} -max_total_time=300 -max_len=512 -len_control=0 -seed=1"
            command = [sys.executable, "-m", "tests.faults.covered", name, *flags.split()]
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
            said = run.stdout + run.stderr
            seen = re.findall(r"^#(\d+)\s.* cov: (\d+)", said, re.MULTILINE)
            if not seen or run.returncode:
                return 1, f"{name}: {said[-900:]}", ""
            return int(seen[-1][0]), "", f"{seen[0][1]} -> {seen[-1][1]} places of the code reached"

        yield name, batch


if __name__ == "__main__":
    main(sys.argv[1:])
