"""What no input may do: raise anything but a clear error, hang, eat memory, leave its folder, or reach out.

`watched` runs a function on many inputs in a forked process, which may die: each input is judged alone.
"""

import json
import mmap
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

SECONDS = 10  # of the processor that one input may take: other programs may be busy
MEMORY = 2**30  # bytes that one input may take
CLEAR = (ValueError, OSError, SafetensorError)  # what cli/screen.py makes one line of, with exit code 2
NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"}
CODE = {"pickle.find_class", "marshal.loads", "code.__new__", "ctypes.dlopen"}
OURS = (str(Path(__file__).resolve().parents[2]), sys.prefix, sys.base_prefix)


class Hang(BaseException):
    """An input took longer than SECONDS."""


_state: dict = {"folder": None, "seen": []}


def _hook(event: str, args: tuple) -> None:
    """Note what an input must not do. (An audit hook sees all that Python does, whatever library asks.)"""
    if _state["folder"] is None:
        return
    if event == "open":
        path, mode, how = args
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(how, int) and how & 3)
        if writes and isinstance(path, str | bytes) and not _inside(os.fsdecode(path)):
            _state["seen"].append(f"wrote {os.fsdecode(path)}")
    elif event in NETWORK and not (event == "socket.connect" and _local(args[1])):
        _state["seen"].append(f"{event} {args[1:]!r}"[:200])
    elif event in PROGRAMS or event in CODE:
        told = repr(args)[:120]
        if event != "marshal.loads" and event != "ctypes.dlopen" and event != "code.__new__":
            _state["seen"].append(f"{event} {told}")
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"):
        path = args[1] if event in ("os.rename", "os.link", "os.symlink") else args[0]
        if isinstance(path, str | bytes | Path) and not _inside(os.fsdecode(path)):
            _state["seen"].append(f"{event} {path}")
    elif event == "exec":
        file = getattr(args[0], "co_filename", "")
        if not file.startswith((*OURS, "<")):
            _state["seen"].append(f"ran {file}")


def _inside(path: str) -> bool:
    path = os.path.abspath(path)
    return path.startswith((str(_state["folder"]), "/dev/null", "/proc/", "/dev/shm/"))


def _local(address: object) -> bool:
    return _state.get("loopback", False) and isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1")


sys.addaudithook(_hook)


@contextmanager
def noted(folder: Path, loopback: bool = False) -> Iterator[list[str]]:
    """What is done within the block that no input may cause. loopback: this machine may be asked."""
    _state.update(folder=Path(folder).resolve(), seen=[], loopback=loopback)
    try:
        yield _state["seen"]
    finally:
        _state["folder"] = None


def _late(*_) -> None:
    raise Hang


def judged(run: Callable[[], object], folder: Path, loopback: bool = False) -> str:
    """Run one input: "" where it succeeded, "refused" with a clear error; else what was wrong."""
    began, result = time.process_time(), ""
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS)}
    timers |= {signal.SIGALRM: (signal.ITIMER_REAL, 30 * SECONDS)}  # whoever waits uses no processor
    for sig, (timer, seconds) in timers.items():
        signal.signal(sig, _late)
        signal.setitimer(timer, seconds)
    try:
        with noted(folder, loopback) as seen:
            try:
                run()
            except CLEAR as e:
                result = "refused" if str(e).strip() else f"an error without a word: {e!r}"
            except SystemExit as e:
                result = "refused" if e.code in (2, 0) else f"exit code {e.code}"
            except Hang:
                result = f"hung: {where()}"
            except BaseException as e:
                result = f"{type(e).__name__}: {str(e)[:160]} {where()}"
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
    if seen:
        return f"did what it must not: {seen[0]}"
    if time.process_time() - began > 2 * SECONDS:  # in code that no signal interrupts
        return f"took {time.process_time() - began:.0f} s"
    return result


def where() -> str:
    """The place of an exception: the last line of ours that it went through."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [f for f in frames if f.filename.startswith(OURS[0]) and "tests/faults" not in f.filename]
    last = (ours or list(frames))[-1]
    return f"at {Path(last.filename).name}:{last.lineno} ({last.name})"


def watched(
    run: Callable[[int], str], start: int, stop: int, memory: int = MEMORY
) -> Iterator[tuple[int, str]]:
    """run(i) for i from start to stop in a forked process of limited memory -> (i, what it returned).

    An input that kills the process is told as such, and the next ones run in a new one.
    """
    while start < stop:
        at, (receive, send) = mmap.mmap(-1, 8), os.pipe()
        pid = os.fork()
        if not pid:
            os.close(receive)
            code = 0
            try:
                limit_memory(memory)
                with os.fdopen(send, "w") as out:
                    for i in range(start, stop):
                        at[:] = i.to_bytes(8, "little")
                        out.write(json.dumps([i, run(i)]) + "\n")
            except BaseException:
                traceback.print_exc()
                code = 1
            os._exit(code)
        os.close(send)
        with os.fdopen(receive) as answers:
            for line in answers:
                if line.endswith("\n"):
                    yield tuple(json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if not status:
            return
        start = int.from_bytes(at[:], "little")
        yield start, f"killed its process ({status})"
        start += 1


def limit_memory(more: int) -> None:
    """This process may take so much more memory than it has now, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
