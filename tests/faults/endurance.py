"""Soak: a command many times in one process, and what it holds on to. Flat is a slope that could be zero.

python -m tests.faults --long --only soak
"""

import gc
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .kill import SHORT
from .nursery import Nursery

EVERY = 40  # samples that are taken
MARGIN = 512  # bytes a repetition that are taken for noise: rows of a log stay in memory, at about as much


def held() -> tuple[int, int, int]:
    """Resident bytes, open files, threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threading.active_count()


def slope(nursery: Nursery, name: str, n: int, folder: Path) -> str:
    """Repeat a command n times in one process: "" where what is held stays flat, else how it grows."""
    folder.mkdir(parents=True)
    child = nursery.run("soak", [name, n, folder], folder / "log")
    return f"{name}: {child.said[-600:]}" if child.code else verdict(json.loads(child.said.splitlines()[-1]))


def main(argv: list[str]) -> None:
    """In the child: repeat, and print the samples."""
    name, n, folder = argv
    print(json.dumps(watch(COMMANDS[name](Path(folder)), int(n))))


def watch(repeat: Callable[[Callable[[], None]], None], n: int) -> list[list[int]]:
    """[repetition, *held] at about EVERY of n repetitions. repeat calls its argument after each one."""
    seen, samples = [0], []

    def done() -> None:
        seen[0] += 1
        if seen[0] % max(1, n // EVERY) == 0:
            gc.collect()
            samples.append([seen[0], *held()])

    repeat(done, n)
    return samples


def verdict(samples: list[list[int]]) -> str:
    """The second half of the samples (what is loaded late is no leak): a line through each figure, with twice
    its standard error."""
    x, *ys = np.array(samples[len(samples) // 2 :], float).T
    wrong = []
    for what, y, most in zip(("resident bytes", "open files", "threads"), ys, (MARGIN, 0.0, 0.0)):
        line = np.polyfit(x, y, 1)
        rest = y - np.polyval(line, x)
        error = 2 * np.sqrt((rest**2).sum() / max(1, len(x) - 2) / ((x - x.mean()) ** 2).sum())
        if line[0] - error > most:
            wrong.append(f"{what} grow by {line[0]:.1f} +- {error:.1f} a repetition")
    return ", ".join(wrong)


def _steps(folder: Path) -> Callable:
    """One run of n steps, each told in its log; the engine's seats are free after each."""
    import train

    def repeat(done, n):
        tell = train.tell

        def counted(a, s, *more):
            tell(a, s, *more)
            assert all(not pool.busy for pool in s.engine.pools.values()), "seats are busy after a step"
            done()

        train.tell = counted
        argv = f"--out {folder}/run --steps {n} --questions 1 --group 2 --eval-questions 0 --sft-steps 0"
        train.main([*argv.split(), "--no-audit", "--show-every", "1000000", "--save-every", "500", *SHORT])

    return repeat


def _evaluations(folder: Path) -> Callable:
    import eval

    def repeat(done, n):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "q.jsonl").write_text('{"question": "home Balan?", "answer": "Osham"}\n')
        argv = (
            f"--policy tiny --data {folder}/q.jsonl --search none --policy-prompt short --prompt-tokens 128"
        )
        argv += f" --episode-tokens 300 --json {folder}/r.json"
        for _ in range(n):
            eval.main([*argv.split(), *SHORT])
            done()

    return repeat


def _resumes(folder: Path) -> Callable:
    import train

    def repeat(done, n):
        argv = f"--out {folder}/run --steps 1 --questions 1 --group 2 --eval-questions 0 --sft-steps 0"
        train.main([*argv.split(), "--no-audit", *SHORT])
        for _ in range(n):
            train.main(["--out", f"{folder}/run", "--resume"])
            done()

    return repeat


COMMANDS = {"steps": _steps, "evaluations": _evaluations, "resumes": _resumes}
