"""Real peers, killed and started again under load: `transformers serve` and a retriever (retriever.py).

    FAULT_PEERS=peers/bin/python FAULT_BODY=SmolLM2 python -m tests.faults --long --only peers

FAULT_PEERS: a Python with transformers[serving], fastapi, uvicorn and bm25s (default: this one). FAULT_BODY:
a checkpoint that `transformers serve` can serve. What is missing is told in one line, and not tried.

Not a mock: both are other people's code in other processes, which die by SIGKILL or stand still by SIGSTOP.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from cli import screen
from tests.conftest import free_port

from .kill import Job, different, left, told
from .nursery import ROOT

PYTHON = os.environ.get("FAULT_PEERS", sys.executable)
BODY = os.environ.get("FAULT_BODY", "")
SEARCH_LIMIT = 60.0  # seconds of a search, servers.py
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
PEOPLE = 160


class Peer:
    """A server in another process, always at the same port. health: a path that it answers when ready."""

    def __init__(self, command: Callable[[int], list[str]], health: str, log: Path):
        self.port = free_port()
        self.command, self.health, self.log = command(self.port), f"http://127.0.0.1:{self.port}{health}", log
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it, or let it go on; it may take a while to be ready."""
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGCONT)
        else:
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    self.command, env=ENV, stdout=log, stderr=log, start_new_session=True
                )

    def ready(self) -> None:
        """Start it if it is not there, and wait until it answers."""
        self.start()
        for _ in range(1200):
            with suppress(OSError), urllib.request.urlopen(self.health, timeout=5):
                return
            if self.process.poll() is not None:
                raise RuntimeError(f"a peer ended at once: {self.log.read_text()[-600:]}")
            time.sleep(0.25)
        raise RuntimeError(f"a peer is not ready after minutes: {self.log.read_text()[-600:]}")

    def signal(self, sig: int) -> None:
        os.killpg(self.process.pid, sig)
        if sig == signal.SIGKILL:
            self.process.wait()

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGKILL)


