"""The long part: thousands of faults, by one command that goes on where it was cut, and their table.

    python -m tests.faults --long                  # hours; rows are kept in runs/faults.jsonl
    python -m tests.faults --long --only kill      # the kinds whose names begin like that
    python -m tests.faults                         # the table of what has been tried so far

A row is a batch of faults: {"kind", "case", "tried", "wrong"}, perhaps a "note"; wrong has a text for each
that was not survived.
"""

import errno
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

from cli import screen
from cli.disk import Rows
from cli.parser import Flag, parse, with_defaults

from . import covered, endurance, extremes, fuzz, peers, typed, wire
from .kill import Bench
from .nursery import FULL, KILL, KILL_HALF, ONCE, ROOT, Nursery

FLAGS = {
    "what is tried": [
        Flag("long", bool, False, "try what is not in --rows yet"),
        Flag("only", str, "", "the kinds whose names begin with this", "NAME"),
        Flag("share", float, 1.0, "of each kind's cases", most=1),
        Flag("rows", str, "runs/faults.jsonl", "where the rows are kept", "FILE"),
    ]
}
# name, try it -> (faults, what is wrong: a text, or a list of them, perhaps a note); is sent the faults
Cases = Generator[tuple[str, Callable[[], tuple]], int, None]


def killed_at_calls(folder: Path) -> Cases:
    """Each call of each command that changes the disk: killed before it, and in the middle of a write."""
    bench = Bench(Nursery(folder), folder / "calls")
    for job in bench.jobs.values():
        calls = bench.whole(job)[1]
        for n in range(1, len(calls) + 1):
            for how in (KILL, KILL_HALF) if calls[n - 1].startswith("write") else (KILL,):
                yield f"{job.name} {n} {how}", lambda n=n, how=how, job=job: (1, bench.at_call(job, n, how))


def killed_at_instants(folder: Path) -> Cases:
    """200 instants of training and 60 of each other command, up to 4 in one run."""
    bench = Bench(Nursery(folder), folder / "instants")
    for job in bench.jobs.values():
        hit = run = 0
        while hit < (200 if job.name == "train" else 60):
            hit += yield (
                f"{job.name} {run}",
                lambda job=job, run=run: bench.at_instants(job, f"{job.name} {run}", 4),
            )
            run += 1


def refused(folder: Path) -> Cases:
    """Every fifth call of each command refused: once, or with all that follow; by five errors in turn."""
    bench = Bench(Nursery(folder), folder / "refused")
    errors = [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.EACCES]
    for job in bench.jobs.values():
        calls = bench.whole(job)[1]
        for turn, n in enumerate(range(1, len(calls) + 1, 5)):
            if calls[n - 1].split()[0] in ("open", "write", "rename", "mkdir"):  # the others end nothing
                how, error = (FULL, ONCE)[turn % 2], errors[turn % 5]
                yield (
                    f"{job.name} {n} {errno.errorcode[error]}",
                    lambda job=job, n=n, how=how, error=error: (1, bench.refused(job, n, how, error)),
                )


def fuzzed(folder: Path) -> Cases:
    """100,000 inputs, in batches of 1,000 of a format."""
    fuzz.warm()
    for name, n in fuzz.LONG.items():
        for start in range(0, n, 1000):

            def batch(name=name, start=start, stop=start + 1000, n=n) -> tuple[int, list[str]]:
                said = list(fuzz.fuzzed(name, start, min(stop, n) - start))
                return len(said), [f"{i}: {w}" for i, w in said if w not in ("", "refused")]

            yield f"{name} {start}", batch


PYTHONS = ("3.11", "3.12", "3.13")
REQUIRED = (ROOT / "requirements.txt").read_text()
LOWEST = [f"{name}=={least}.*" for name, least in re.findall(r"^([\w-]+)>=([\d.]+)", REQUIRED, re.MULTILINE)]
MATRIX = {"lowest, 3.11": ("python3.11", LOWEST)} | {f"newest, {v}": (f"python{v}", ()) for v in PYTHONS}


