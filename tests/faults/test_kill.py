"""Commands killed, starved and signalled: a small share of what `python -m tests.faults --long` tries."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors import SafetensorError

from cli import screen
from cli.disk import Rows, claimed, load_state
from cli.pause import Pause
from servers import ServerError

from .kill import different, left, told
from .nursery import FULL, KILL, KILL_HALF, ONCE, ROOT

NAMES = ("train", "sft", "collect", "eval")
INPUTS = ("rows.jsonl", "questions.jsonl")


def some(calls: list[str], n: int, *kinds: str) -> list[int]:
    """Numbers of n calls of these kinds, from 1."""
    of = [i for i, call in enumerate(calls, 1) if call.split()[0] in kinds]
    return sorted(random.Random(0).sample(of, min(n, len(of))))


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_a_call_it_goes_on_as_if_it_had_not_been(bench, name):
    """Killed between any two changes of the disk, or in the middle of a write, a command that resumes leaves
    what an uninterrupted one does, bit for bit, and no file more. (safetensors' own writer left a temporary
    file for each kill, and a fine-tuning killed after its last save could not be resumed.)"""
    job = bench.jobs[name]
    calls = bench.whole(job)[1]
    last = {"sft": [len(calls) - 1], "eval": [len(calls)]}.get(name, [])  # the state goes, the rows go
    for n in [*some(calls, 1, "rename", "fsync"), *some(calls, 1, "unlink", "open"), *last]:
        assert bench.at_call(job, n, KILL) == "", f"killed before call {n}: {calls[n - 1]}"
    for n in some(calls, 1, "write"):
        assert bench.at_call(job, n, KILL_HALF) == "", f"killed within call {n}: {calls[n - 1]}"


CHANGED = {  # command -> a file, what of it changes into what, and what is said of it
    "eval": [
        ("questions.jsonl", "Osham", "Lima", "begun with other questions"),
        ("body/config.json", "}", " }", "another --policy"),
    ],
    "sft": [
        ("rows.jsonl", "Osham", "Lima", "begun with other rows"),
        ("body/config.json", "}", " }", "another --sim"),
    ],
    "collect": [
        ("rows.jsonl.episodes", '"question": "', '"question": "x', "begun with other questions"),
        ("rows.jsonl.episodes", '"forced"', '"other"', "something else than it should"),
    ],
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_goes_on_sees_what_has_changed(bench, tmp_path, name):
    """The same flags may name other questions, rows or weights by then: half of a result would be theirs."""
    job, log = bench.jobs[name], tmp_path / "log"
    shutil.copytree(bench.nursery.body, tmp_path / "body")
    for file in INPUTS if name != "collect" else ():
        shutil.copy(bench.folder / file, tmp_path)
    moved = {"tiny": str(tmp_path / "body"), **{str(bench.folder / f): str(tmp_path / f) for f in INPUTS}}
    begin, resume = ([moved.get(word, word) for word in way(tmp_path)] for way in (job.begin, job.resume))
    half = {"root": str(tmp_path), "at": len(bench.whole(job)[1]) // 2, "how": KILL}
    assert bench.nursery.run(job.command, begin, log, **half).code == -signal.SIGKILL
    for file, old, new, says in CHANGED[name]:
        before = (tmp_path / file).read_text()
        (tmp_path / file).write_text(before.replace(old, new))
        child = bench.nursery.run(job.command, resume, log)
        (tmp_path / file).write_text(before)
        assert told(child) == "" and says in child.said, child.said
    child = bench.nursery.run(job.command, resume, log)
    assert child.code == 0, child.said


@pytest.mark.parametrize("name", ["train", "sft"])
def test_killed_at_an_instant(bench, name):
    """kill -9 asks nobody: no handler of ours runs, whatever the command was doing."""
    _, wrong = bench.at_instants(bench.jobs[name], f"{name} quick", 2)
    assert wrong == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_given_only_to_what_is_on_the_disk(bench, name):
    """After a power cut only what was synced is there: a file before it takes its name, the name before
    anything counts on it, a new directory's name as well, and a step's rows before its state."""
    calls = [tuple(call.split(" ", 1)) for call in bench.whole(bench.jobs[name])[1]]
    for i, (call, path) in enumerate(calls):
        if call == "rename":
            assert calls[i - 1] == ("fsync", f"{path}.tmp"), path
            assert calls[i + 1] == ("fsync", os.path.dirname(path)), path
            if path.endswith("state.safetensors"):
                unsynced = set()
                for old, file in calls[:i]:
                    if file.endswith((".jsonl", ".jsonl.tmp")):
                        (unsynced.add if old == "write" else unsynced.discard)(file)
                assert not {file for file in unsynced if file.endswith(".jsonl")}
        if call == "mkdir" and ("open" in [c for c, p in calls[i:] if p.startswith(path + "/")]):
            assert ("fsync", os.path.dirname(path)) in calls[i:] or path.endswith("case"), path


@pytest.mark.parametrize("error", ["ENOSPC", "EACCES"])
def test_a_disk_that_refuses_is_one_line_and_the_run_goes_on_later(bench, error):
    """Full, read-only, over quota, not ours: exit code 2, one line, nothing half-written, nothing lost."""
    for name, how, kinds in (("train", FULL, ("write",)), ("eval", ONCE, ("write", "open"))):
        job = bench.jobs[name]
        calls = bench.whole(job)[1]
        n = random.Random(error).choice([i for i, c in enumerate(calls, 1) if c.split()[0] in kinds])
        assert bench.refused(job, n, how, getattr(errno, error)) == "", f"{error} at {calls[n - 1]}"


def started(bench, home):
    """A training that has taken its first step, and goes on for long."""
    log = home / "log"
    argv = [w if w != "3" else "500" for w in bench.jobs["train"].begin(home)]
    child = bench.nursery.start("train", argv, log)
    for _ in range(600):
        if (home / "run/log.jsonl").exists() and (home / "run/log.jsonl").stat().st_size:
            return child
        time.sleep(0.1)
    child.kill()
    raise AssertionError(child.said)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_in_a_line_that_says_how_to_go_on(bench, tmp_path, sig):
    """A terminal that is closed, as by a lost connection, ended a run without a word and without its last
    steps; so would a machine that is taken away."""
    child = started(bench, tmp_path)
    child.kill(sig)
    assert child.wait() == 130 and "saved; go on with" in child.said and "Traceback" not in child.said
    steps = (tmp_path / "run/log.jsonl").read_bytes().count(b"\n")
    assert load_state(tmp_path / "run/state.safetensors")[1]["step"] == steps
    assert not list(tmp_path.rglob("*.tmp"))


def test_nohup_is_heard():
    """Who started a run with nohup wants it to outlive the terminal."""
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        handlers = []
        screen.run(lambda: handlers.append(signal.getsignal(signal.SIGHUP)))
        with Pause(lambda: None, lambda: True).on_signals():
            handlers.append(signal.getsignal(signal.SIGHUP))
        assert handlers == [signal.SIG_IGN] * 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_process_is_refused(bench, tmp_path):
    """Two evaluations that append to one file, or two runs in one directory, make neither."""
    job = bench.jobs["eval"]
    whole = left(bench.folder / "whole-eval") if bench.whole(job) else {}
    rows = Rows(tmp_path / "result.json.part", {"x": 1})
    rows.add({"set": "a", "number": 0})
    rows = Rows(tmp_path / "result.json.part", {"x": 1}, resume=True)  # this process goes on with it
    child = bench.nursery.run("eval", job.resume(tmp_path), tmp_path / "log")
    assert told(child) == "" and "another run is writing into" in child.said
    with claimed(tmp_path / "run", resume=False):
        child = bench.nursery.run("train", bench.jobs["train"].begin(tmp_path), tmp_path / "log")
        assert told(child) == "" and "another run is writing into" in child.said
    del rows
    (tmp_path / "result.json.part").unlink(), (tmp_path / "log").unlink()
    assert bench.nursery.run("eval", job.begin(tmp_path), bench.folder / "log").code == 0
    assert not different(left(tmp_path), whole)


def test_more_updates_than_groups_are_not_counted_through(bench, tmp_path):
    """--updates 2147483648 of a handful of groups: a step looked at each of them."""
    argv = [*bench.jobs["train"].begin(tmp_path), "--updates", str(2**31)]
    child = bench.nursery.start("train", argv, tmp_path / "log")
    assert child.wait(60) == 0, child.said


@pytest.mark.parametrize("staged", ["clock_jumps", "no_memory"])
def test_a_clock_that_jumps_and_memory_that_ends(bench, tmp_path, staged):
    """A clock set back must not end or prolong a run; memory that is gone is one line, not a traceback."""
    job = bench.jobs["train"]
    child = bench.nursery.run("train", job.begin(tmp_path), tmp_path / "log", staged=[staged])
    if staged == "no_memory":
        assert told(child) == "" and "out of memory" in child.said
        return
    assert child.code == 0, child.said
    (tmp_path / "log").unlink()
    assert different(left(tmp_path), bench.whole(job)[0]) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        OSError("Cannot allocate memory (os error 12). Step 3 is lost: go on with --out x --resume"),
        SafetensorError("Cannot allocate memory (os error 12)"),
    ],
)
def test_memory_that_ends_is_told_with_advice(error, capsys, monkeypatch):
    """With the lowest versions it was safetensors that found none first: a line without any advice."""
    said = printed(error, capsys, monkeypatch)
    assert said.startswith("error: out of memory: see --memory") and str(error) in said


@pytest.mark.parametrize(
    "error",
    [
        ServerError(
            "http://127.0.0.1:9: answered 400: DefaultCPUAllocator: can't allocate memory. See that ..."
        ),
        OSError(errno.ENOENT, os.strerror(errno.ENOENT), "Cannot allocate memory/x"),
        ValueError("std::bad_alloc is no question"),
        SafetensorError("invalid header"),
    ],
)
def test_other_errors_are_told_as_they_are(error, capsys, monkeypatch):
    """A server without memory was told as this machine's: its address was lost, and the advice was wrong."""
    assert printed(error, capsys, monkeypatch) == f"error: {error}\n"


