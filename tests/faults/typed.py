"""Hostile inputs on the real command line: a process of its own, as a user starts it, and how it ends.

    python -m tests.faults --long --only typed

The inputs are those of fuzz.py that were refused there: here the whole command has to say so in one line. Not
all of them: a process imports torch anew.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cli.screen import CONTROL

from . import fuzz
from .fuzz import ROOT, TARGETS, Damage

SECONDS = 300  # of the clock, on a busy machine
ASK = "--data toy --search toy --limit 1 --turns 1 --turn-tokens 4"
# format -> the command that reads it; {} is the input, {out} a place that may be written
READ_BY = {
    "questions": "eval.py --policy tiny --data {} --search none --policy-prompt short",
    "parquet": "train.py --policy tiny --data {} --out {out}",
    "corpus": "search.py index {} --out {out}",
    "indexes": "search.py {} who wrote the novel Emma",
    "rows": "simulator.py sft --sim tiny --rows {} --out {out}",
    "traces": "-m prepare.cold --policy tiny --traces {} --out {out}",
    "prompts": f"eval.py --policy tiny {ASK} --policy-prompt {{}}",
    "config": f"eval.py --policy {{}} {ASK}",
    "weights_of_a_body": "simulator.py write --sim {} --query a --question b --answer c",
    "adapters": f"eval.py --policy {{body}} --adapter {{}} {ASK}",
    "tokenizers": f"eval.py --policy {{}} {ASK}",
    "templates": f"eval.py --policy {{}} {ASK}",
    "args": "train.py --out {} --resume",
    "kept_rows": f"eval.py --policy tiny {ASK} --json {{out}} --resume",
    "looked_at": "look.py {} --out {out}",
    "results": "eval.py --compare {} {}",
    "commands": "",
}
SCRIPTS = {"cold": "-m prepare.cold", "train": "train.py", "eval": "eval.py"}
SCRIPTS |= {"simulator": "simulator.py", "search": "search.py"}
# What libraries print themselves, before any error: not ours to word.
FOREIGN = re.compile(r"\[transformers\]|Ignored unknown kwarg|.*Warning: |  \w")


def refused(name: str, start: int) -> int:
    """The first input of a format, from a number on, that its reader refuses."""
    while next(fuzz.fuzzed(name, start, 1))[1] != "refused":
        start += 1
    return start


def typed(name: str, i: int, must: bool = False) -> str:
    """Start the command that reads the i-th input of a format: "" where it ended as it should. must: it has
    to be refused."""
    folder, out = (Path(tempfile.mkdtemp(prefix="typed")) for _ in range(2))
    try:
        given = TARGETS[name].make(Damage(f"{name} {i}"), folder)
        if name == "commands":
            words = [*SCRIPTS[given[0]].split(), *(word.replace("\0", "") for word in given[1])]
        else:
            words = READ_BY[name].split()
            if name == "kept_rows":
                shutil.copy(given, f"{out}/r.json.part")
            if name == "prompts" and given.name == "sim.json":
                words = [
                    "train.py",
                    "--steps",
                    "1",
                    "--sft-steps",
                    "0",
                    "--sim-prompt",
                    "{}",
                    "--out",
                    "{out}",
                ]
            places = {"{}": str(given), "{out}": f"{out}/r.json", "{body}": str(fuzz.body())}
            words = [places.get(word, word) for word in words]
        return ended(words, out, must)
    finally:
        shutil.rmtree(folder), shutil.rmtree(out)


def ended(words: list[str], out: Path, must: bool) -> str:
    """Run a command -> what is wrong with its end: anything but exit code 2 and one line, or 0."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    try:
        run = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=env,
            capture_output=True,
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"took more than {SECONDS} s: {words}"
    said = run.stderr.decode("utf-8", "replace")
    lines = [line for line in said.splitlines() if line.strip() and not FOREIGN.match(line)]
    if run.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > 12:
        left = [path for path in out.rglob("*") if not path.name.endswith((".part", "run"))]
        steered = CONTROL.search(lines[0])
        return f"steers the terminal: {lines[0]!r}" if steered else f"left {left}" if left else ""
    if run.returncode == 0 and "Traceback" not in said and not must:
        return ""
    return f"exit code {run.returncode}, {len(lines)} lines: {said[-500:]} {words}"


def cases(folder: Path, each: int = 15) -> Iterator[tuple[str, Callable[[], tuple[int, list[str]]]]]:
    """So many refused inputs of every format, three at a time, each as its command's own process."""
    fuzz.warm()
    for start in range(0, each, 3):
        for name in READ_BY:

            def batch(name: str, i: int) -> tuple[int, list[str]]:
                wrong = []
                for _ in range(3):
                    i = refused(name, i)
                    if said := typed(name, i):
                        wrong.append(f"{name} {i}: {said}")
                    i += 1
                return 3, wrong

            yield f"{name} {start}", partial(batch, name, 100_000 + 1000 * start)