def versions(folder: Path) -> Cases:
    """The suite with the lowest versions of requirements.txt, and with the newest in each Python."""
    for name, (python, pins) in MATRIX.items():
        if not shutil.which(python):
            screen.say(f"versions: there is no {python} here")
            continue

        def suite(name=name, python=python, pins=pins) -> tuple[int, str]:
            home = folder / name.replace(" ", "")
            needs = ["-r", str(ROOT / "requirements-test.txt"), *pins]
            for command in (
                [python, "-m", "venv", home],
                [home / "bin/python", "-m", "pip", "install", "-q", *needs],
                [home / "bin/python", "-m", "pytest", "-q"],
            ):
                run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                if run.returncode:
                    return 1, (run.stdout + run.stderr)[-400:]
            return 1, ""

        yield name, suite


def soak(folder: Path) -> Cases:
    """10,000 steps of training, 2,000 evaluations, 100 resumes: memory, open files and threads stay flat."""
    nursery = Nursery(folder)
    for name, n in (("steps", 10_000), ("evaluations", 2_000), ("resumes", 100)):
        yield name, lambda name=name, n=n: (n, *endurance.slope(nursery, name, n, folder / name))


def floods(folder: Path) -> Cases:
    """A thousand requests to a server of each kind (100 where an answer has 17 MB), at once where it is slow,
    32 at a time where it is not: each ends as it must, within 1.1 of its limit."""
    for name in wire.SLOW | wire.HANDSHAKES | wire.PASSING | wire.FLOODS:
        yield name, lambda name=name: wire.flood(name, 100 if name == "17 MB" else 1000, 30.0)


KINDS: dict[str, Callable[[Path], Cases]] = {
    "kill at a call": killed_at_calls,
    "kill at an instant": killed_at_instants,
    "refused by the disk": refused,
    "fuzz": fuzzed,
    "covered": covered.cases,
    "typed": typed.cases,
    "extremes": extremes.cases,
    "peers": peers.cases,
    "flood": floods,
    "soak": soak,
    "versions": versions,
}


def main(argv: list[str] | None = None) -> None:
    """Try what is left, and print the table."""
    a = with_defaults(FLAGS, parse(__doc__, FLAGS, argv))
    rows = Rows(a.rows, resume=True, key=lambda row: (row["kind"], row["case"]))
    for kind, cases in KINDS.items() if a.long else ():
        if kind.startswith(a.only):
            with tempfile.TemporaryDirectory() as folder, screen.bar(kind, unit="faults") as bar:
                attempt(kind, cases(Path(folder)), rows, bar)
    print(table(rows.rows.values()))


def attempt(kind: str, cases: Cases, rows: Rows, bar) -> None:
    """Every case of a kind that has no row yet. The cases are sent how many faults a known one was."""
    sent: int | None = None
    while True:
        try:
            case, run = cases.send(sent)
        except StopIteration:
            return
        if (old := rows.rows.get((kind, case))) is None:
            tried, wrong, *note = run()
            wrong = [wrong] * bool(wrong) if isinstance(wrong, str) else wrong
            row = {"kind": kind, "case": case, "tried": tried, "wrong": wrong}
            rows.add(row | ({"note": note[0]} if note else {}))
            for fault in wrong:
                screen.say(f"{kind}, {case}: {fault}")
        else:
            tried = old["tried"]
        sent = tried
        bar.update(tried)


def table(rows) -> str:
    """A line a kind: how many faults were tried, how many survived."""
    lines: dict[str, dict[str, int]] = {}
    for row in rows:
        line = lines.setdefault(row["kind"], {"tried": 0, "survived": 0})
        line["tried"] += row["tried"]
        line["survived"] += row["tried"] - len(row["wrong"])
    return screen.table(lines)


if __name__ == "__main__":
    screen.run(main)