def printed(error, capsys, monkeypatch) -> str:
    """What a command that raises this says at its end."""
    monkeypatch.setattr(signal, "signal", lambda *a: None)

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        screen.run(main)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_no_place_for_temporary_files(bench, tmp_path, name):
    """A machine's /tmp is missing, full or read-only more often than the disk of a run: what we write is made
    next to what it replaces."""
    child = bench.nursery.run(
        bench.jobs[name].command,
        bench.jobs[name].begin(tmp_path),
        bench.folder / "log",
        staged=["no_place_for_temporary_files"],
    )
    assert child.code == 0, child.said
    assert bench.wrong(bench.jobs[name], tmp_path) == ""


def test_tmpdir_points_to_nothing(bench, tmp_path):
    """Without TMPDIR and /tmp Python takes the current directory: a command, libraries and all, starts there,
    and leaves nothing behind."""
    for folder in ("home", "out"):
        (tmp_path / folder).mkdir()
    code = (
        "import os, sys, tempfile; tempfile._candidate_tempdir_list = lambda: ['/nonexistent', os.getcwd()];"
        "from cli import screen; import eval; screen.run(lambda: eval.main(sys.argv[1:]))"
    )
    argv = [
        word if word != "tiny" else bench.nursery.body for word in bench.jobs["eval"].begin(tmp_path / "out")
    ]
    env = os.environ | {"TMPDIR": "/nonexistent", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=tmp_path / "home", env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "home").iterdir())
    assert (tmp_path / "out/result.json").exists()


def test_said_is_clean(bench, tmp_path):
    """A terminal is not steered by what a file says: a question with its own colours is refused in plain."""
    (tmp_path / "q.jsonl").write_text('{"question": "a", "answer": "b", "hops": "\\u001b[31m\\u202e"}\n')
    argv = ["--policy", "tiny", "--data", str(tmp_path / "q.jsonl"), "--search", "none"]
    child = bench.nursery.run("eval", argv, tmp_path / "log")
    assert told(child) == "" and not re.search("[\x1b\u202e]", child.said)
