"""What is wrong with the world of one child: called by name in the child, before its command runs."""

import itertools
import resource
import tempfile
import time
from pathlib import Path


def clock_jumps() -> None:
    """The wall clock jumps by years, back and forth; the monotonic one does not."""
    jumps, now = itertools.cycle([-3e8, 0.0, 3e9]), time.time
    time.time = lambda: now() + next(jumps)


def no_memory() -> None:
    """There are 4 MB left."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**22,) * 2)


def no_place_for_temporary_files() -> None:
    """/tmp is missing or full, and so is all else that Python would try, the current directory included."""
    tempfile.tempdir = None
    tempfile._candidate_tempdir_list = lambda: ["/nonexistent"]


def little_memory() -> None:
    """There are 2 GiB left."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31,) * 2)
