"""What each ingredient does: a grid of variants x seeds, each an ordinary run of train.py, and a table.

    python -m bench.ablate curriculum                     5 seeds, as many runs at once as there are cores
    python -m bench.ablate algorithms --seeds 3 --write   --write puts the table into ABLATIONS.md
    python -m bench.ablate kl --flags "--steps 32"        flags for every run

The first variant of a grid is the baseline. A cell is the mean over seeds with its 95 % interval (t); the
last column is the paired difference to the baseline: same seed, same world, same questions, same simulator.
To add an ablation, add a line to `GRIDS`. Interrupted, it goes on when it is called again.

Not a search for the best flags: a variant that wins here has been tried in one small world.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

from cli import screen
from cli.disk import read_json
from cli.parser import NEEDED, Flag, parse, with_defaults
from compat import DEFECTS
from recipes import RECIPES

from .__main__ import about, put

ROOT = Path(__file__).resolve().parent.parent
# fmt: off
GRIDS: dict[str, dict[str, str]] = {  # grid -> variant -> flags of train.py; the first is the baseline
    "curriculum": {
        "0 to .5": "", "its mean": "--noise-shape constant", "reverse": "--noise-shape reverse",
        "none": "--noise-end 0", "constant .5": "--noise-start .5",
    },
    "simulator": {"fine-tuned": "", "prompted": "--sft-steps 0", "self": "--sim self"},
    "documents": {"masked": "", "trained on": "--compat documents"},
    "reward": {"f1": ""} | {reward: f"--reward {reward}" for reward in ("em", "cover-em")},
    "algorithms": {"grpo": ""} | {name: f"--algorithm {name}" for name in RECIPES if name != "grpo"},
    "compat": {"clean": "--algorithm reinforce"}
        | {name: f"--algorithm reinforce --compat {name}" for name in (*DEFECTS, "zerosearch")},
    "group": {"8": ""} | {str(n): f"--group {n} --questions {128 // n}" for n in (2, 4, 16)},
    "coins": {"of each sibling": "", "shared": "--shared-coins"},
    "kl": {".001": "", "0": "--kl 0", ".01": "--kl .01"},
    "rank": {"16": ""} | {str(n): f"--rank {n}" for n in (1, 4, 64)},
    "collapse": {"2 updates": "--updates 2", "guard": "--updates 2 --guard .1",
                 "strata": "--updates 2 --strata .5"},
}
FLAGS = {
    "what is run": [
        Flag("grid", str, NEEDED, f"one of {', '.join(GRIDS)}", "GRID", bare=True),
        Flag("seeds", int, 5, "0, 1, ...", least=2),
        Flag("flags", str, "", "of train.py, for all runs", "FLAGS"),
        Flag("jobs", int, os.cpu_count(), "runs at a time"),
        Flag("out", str, "runs/ablations", "directory of the runs", "DIR"),
        Flag("write", bool, False, "put the table into --file"),
        Flag("file", str, "ABLATIONS.md", "what --write writes to", "FILE"),
    ],
}
TUNING = ["--steps", "1", "--questions", "1", "--eval-questions", "0"]  # and the task's fine-tuning
COLUMNS = {  # of result.json
    "F1 sampled": ("after", "f1"), "greedy": ("after_greedy", "f1"), "engine noise .3": ("after_noise", "f1"),
    "1 hop": ("after", "by_hop", "1", "f1"), "2 hops": ("after", "by_hop", "2", "f1"),
    "searches": ("after", "searches"),
}
T = [0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's, 97.5 %, by degrees of freedom
# fmt: on


def interval(x: list[float]) -> tuple[float, float]:
    """The mean of a sample, and half its 95 % interval."""
    n = len(x)
    t = T[n - 1] if n <= len(T) else 1.96 + 2.5 / (n - 1)
    return mean(x), t * stdev(x) / n**0.5


def shares(flags: str) -> bool:
    """Whether runs with these flags can share a fine-tuned simulator: they say nothing of one."""
    return "--sim" not in flags and "--sft" not in flags


def runs_of(a: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """Directory and flags of every run of a grid."""
    home, out = Path(a.out), []
    for variant, flags in GRIDS[a.grid].items():
        flags = f"{a.flags} {flags}"
        for seed in map(str, range(a.seeds)):
            adapter = ["--sim-adapter", str(home / "simulators" / seed / "simulator")]
            mine = [*shlex.split(flags), "--seed", seed, *(adapter if shares(flags) else ())]
            out.append((home / a.grid / re.sub(r"[^\w.+-]+", "-", variant) / seed, mine))
    return out


def simulators_of(a: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """The runs that only fine-tune a simulator, one a seed, which all variants that leave it alone share."""
    tune = [*shlex.split(a.flags), *TUNING]
    if not any(shares(f"{a.flags} {flags}") for flags in GRIDS[a.grid].values()):
        return []
    return [(Path(a.out, "simulators", str(n)), [*tune, "--seed", str(n)]) for n in range(a.seeds)]


def go(runs: list[tuple[Path, list[str]]], jobs: int, label: str) -> None:
    """Bring runs to their ends, `jobs` at a time; those that ended are left alone, those that were cut go on.
    Raises ValueError where any failed, with its last line."""
    waiting = [run for run in runs if not (run[0] / "result.json").exists()]
    running: dict[subprocess.Popen, Path] = {}
    failed, done = [], len(runs) - len(waiting)
    try:
        with screen.bar(label, len(runs), "runs", done) as bar:
            while waiting or running:
                while waiting and len(running) < jobs:
                    out, flags = waiting.pop(0)
                    out.parent.mkdir(parents=True, exist_ok=True)
                    command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(out)]
                    command += ["--resume"] if (out / "args.json").exists() else []
                    with open(f"{out}.log", "a", encoding="utf-8") as log:
                        process = subprocess.Popen(command, stdout=log, stderr=log)
                    running[process] = out
                time.sleep(0.1)
                for process in [p for p in running if p.poll() is not None]:
                    out = running.pop(process)
                    failed += [out] if process.returncode else []
                    done += 1
                    screen.move(bar, done, str(out))
    finally:
        for process in running:
            process.terminate()  # it saves its state
            process.wait()
    if failed:
        last = Path(f"{failed[0]}.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise ValueError(f"{len(failed)} runs failed; {failed[0]}: {' '.join(last)}")


def figure(result: dict, path: tuple[str, ...]) -> float | None:
    for name in path:
        result = (result or {}).get(name)
    return result


def table(a: argparse.Namespace) -> str:
    """The grid's results as Markdown."""
    results: dict[str, list[dict]] = {}
    for (out, _), variant in zip(runs_of(a), (v for v in GRIDS[a.grid] for _ in range(a.seeds))):
        results.setdefault(variant, []).append(read_json(out / "result.json", "a run"))
    base = results[next(iter(GRIDS[a.grid]))]
    lines = [["variant", "flags", *COLUMNS, "F1, paired difference"], ["---"] * (len(COLUMNS) + 3)]
    for variant, mine in results.items():
        cells = [variant, f"`{GRIDS[a.grid][variant]}`" if GRIDS[a.grid][variant] else ""]
        for path in COLUMNS.values():
            values = [figure(result, path) for result in mine]
            cells.append("" if None in values else "{:.3f} ± {:.3f}".format(*interval(values)))
        pairs = [(figure(x, ("after", "f1")), figure(y, ("after", "f1"))) for x, y in zip(mine, base)]
        known = variant != next(iter(results)) and not any(None in pair for pair in pairs)
        cells.append("{:+.3f} ± {:.3f}".format(*interval([x - y for x, y in pairs])) if known else "")
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(argv: list[str] | None = None) -> None:
    """Run a grid to its end and show its table."""
    a = with_defaults(FLAGS, parse(__doc__, FLAGS, argv))
    if a.grid not in GRIDS:
        raise ValueError(f"no grid {a.grid}: there are {', '.join(GRIDS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    go(simulators_of(a), a.jobs, "simulators")
    go(runs_of(a), a.jobs, a.grid)
    command = f"python -m bench.ablate {a.grid} --seeds {a.seeds}" + (
        f' --flags "{a.flags}"' if a.flags else ""
    )
    text = f"`{command}`, {about()}.\n\n{table(a)}"
    print(text)
    if a.write:
        file = Path(a.file)
        old = file.read_text(encoding="utf-8") if file.exists() else "# Ablations\n"
        file.write_text(put(old, a.grid, text), encoding="utf-8")


if __name__ == "__main__":
    screen.run(main)
