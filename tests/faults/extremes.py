"""Every number of the command line at its bounds: each command as a whole, with little memory.

python -m tests.faults --long --only extremes
"""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cli.flags import flags_of

from .kill import Job, jobs, told
from .nursery import Nursery

SECONDS = 20  # after which a run that asks for very much is ended: it has only just begun


def cases(folder: Path) -> Iterator[tuple[str, Callable[[], tuple[int, str]]]]:
    """Each command, and each number that it takes: the least and the most, one at a time."""
    nursery, files = Nursery(folder), folder / "files"
    files.mkdir()
    for job in jobs(files).values():
        for flag in flags_of(job.name):
            for value in flag.bounds() if flag.kind in (int, float) else ():
                yield (
                    f"{job.name} --{flag.name} {value}",
                    partial(ended, nursery, job, flag.name, value, folder),
                )


def ended(nursery: Nursery, job: Job, name: str, value: float, folder: Path) -> tuple[int, str]:
    """One run: it succeeds, or refuses in one line, or goes on for long."""
    home = folder / "home"
    home.mkdir()
    child = nursery.start(
        job.command, [*job.begin(home), f"--{name}", value], home / "log", staged=["little_memory"]
    )
    wrong = "" if child.wait(SECONDS) == 0 or child.late else told(child)
    shutil.rmtree(home)
    return 1, wrong
