"""Commands killed at any instant, and at each call that changes the disk; then resumed, and compared.

Not a mock: the process that dies is the command's own, by SIGKILL, and what is on the disk is what it left.
"""

import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cli.disk import load_state

from .nursery import COUNT, Child, Nursery

# What depends on the clock, or on where the run is.
CLOCK = {"seconds", "seconds_act", "seconds_learn", "seconds_left", "tokens_per_second", "ms"}
PLACE = {"out", "json", "resume", "given"}
SHORT = ["--turn-tokens", "6", "--turns", "1", "--device", "cpu", "--seed", "3", "--seats", "4"]


@dataclass(frozen=True)
class Job:
    """A command and how it goes on. out: what it writes, below the folder of a case."""

    name: str
    command: str
    argv: tuple[str, ...]  # {} is the folder of the case
    again: tuple[str, ...]
    out: str

    def begin(self, folder: Path) -> list[str]:
        return [word.replace("{}", str(folder)) for word in self.argv]

    def resume(self, folder: Path) -> list[str]:
        return [word.replace("{}", str(folder)) for word in self.again]


def jobs(files: Path) -> dict[str, Job]:
    """The commands that are killed; files: a folder for what they read."""
    rows, questions = files / "rows.jsonl", files / "questions.jsonl"
    row = {"query": "home Balan", "documents": "Doc 1: Balan lives in Osham.", "answer": "Osham"}
    lines = [row | {"question": f"home {i}?", "quality": ("useful", "noisy")[i % 2]} for i in range(24)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [
        {"question": f"home {name}?", "answer": "Osham"} for name in ["Balan", "Firin", "Locorp", "Perode"]
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in asked))
    train = "--steps 3 --questions 2 --group 2 --eval-questions 2 --sft-steps 2 --save-every 1 --eval-every 2"
    train += " --eval-few 2 --keep 2 --show-every 9 --out {}/run"
    sft = f"sft --sim tiny --rows {rows} --steps 4 --every 1 --tokens 128 --held 2 --seed 3 --out {{}}/run"
    collect = (
        "collect --policy tiny --data toy --search toy --limit 12 --rows 40 --force-search --judge answer"
    )
    collect += " --out {}/rows.jsonl"
    ask = f"--policy tiny --data {questions} --search none --json {{}}/result.json --episode-tokens 300"
    ask += " --prompt-tokens 128 --policy-prompt short"
    made = [
        Job("train", "train", (*train.split(), *SHORT), ("--out", "{}/run", "--resume"), "run"),
        _again("sft", "simulator", sft.split(), "run"),
        _again("collect", "simulator", [*collect.split(), *SHORT], "rows.jsonl"),
        _again("eval", "eval", [*ask.split(), *SHORT], "result.json"),
    ]
    return {job.name: job for job in made}


def _again(name: str, command: str, argv: list[str], out: str) -> Job:
    return Job(name, command, tuple(argv), (*argv, "--resume"), out)


# ----------------------------------------------------------------------------------------------- what is left


def plain(value: object) -> object:
    """JSON without what depends on the clock and the place."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in CLOCK | PLACE}
    return [plain(v) for v in value] if isinstance(value, list) else value


def left(folder: Path) -> dict[str, object]:
    """Every file below a folder, by its name, as it is compared: all of it, temporary files included."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, data = str(path.relative_to(folder)), path.read_bytes()
        if path.name == "state.safetensors":
            tensors, facts = load_state(path)
            data = {k: (t.dtype, t.shape, t.numpy().tobytes()) for k, t in tensors.items()}, plain(facts)
        elif path.suffix in (".jsonl", ".episodes", ".part"):
            data = [plain(json.loads(line)) for line in data.decode().splitlines()]
            data = (
                sorted(data, key=json.dumps) if path.suffix == ".episodes" else data
            )  # in order of their ends
        elif path.suffix == ".json":
            data = plain(json.loads(data))
        out[name] = data
    return out


def different(a: dict[str, object], b: dict[str, object]) -> list[str]:
    """The names of the files that differ."""
    return sorted(
        name for name in a.keys() | b.keys() if name not in a or name not in b or a[name] != b[name]
    )


# -------------------------------------------------------------------------------------------------- the cases


