"""Soak: a command many times in one process, and what it holds on to. Flat is a slope that could be zero.

python -m tests.faults --long --only soak
"""

import gc
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from look import rows_of
from tokenizer import Tokenizer

from .kill import SHORT
from .nursery import Nursery

RUN = ["--questions", "1", "--group", "2", "--eval-questions", "0", "--sft-steps", "0", "--no-audit", *SHORT]
EVERY = 40  # samples that are taken
MARGIN = 1024  # bytes a repetition that are no leak: a few figures of each step stay in memory, by design


def held() -> tuple[int, int, int]:
    """Resident bytes, open files, threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threading.active_count()


def slope(nursery: Nursery, name: str, n: int, folder: Path) -> tuple[str | list[str], str]:
    """Repeat a command n times in one process: what grows, if anything, and every slope."""
    folder.mkdir(parents=True)
    child = nursery.run("soak", [name, n, folder], folder / "log")
    if child.code:
        return f"{name}: {child.said[-600:]}", ""
    return verdict(json.loads([line for line in child.said.splitlines() if line.startswith("[[")][-1]))


def main(argv: list[str]) -> None:
    """In the child: repeat, and print the samples. A tokenizer is read once: what tokenizers 0.23 keeps of
    each one that is dropped (1.5 KB, and 240 bytes a word that it has read) is not ours."""
    Tokenizer.load = cache(Tokenizer.load)
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


def verdict(samples: list[list[int]]) -> tuple[list[str], str]:
    """The second half of the samples (what is loaded late is no leak): a line through each figure, with twice
    its standard error. What grows, and all of them."""
    x, *ys = np.array(samples[len(samples) // 2 :], float).T
    wrong, told = [], []
    flat = 1e-9  # a line through equal counts is flat but for rounding
    for what, y, most in zip(("resident bytes", "open files", "threads"), ys, (MARGIN, flat, flat)):
        line = np.polyfit(x, y, 1)
        rest = y - np.polyval(line, x)
        error = 2 * np.sqrt((rest**2).sum() / max(1, len(x) - 2) / ((x - x.mean()) ** 2).sum())
        told.append(f"{what} {line[0]:+.4g} +- {error:.2g} a repetition, {y[-1]:,.0f} at the end")
        if line[0] - error > most:
            wrong.append(told[-1])
    return wrong, ", ".join(told)


def busy(engine) -> str:
    """What an engine has not given back, once its run has ended: "" where all is free."""
    for pool in dict.fromkeys(engine.pools.values()):
        taken = pool.busy or sum(seat is not None for seat in pool.rows) or len(pool.seated)
        pages = len(pool.cache.owners) - len(pool.cache.free)
        if taken or pages or sum(pool.cache.held) or any(pool.cache.owners) or any(pool.waiting):
            return f"{taken} seats and {pages} pages are taken after a run"
    return ""


def _steps(folder: Path) -> Callable:
    """One run of n steps, each told in its log. The cache has pages, as on a GPU, half of what all seats
    may need; seats and pages are free after each step."""
    import train
    from engine import Engine

    def repeat(done, n):
        tell, init = train.tell, Engine.__init__

        def paged(self, bodies, seats, capacity, *more, **other):
            init(self, bodies, seats, capacity, pages=-(-capacity // 8) * seats // 2, page=8)

        def counted(a, s, *more):
            tell(a, s, *more)
            assert not (wrong := busy(s.engine)), wrong
            done()

        train.tell, Engine.__init__ = counted, paged
        more = "--turn-tokens 2 --save-every 500 --show-every 1000000 --seat-tokens 64 --episode-tokens 48"
        train.main([*RUN, *more.split(), "--steps", str(n), "--out", f"{folder}/run"])

    return repeat


def _evaluations(folder: Path) -> Callable:
    import eval
    from evaluation import report

    def repeat(done, n):
        report.figures.__defaults__ = (100,)  # draws
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
    """A run that is resumed from the same state each time, and gets a SIGTERM in its second step: it
    reads and saves all that it has. (A run that went on would have more to read each time.)"""
    import train

    def repeat(done, n):
        tell, begun, out = train.tell, folder / "begun", folder / "run"

        def told(*args):
            tell(*args)
            os.kill(os.getpid(), signal.SIGTERM)

        train.tell = told
        with suppress(SystemExit):
            train.main([*RUN, "--steps", "3", "--out", str(begun)])
        for _ in range(n):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(begun, out)
            with suppress(SystemExit):
                train.main(["--out", str(out), "--resume"])
            assert len(rows_of(out / "log.jsonl")) == 2
            done()

    return repeat


COMMANDS = {"steps": _steps, "evaluations": _evaluations, "resumes": _resumes}
