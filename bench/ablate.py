"""What each ingredient does: a grid of variants x seeds, each an ordinary run of train.py, and a table.

    python -m bench.ablate curriculum                     5 seeds, as many runs at once as there are cores
    python -m bench.ablate algorithms --seeds 3 --write   --write puts table and picture into ABLATIONS.md
    python -m bench.ablate kl --flags "--steps 64"        other flags for every run than the book's
    python -m bench.ablate kl --jobs 0                    only the table of what has been run

The first variant of a grid is the baseline. A cell is the mean over seeds with its 95 % interval (t); the
last columns are paired differences to the baseline: same seed, world, questions, simulator, machine and code.
To add an ablation, add a line to `GRIDS`. A run is known by its flags and seed: what has a row in --rows, of
whatever grid, is not run again, so that the book can be continued from a clone, or after an interruption.

Not a search for the best flags: a variant that wins here has been tried in one small world.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from statistics import mean, stdev

from markupsafe import Markup

from cli import screen
from cli.disk import Rows, read_json
from cli.flags import TRAIN
from cli.parser import NEEDED, Flag, parse, with_defaults
from compat import DEFECTS
from look import chart
from recipes import RECIPES

from .__main__ import about, put

ROOT = Path(__file__).resolve().parent.parent
BOOK = "--steps 24 --questions 8 --eval-questions 200 --micro-tokens 4096"  # most is gained in 20 steps
# fmt: off
GRIDS: dict[str, dict[str, str]] = {  # grid -> variant -> flags of train.py; the first is the baseline
    "curriculum": {
        "0 to .5": "", "its mean": "--noise-shape constant",
        "falling, its mean": "--noise-start .317 --noise-end 0", "reverse": "--noise-shape reverse",
        "none": "--noise-end 0", "constant .5": "--noise-start .5",
    },
    "simulator": {
        "fine-tuned": "", "prompted": "--sft-steps 0", "self": "--sim self", "real engine": "--sim real",
        "leaks": "--compat leak",
    },
    "documents": {"masked": "", "trained on": "--compat documents"},
    "reward": {"f1": ""} | {reward: f"--reward {reward}" for reward in ("em", "cover-em")},
    "algorithms": {"grpo": ""} | {name: f"--algorithm {name}" for name in RECIPES if name != "grpo"},
    "rates": {"grpo 4e-3": "--lr 4e-3"}
        | {f"{name} {lr}": f"--lr {lr}" + f" --algorithm {name}" * (name != "grpo")
           for lr in ("4e-3", "8e-3") for name in RECIPES if name not in ("gspo", "gmpo", "sapo", "cispo")}
        | {"grpo 2e-3": "", "grpo 2e-3, 2 updates": "--updates 2"},
    "compat": {"clean": "--algorithm reinforce"}
        | {name: f"--algorithm reinforce --compat {name}" for name in (*DEFECTS, "zerosearch")},
    "group": {"8": ""} | {str(n): f"--group {n} --questions {64 // n}" for n in (2, 4, 16)},
    "coins": {"of each sibling": "", "shared": "--shared-coins"},
    "kl": {".001": "", "0": "--kl 0", ".01": "--kl .01"},
    "rank": {"16": ""} | {str(n): f"--rank {n}" for n in (1, 4, 64)},
    "updates": {"1": ""} | {n: f"--updates {n}" for n in ("2", "4")},
    "collapse": {"2 updates": "--updates 2", "guard": "--updates 2 --guard .1",
                 "strata": "--updates 2 --strata .5"},
    "clips": {"grpo": "--updates 4"}  # with one update a rollout, every ratio is 1, and no clip acts
        | {name: f"--updates 4 --algorithm {name}" for name in ("dapo", "gspo", "gmpo", "sapo", "cispo")},
}
# With a body that seldom searches again, noise has more to teach. First:
#     python -m toy.make --again 300 --retries .02 --out runs/hasty
GRIDS["hasty"] = {k: f"{v} --data toy --policy runs/hasty".strip() for k, v in GRIDS["curriculum"].items()}
FLAGS = {
    "what is run": [
        Flag("grid", str, NEEDED, f"one of {', '.join(GRIDS)}", "GRID", bare=True),
        Flag("seeds", int, 5, "how many, from --first on", least=2),
        Flag("first", int, 0, "the first seed", least=0),
        Flag("only", str, "", "run these variants of it, and the first (all)", "A,B"),
        Flag("flags", str, BOOK, "of train.py, for all runs", "FLAGS"),
        Flag("jobs", int, os.cpu_count(), "runs at a time (0: none, only the table)", least=0),
        Flag("out", str, "runs/ablations", "directory of the runs", "DIR"),
        Flag("rows", str, "docs/ablations.jsonl", "what is kept of them: a line a run", "FILE"),
        Flag("write", bool, False, "put table and picture into --file"),
        Flag("file", str, "ABLATIONS.md", "what --write writes to; pictures go to docs/ beside it", "FILE"),
    ],
}
TUNING = ["--steps", "1", "--questions", "1", "--eval-questions", "0", "--sft-steps", "250"]
COLUMNS = {  # of a row
    "F1 sampled": ("after", "f1"), "greedy": ("after_greedy", "f1"), "engine noise .3": ("after_noise", "f1"),
    "1 hop": ("after", "1"), "2 hops": ("after", "2"), "searches": ("after", "searches"),
}
CURVES = ("reward", "f1", "noise", "searches")  # of log.jsonl, kept step by step
PAIRED = ("F1 sampled", "engine noise .3")
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}"><style>
text {{ font: 11px system-ui, sans-serif; fill: #5f6b76; }} text[class] {{ fill: currentColor; }}
.c0 {{ color: #0072b2; }} .c1 {{ color: #d55e00; }} .line {{ fill: none; stroke: currentColor; }}
.line {{ stroke-width: 2; }} .axis {{ stroke: #dcdad2; }}
[data-name=band] {{ stroke: none; fill: currentColor; fill-opacity: .18; }}
</style><rect width="{0}" height="{1}" rx="8" fill="#fff"/>
"""
T = [0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's, 97.5 %, by degrees of freedom
# fmt: on
Run = tuple[Path, list[str], tuple[str, int]]  # directory, flags, key of its row


def interval(x: list[float]) -> tuple[float, float]:
    """The mean of a sample, and half its 95 % interval (0 for a sample of one)."""
    n = len(x)
    t = T[n - 1] if n <= len(T) else 1.96 + 2.5 / (n - 1)
    return mean(x), t * stdev(x) / n**0.5 if n > 1 else 0.0


# ---------------------------------------------------------------------------------------------------- running


def settled(flags: str, only: tuple[str, ...] = ()) -> str:
    """Flags of train.py in one spelling and order, the last of its kind; only: but for these, none."""
    given = parse("", TRAIN, shlex.split(flags)).items()
    some = sorted((k, v) for k, v in given if not only or k in only)
    return " ".join(f"--{k}" if v is True else f"--{k} {shlex.quote(str(v))}" for k, v in some)


def place(home: Path, flags: str, seed: int) -> Path:
    return home / (re.sub(r"[^\w.+]+", "-", flags).strip("-") or "defaults") / str(seed)


def shares(flags: str) -> bool:
    """Whether runs with these flags can share a fine-tuned simulator: they say nothing of one."""
    return "--sim" not in flags and "--sft" not in flags


def simulator_of(a: argparse.Namespace, flags: str, seed: int) -> Run:
    """The run that only fine-tunes a simulator, for all runs of a seed that leave it alone."""
    mine = settled(flags, ("policy", "data"))
    tune = [*shlex.split(mine), *TUNING, "--seed", str(seed)]
    return place(Path(a.out, "simulators"), mine, seed), tune, (mine, seed)


def runs_of(a: argparse.Namespace) -> dict[str, list[Run]]:
    """The runs of each variant of a grid, seed by seed."""
    out: dict[str, list[Run]] = {}
    for variant, more in GRIDS[a.grid].items():
        flags = settled(f"{a.flags} {more}")
        for seed in range(a.first, a.first + a.seeds):
            simulator = simulator_of(a, flags, seed)[0] / "simulator"
            adapter = ["--sim-adapter", str(simulator), "--no-audit"]
            mine = [*shlex.split(flags), "--seed", str(seed), *(adapter if shares(flags) else ())]
            out.setdefault(variant, []).append((place(Path(a.out), flags, seed), mine, (flags, seed)))
    return out


def go(runs: list[Run], jobs: int, label: str, ended: Callable[[Run], None] = lambda run: None) -> None:
    """Bring runs to their ends, `jobs` at a time, and call ended(run); those that ended are left alone, those
    that were cut go on. Raises ValueError where any failed, with its last line."""
    waiting = [run for run in runs if not (run[0] / "result.json").exists()]
    running: dict[subprocess.Popen, Run] = {}
    failed, done = [], len(runs) - len(waiting)
    for run in (run for run in runs if run not in waiting):
        ended(run)
    try:
        with screen.bar(label, len(runs), "runs", done) as bar:
            while waiting or running:
                while waiting and len(running) < jobs:
                    out, flags, _ = run = waiting.pop(0)
                    out.parent.mkdir(parents=True, exist_ok=True)
                    command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(out)]
                    command += ["--resume"] if (out / "args.json").exists() else []
                    with open(f"{out}.log", "a", encoding="utf-8") as log:
                        process = subprocess.Popen(command, stdout=log, stderr=log)
                    running[process] = run
                time.sleep(0.1)
                for process in [p for p in running if p.poll() is not None]:
                    out, *_ = run = running.pop(process)
                    if process.returncode:
                        failed.append(out)
                    else:
                        ended(run)
                    done += 1
                    screen.move(bar, done, str(out))
    finally:
        for process in running:
            process.terminate()  # it saves its state
            process.wait()
    if failed:
        last = Path(f"{failed[0]}.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise ValueError(f"{len(failed)} runs failed; {failed[0]}: {' '.join(last)}")


def commit() -> str:
    """The last commit of what is run, with "+" if files differ from it; "" outside of git."""
    asked = ("git log -1 --format=%h", "git diff --name-only HEAD")
    what = ["--", "*.py", ":!bench", ":!tests"]
    told = [subprocess.run([*x.split(), *what], cwd=ROOT, capture_output=True).stdout for x in asked]
    return told[0].decode().strip() + "+" * bool(told[1])


def row_of(run: Run) -> dict:
    """What is kept of a run: its figures before and after, and its curves."""
    out, _, (flags, seed) = run
    result = read_json(out / "result.json", "a run")
    row: dict = {"flags": flags, "seed": seed}
    for name, part in result.items():
        if name.startswith(("before", "after")):
            row[name] = {k: part[k] for k in ("f1", "em", "searches")}
            row[name] |= {hops: one["f1"] for hops, one in part["by_hop"].items()}
    log = Rows(out / "log.jsonl", resume=True).rows.values()
    row["curves"] = {name: [step[name] for step in log] for name in CURVES}
    row |= {"seconds": result["seconds"], "machine": about(), "commit": commit()}
    return json.loads(json.dumps(row), parse_float=lambda x: round(float(x), 4))


# ---------------------------------------------------------------------------------------------------- showing


def figure(row: dict, path: tuple[str, ...]) -> float | None:
    return reduce(lambda part, name: (part or {}).get(name), path, row)


def made_by(row: dict) -> tuple[str, str]:
    """The machine, without the date, and the code: a seed says little of others."""
    return row.get("machine", "").rpartition(";")[0], row.get("commit", "")


def shown(values: list[float | None], form: str) -> str:
    """The mean of those that are there, with its interval."""
    values = [x for x in values if x is not None]
    return f"{{:{form}}}{' ± {:.3f}' * (len(values) > 1)}".format(*interval(values)) if values else ""


def table(a: argparse.Namespace, results: dict[str, dict[int, dict]]) -> str:
    """The grid's results, {variant: {seed: row}}, as Markdown."""
    base = next(iter(results.values()))
    heads = ["variant", "flags", "seeds", *COLUMNS, *(f"{name}, paired difference" for name in PAIRED)]
    lines = [heads, ["---"] * len(heads)]
    for variant, mine in results.items():
        flags = GRIDS[a.grid][variant]
        cells = [variant, f"`{flags}`" if flags else "", str(len(mine))]
        cells += [shown([figure(row, path) for row in mine.values()], ".3f") for path in COLUMNS.values()]
        both = [(row, base[s]) for s, row in mine.items() if s in base and made_by(row) == made_by(base[s])]
        for path in (COLUMNS[name] for name in PAIRED if mine is not base):
            pairs = [(figure(row, path), figure(first, path)) for row, first in both]
            cells.append(shown([x - y for x, y in pairs if None not in (x, y)], "+.3f"))
        lines.append(cells + [""] * (len(heads) - len(cells)))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def curve(rows: list[dict], name: str = "f1", width: int = 5) -> list[tuple[int, float, float]]:
    """A learning curve, smoothed over `width` steps: step, mean over seeds, half its interval."""
    smooth = []
    for y in (row["curves"][name] for row in rows):
        smooth.append([mean(y[max(0, i - width // 2) : i + width // 2 + 1]) for i in range(len(y))])
    return [(step, *interval(list(at))) for step, at in enumerate(zip(*smooth), 1)]


def picture(results: dict[str, dict[int, dict]], columns: int = 4) -> str:
    """Learning curves with bands as an SVG: a panel for each variant, over the baseline's curve."""
    base, *others = results
    panels, wide, tall = Markup(""), 215, 150
    for i, variant in enumerate(others):
        lines = [("band", [(0, 0), (0, 1), (0, 0)], 0, False)]  # of no width: every panel goes from 0 to 1
        for colour, name in enumerate((base, variant)):
            points = curve(list(results[name].values()))
            band = [(x, min(1.0, y + half)) for x, y, half in points]
            band += [(x, max(0.0, y - half)) for x, y, half in reversed(points)]
            lines += [("band", band, colour, False), (name, [p[:2] for p in points], colour, False)]
        panel = Markup('<g transform="translate({} {})"><text class="c1" x="44" y="6">{}</text>{}</g>')
        at = wide * (i % columns), 24 + tall * (i // columns)
        panels += panel.format(*at, variant, chart(lines, wide, tall - 10))
    size = wide * min(columns, len(others)), 24 + tall * -(-len(others) // columns)
    head = Markup('<text class="c0" x="44" y="14">{} (in every panel)</text>').format(base)
    return f"{SVG.format(*size)}{head}{panels}</svg>\n"


def main(argv: list[str] | None = None) -> None:
    """Run what is missing of a grid, and show its table."""
    a = with_defaults(FLAGS, parse(__doc__, FLAGS, argv))
    if a.grid not in GRIDS:
        raise ValueError(f"no grid {a.grid}: there are {', '.join(GRIDS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = Rows(a.rows, resume=True, key=lambda row: (row["flags"], row["seed"]))
    runs = runs_of(a)
    some = [runs[v] for i, v in enumerate(runs) if not (i and a.only) or v in a.only.split(",")]
    missing = [run for seed in zip(*some) for run in seed if run[2] not in rows.rows]
    if a.jobs and missing:
        alone = {run[2]: simulator_of(a, *run[2]) for run in missing if shares(run[2][0])}
        go(list({run[2]: run for run in alone.values()}.values()), a.jobs, "simulators")
        go(missing, a.jobs, a.grid, lambda run: rows.add(row_of(run)))
    found = {v: {k[1]: rows.rows[k] for *_, k in mine if k in rows.rows} for v, mine in runs.items()}
    results = {variant: mine for variant, mine in found.items() if mine}
    if next(iter(runs)) not in results:
        raise ValueError(f"{a.rows} has no run of the first variant of {a.grid} with these flags")
    more = "" if a.flags == BOOK else f' --flags "{a.flags}"'
    told = {f"{x['machine']}, commit {x['commit']}" for mine in results.values() for x in mine.values()}
    more += f" --first {a.first}" if a.first else ""
    command = f"python -m bench.ablate {a.grid} --seeds {a.seeds}{more}"
    text = f"`{command}`; every run with `{a.flags}`; {'; '.join(sorted(told))}.\n\n{table(a, results)}"
    print(text)
    if a.write:
        file, image = Path(a.file), f"docs/ablations-{a.grid}.svg"
        (file.parent / "docs").mkdir(exist_ok=True)
        (file.parent / image).write_text(picture(results), encoding="utf-8")
        text += f"\n\n![F1 of the episodes of training, by step: mean of the seeds, 95 % interval]({image})"
        old = file.read_text(encoding="utf-8") if file.exists() else "# Ablations\n"
        file.write_text(put(old, a.grid, text), encoding="utf-8")


if __name__ == "__main__":
    screen.run(main)
