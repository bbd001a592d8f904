"""Commands as children of one warm interpreter: torch is imported once, and every run is a fork of it.

    nursery = Nursery(tmp)                                # starts the interpreter, with shim.c loaded
    child = nursery.start("train", ["--out", ...], log)   # runs in the background: child.kill(), child.wait()
    child = nursery.start("train", [...], log, at=17, how=KILL)   # dies at the 17th change of the disk

The body is a random one, rewards are a function of the sampled ids (every step learns), audits are skipped.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COUNT, KILL, KILL_HALF, FULL, ONCE, GONE = range(6)  # see shim.c


def compiled(folder: Path) -> Path | None:
    """shim.c as a library; None where there is no compiler for it (or no Linux)."""
    cc = shutil.which("cc") or shutil.which("gcc")
    if cc is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([cc, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@dataclass
class Child:
    """A forked run. code: its exit code, negative for a signal, once it has ended; late: `wait` ended it."""

    nursery: "Nursery"
    pid: int
    log: Path
    code: int | None = None
    late: bool = False

    def kill(self, sig: int = signal.SIGKILL) -> None:
        os.kill(self.pid, sig)

    def wait(self, seconds: float = 3600.0) -> int:
        """Its exit code; it is killed if it is still busy after so many seconds."""
        if self.code is None:
            timer = threading.Timer(seconds, self._end)
            timer.start()
            self.code = self.nursery.ask({"wait": self.pid})
            timer.cancel()
        return self.code

    def _end(self) -> None:
        self.late = True
        self.kill()

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")


class Nursery:
    """A warm interpreter, and its children."""

    def __init__(self, folder: Path):
        library = compiled(folder)
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        env |= {"LD_PRELOAD": str(library)} if library else {}
        self.preloaded = library is not None
        command = [sys.executable, "-m", "tests.faults.nursery", str(folder)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.body = Path(self.process.stdout.readline().strip())

    def ask(self, wish: dict) -> int:
        self.process.stdin.write(json.dumps(wish) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, command: str, argv: list, log: Path, **fault) -> Child:
        """command: train, simulator, eval, soak or fuzz. fault: see `armed`; staged: names of staged.py."""
        argv = [str(x) for x in argv]
        return Child(self, self.ask({"command": command, "argv": argv, "log": str(log), **fault}), log)

    def run(self, command: str, argv: list, log: Path, **fault) -> Child:
        child = self.start(command, argv, log, **fault)
        child.wait()
        return child

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ------------------------------------------------------------------------------------ in the warm interpreter


def armed(wish: dict) -> None:
    """Arm the shim in this process: root, how, at (the n-th change), error (an errno), listing (a file)."""
    import ctypes

    if "root" in wish:
        ctypes.CDLL(None).fault_arm(
            wish["root"].encode(), wish.get("how", COUNT), ctypes.c_long(wish.get("at", 0)),
            wish.get("error", 5), wish.get("listing", "").encode(),
        )  # fmt: skip


def judge(a, trajectories):
    """Rewards that differ from episode to episode."""
    import torch

    return torch.tensor([(sum(t.ids) % 97) / 97 for t in trajectories]).view(-1, a.group)


def child(wish: dict) -> None:
    """Run one command as its command line would, to the end of this process."""
    handle = os.open(wish["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1), os.dup2(handle, 2)
    os.setpgid(0, 0)
    sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
    import importlib

    from cli import screen

    module = {"simulator": "prepare.command", "soak": "tests.faults.endurance", "fuzz": "tests.faults.fuzz"}
    main = importlib.import_module(module.get(wish["command"], wish["command"])).main
    for name in wish.get("staged", ()):
        getattr(importlib.import_module("tests.faults.staged"), name)()
    armed(wish)
    code = 0
    try:
        screen.run(lambda: main(wish["argv"]))
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def serve(folder: Path) -> None:
    """Fork a child for each wish on stdin, and answer its number; or wait for one, and answer its end."""
    import torch
    from transformers import AutoTokenizer  # noqa: F401

    import eval as _  # noqa: F401
    import prepare.cold
    import prepare.command
    import train
    import weights
    from tests.conftest import random_body
    from toy.make import BODY
    from toy.task import Task

    torch.set_num_threads(1)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    folder = folder / "body"
    if not (folder / "model.safetensors").exists():
        random_body(folder, BODY | small, 0, 0.1)
    weights.PRESETS["tiny"] = str(folder)
    train.judge = judge
    Task.audit = lambda self, write: {}
    prepare.command.audited = lambda a, exam, s, when: {}
    from tokenizer import Tokenizer

    Tokenizer.load(folder), weights.load(folder)  # these import a lot, and so does the first optimiser
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    print(folder, flush=True)
    for line in sys.stdin:
        wish = json.loads(line)
        if "wait" in wish:
            print(os.waitstatus_to_exitcode(os.waitpid(wish["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if not pid:
            child(wish)
        print(pid, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
