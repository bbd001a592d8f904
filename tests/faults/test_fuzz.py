"""2,000 hostile inputs; the long part tries 100,000, and the same number always makes the same one."""

from concurrent.futures import ThreadPoolExecutor

from . import fuzz, typed
from .guard import judged


def test_hostile_input_is_read_or_refused_in_one_line(nursery, tmp_path):
    """Question files, corpora, rows, traces, prompts, checkpoints, adapters, tokenizers, states, logs,
    answers of servers and command lines: never a traceback, a hang, a gigabyte, a file elsewhere, a
    connection, or code that is loaded."""
    child = nursery.run("fuzz", ["--count", "2000"], tmp_path / "log")
    assert child.code == 0, child.said[-3000:]


def test_the_whole_command_says_so_in_one_line():
    """What a reader refuses, the command that was typed has to tell: exit code 2, one line, no traceback, and
    nothing left behind. Two inputs; the long part types hundreds."""
    two = [("indexes", 3), ("rows", 1)]
    fuzz.tokenizer(), fuzz.index()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda one: typed.typed(*one, must=True), two)) == ["", ""]


def test_the_guard_sees_what_it_is_there_for(tmp_path):
    """A guard that sees nothing finds nothing."""
    import pickle
    import socket
    import subprocess
    import time
    from pathlib import Path

    from . import guard

    def refuses():
        raise ValueError("no")

    def deep(n=0):
        return deep(n + 1)

    assert judged(refuses, tmp_path) == "refused" and judged(lambda: None, tmp_path) == ""
    assert judged(lambda: (tmp_path / "in").write_text("x"), tmp_path) == ""
    assert "KeyError" in judged(lambda: {}["x"], tmp_path) and "RecursionError" in judged(deep, tmp_path)
    outside = tmp_path.with_name("outside")
    assert "wrote" in judged(lambda: outside.write_text("x"), tmp_path)
    assert "os.remove" in judged(lambda: outside.unlink(), tmp_path)
    assert "socket" in judged(lambda: socket.create_connection(("127.0.0.1", 9), 1), tmp_path)
    assert "subprocess" in judged(lambda: subprocess.run(["true"]), tmp_path)
    assert "pickle" in judged(lambda: pickle.loads(pickle.dumps(Path("x"))), tmp_path)
    old, guard.SECONDS = guard.SECONDS, 0.03
    try:
        assert "hung" in judged(lambda: time.sleep(60), tmp_path)
        assert "hung" in judged(lambda: [None for i in iter(int, 1)], tmp_path)
    finally:
        guard.SECONDS = old
    eat = [*guard.watched(lambda i: judged(lambda: bytearray(2**31 * i), tmp_path), 0, 2)]
    assert eat[0] == [0, ""] or eat[0] == (0, "")
    assert "MemoryError" in eat[1][1]
