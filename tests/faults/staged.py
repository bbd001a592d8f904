"""What is wrong with the world of one child: called by name in the child, before its command runs."""

import itertools
import tempfile
import time

from .guard import limit_memory


def clock_jumps() -> None:
    """The wall clock jumps by years, back and forth; the monotonic one does not."""
    jumps, now = itertools.cycle([-3e8, 0.0, 3e9]), time.time
    time.time = lambda: now() + next(jumps)


def no_memory() -> None:
    """There are 4 MB left."""
    limit_memory(2**22)


def little_memory() -> None:
    """There are 2 GiB left."""
    limit_memory(2**31)


def no_place_for_temporary_files() -> None:
    """/tmp is missing or full, and so is all else that Python would try, the current directory included."""
    tempfile.tempdir = None
    tempfile._candidate_tempdir_list = lambda: ["/nonexistent"]