class Bench:
    """Runs cases of one nursery. whole: what an uninterrupted run of a job leaves."""

    def __init__(self, nursery: Nursery, folder: Path):
        self.nursery, self.folder = nursery, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.jobs, self._whole = jobs(folder), {}

    def whole(self, job: Job) -> tuple[dict[str, object], list[str], float]:
        """What it leaves, the calls that changed the disk, in order, and the seconds that it took."""
        if job.name not in self._whole:
            home, listing = self.folder / f"whole-{job.name}", self.folder / f"calls-{job.name}"
            shutil.rmtree(home, ignore_errors=True), listing.unlink(missing_ok=True)
            home.mkdir()
            began, log = time.monotonic(), self.folder / f"log-{job.name}"
            fault = {"root": str(home), "how": COUNT, "listing": str(listing)}
            child = self.nursery.run(job.command, job.begin(home), log, **fault)
            assert child.code == 0, child.said
            calls = listing.read_text().splitlines() if listing.exists() else []
            self._whole[job.name] = left(home), calls, time.monotonic() - began
        return self._whole[job.name]

    def to_the_end(self, job: Job, home: Path, log: Path) -> str:
        """Resume a job that was killed -> "" if it ended as an uninterrupted one, else what is wrong."""
        child = self.nursery.run(job.command, job.resume(home), log)
        nothing = ("does not exist", "no unfinished run", "nothing to resume")
        if child.code == 2 and any(words in child.said for words in nothing):
            if not self.wrong(job, home):
                return ""  # killed when all was done
            child = self.nursery.run(job.command, job.begin(home), log)  # killed before anything was there
        return f"exit code {child.code}: {child.said[-600:]}" if child.code else self.wrong(job, home)

    def wrong(self, job: Job, home: Path) -> str:
        """The files that are not as an uninterrupted run leaves them."""
        wrong = different(left(home), self.whole(job)[0])
        return f"other than uninterrupted: {', '.join(wrong)}" if wrong else ""

    def at_call(self, job: Job, n: int, how: int) -> str:
        """Killed at the n-th change of the disk, and resumed."""
        home, log = self.folder / "case", self.folder / "log"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        child = self.nursery.run(job.command, job.begin(home), log, root=str(home), at=n, how=how)
        if child.code != -9:
            return f"was not killed at call {n}: exit code {child.code}: {child.said[-300:]}"
        return lost(job, home) or self.to_the_end(job, home, log)

    def refused(self, job: Job, n: int, how: int, error: int) -> str:
        """The disk refuses the n-th change (and, if FULL, all that follow), but not the resume."""
        home, log = self.folder / "case", self.folder / "log"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        fault = {"root": str(home), "at": n, "how": how, "error": error}
        child = self.nursery.run(job.command, job.begin(home), log, **fault)
        if wrong := told(child):
            return wrong
        if parts := [str(path) for path in home.rglob("*tmp*")]:
            return f"left {', '.join(parts)}"
        return self.to_the_end(job, home, log)

    def at_instants(self, job: Job, seed: str, kills: int) -> tuple[int, str]:
        """One run, killed after random times until it was hit `kills` times or has ended -> kills, what is
        wrong."""
        home, log, rng, hit = self.folder / "case", self.folder / "log", random.Random(seed), 0
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        _, _, seconds = self.whole(job)
        argv = job.begin(home)
        for _ in range(20 * kills):
            if hit == kills:
                break
            child = self.nursery.start(job.command, argv, log)
            time.sleep(rng.uniform(0.0, seconds))
            child.kill()
            if child.wait() == 0:
                argv = job.resume(home)  # it had ended: resuming a finished run is a case as well
                break
            if child.code == 2:  # nothing was there to resume
                argv = job.begin(home)
                continue
            hit += 1
            if wrong := lost(job, home):
                return hit, wrong
            argv = job.resume(home)
        return hit, self.to_the_end(job, home, log) if child.code else self.wrong(job, home)


def told(child: Child) -> str:
    """What is wrong with how a command ended that had to: one line that begins with "error:", exit code 2."""
    lines = [line for line in child.said.splitlines() if line.startswith(("error: ", "Traceback"))]
    if child.code != 2 or len(lines) != 1 or "Traceback" in child.said or "Exception ignored" in child.said:
        return f"exit code {child.code}: {child.said[-900:]}"
    return ""


def lost(job: Job, home: Path) -> str:
    """What is wrong if a killed training lost more than the step in hand. (It saves every step.)"""
    log, state = home / "run/log.jsonl", home / "run/state.safetensors"
    if job.name != "train" or not state.exists():
        return ""
    done = log.read_bytes().count(b"\n") if log.exists() else 0
    step = load_state(state)[1]["step"]
    return "" if done - 1 <= step <= max(done, step) else f"{done} steps in the log, {step} in the state"