class Command:
    """A command of ours, as its user starts it. code: its exit code, once it has ended."""

    def __init__(self, job: Job, argv: list[str], log: Path):
        self.log, self.code, file = log, None, open(log, "wb")  # noqa: SIM115
        with file:
            command = [sys.executable, f"{job.command}.py", *argv]
            self.process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=file, stderr=subprocess.STDOUT)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def ended(self, within: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self.code = self.process.wait(within)
        return self.code is not None


def lines(home: Path) -> int:
    """Lines that a run has written so far: how far it is."""
    kept = [p for p in home.rglob("*") if p.suffix in (".jsonl", ".part", ".episodes")]
    return sum(p.read_bytes().count(b"\n") for p in kept if p.exists())


def undisturbed(peer: Peer, job: Job, home: Path) -> tuple[dict, int, float]:
    """What a run leaves whose peer is well; the most lines that it had on disk; its seconds."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    peer.ready()
    began, most = time.monotonic(), 0
    run = Command(job, job.begin(home), home.with_suffix(".log"))
    while not run.ended(0.05):
        most = max(most, lines(home))
    if run.code:
        raise RuntimeError(run.said[-600:])
    return left(home), most, time.monotonic() - began


def disturbed(
    peer: Peer, job: Job, home: Path, seed: str, whole: dict, most: int, seconds: float, limit: float
) -> tuple[int, str]:
    """One run, during which its peer is killed or stopped up to three times, at random places of the run
    -> how often, and what is wrong with how it ended.

    Each time chance decides: killed and started again at once; killed, and left dead until the run ends;
    stopped for a while; stopped until the run ends.
    """
    rng, hit, argv, log = random.Random(seed), 0, job.begin(home), home.with_suffix(".log")
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    places = sorted(rng.randrange(most) for _ in range(3))
    for _ in range(12):  # starts of the command
        peer.ready()
        run = Command(job, argv, log)
        while not run.ended(0.02):
            if not places or lines(home) < places[0]:
                continue
            del places[0]
            hit, how = hit + 1, rng.choice(("again", "dead", "pause", "stop")[: 4 - (limit > 100)])
            run.ended(rng.uniform(0, seconds / 20))  # somewhere between two rows
            peer.signal(signal.SIGKILL if how in ("again", "dead") else signal.SIGSTOP)
            if how == "pause":
                run.ended(rng.uniform(0.5, 5))
            if how in ("again", "pause"):
                peer.start()
            elif (spent := waited(run, peer, limit)) > 1.1 * limit:
                run.process.kill()
                return hit, f"{how}: {spent:.0f} s without an answer, and no end"
        if not run.code:
            wrong = different(left(home), whole)
            return hit, f"other than undisturbed: {', '.join(wrong)}" if wrong else ""
        if wrong := told(run):
            return hit, wrong
        if "127.0.0.1" not in run.said.splitlines()[-1]:
            return hit, f"does not say which server: {run.said[-300:]}"
        argv = job.resume(home) if any(home.iterdir()) else job.begin(home)
    return hit, f"never ended: {run.said[-300:]}"


def waited(run: Command, peer: Peer, limit: float) -> float:
    """Wait for the end of a run whose peer does not answer -> the seconds from its first request that waits
    (a busy machine may take long to ask one) to its last line."""
    began, where = 0.0, f":{peer.port:04X}"
    while not run.ended(0.05) and "error: " not in run.said:
        if not began:
            sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
            waits = any(s[2].endswith(where) and s[3] == "01" for s in sockets[1:])  # 01: connected
            began = time.monotonic() if waits else 0.0
        elif time.monotonic() - began > 1.1 * limit:
            break
    spent = time.monotonic() - began if began else 0.0
    run.ended(60)
    return spent


# ------------------------------------------------------------------------------------------------ what is run

SHORT = "--turns 1 --turn-tokens 12 --seats 64 --seed 3 --device cpu --documents 2 --document-words 12"
SHORT += " --policy tiny --prompt-tokens 200 --episode-tokens 400"


def files(folder: Path) -> tuple[Path, Path]:
    """A corpus, and as many questions about it."""
    corpus, questions = folder / "corpus.jsonl", folder / "questions.jsonl"
    text = '"Person {0}"\nPerson {0} lives in Town {1} and sings Song {2}.'
    rows = [{"id": i, "contents": text.format(i, i * 7 % 100, i * 3)} for i in range(PEOPLE)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {"id": i, "question": f"Where lives Person {i}?", "answer": f"Town {i * 7 % 100}"}
        for i in range(PEOPLE)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompt.json").write_text('{"prompt": "{documents}\\nQuestion: {question}\\n", "notice": "!"}')
    return corpus, questions


def searching(questions: Path, address: str) -> dict[str, Job]:
    """Commands that ask a retriever: an evaluation (a search a question), and a collection."""
    ask = f"--mode rag --data {questions} --search {address} --json {{}}/result.json {SHORT}".split()
    ask += ["--policy-prompt", str(questions.with_name("prompt.json"))]
    get = f"collect --data {questions} --search {address} --out {{}}/rows.jsonl --rows 300".split()
    get += ["--judge", "answer", "--force-search", "--policy-prompt", "short", *SHORT.split()]
    return {
        "eval": Job("eval", "eval", tuple(ask), (*ask, "--resume"), "result.json"),
        "collect": Job("collect", "simulator", tuple(get), (*get, "--resume"), "rows.jsonl"),
    }


def simulated(address: str) -> Job:
    """A training of the toy policy, whose simulator is a server."""
    argv = f"--sim {address} --steps 4 --questions 4 --group 2 --eval-questions 0 --no-audit --sim-tokens 16"
    argv += " --save-every 1 --show-every 99 --turns 2 --seed 3 --device cpu --shared-coins --out {}/run"
    return Job("train", "train", tuple(argv.split()), ("--out", "{}/run", "--resume"), "run")


def missing(needs: str) -> str:
    """What the Python of peers cannot import, or ""."""
    run = subprocess.run([PYTHON, "-c", f"import {needs}"], capture_output=True, text=True)
    return run.stderr.splitlines()[-1] if run.returncode else ""


def cases(folder: Path) -> Iterator[tuple[str, Callable[[], tuple[int, str]]]]:
    """Runs whose peer dies: 8 evaluations, 5 collections, 4 trainings; up to 3 times each."""
    if lacks := missing("fastapi, uvicorn, transformers") or (not BODY and "FAULT_BODY names no checkpoint"):
        screen.say(f"peers: no transformers serve, {lacks}")
    else:
        serve = [
            str(Path(PYTHON).with_name("transformers")),
            "serve",
            BODY,
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ]
        peer = Peer(
            lambda port: [*serve, "--host", "127.0.0.1", "--port", str(port)], "/v1/models", folder / "serve"
        )
        yield from tried(peer, {"train": (simulated(f"http://127.0.0.1:{peer.port}/v1"), 4)}, folder, 600.0)
    if lacks := missing("fastapi, uvicorn, bm25s"):
        screen.say(f"peers: no retriever, {lacks} (FAULT_PEERS names a Python that has it)")
    else:
        corpus, questions = files(folder)
        script = str(Path(__file__).with_name("retriever.py"))
        peer = Peer(
            lambda port: [PYTHON, script, str(corpus), str(port), "0.05"], "/health", folder / "retriever"
        )
        jobs = searching(questions, f"http://127.0.0.1:{peer.port}")
        yield from tried(
            peer, {"eval": (jobs["eval"], 8), "collect": (jobs["collect"], 5)}, folder, SEARCH_LIMIT
        )


def tried(peer: Peer, jobs: dict[str, tuple[Job, int]], folder: Path, limit: float):
    """The cases of a peer."""
    try:
        for name, (job, n) in jobs.items():
            facts: list = []

            def case(i: int, job=job, facts=facts) -> tuple[int, str]:
                facts[:] = facts or undisturbed(peer, job, folder / "whole")
                return disturbed(peer, job, folder / "case", f"{job.name} {i}", *facts, limit)

            for i in range(n):
                yield f"{name} {i}", lambda i=i, case=case: case(i)
    finally:
        peer.close()
