"""One HTML file in which a run can be looked at: curves, scores before and after, flags, and episodes.

    python look.py runs/mine                      -> runs/mine/look.html
    python look.py runs/mine runs/other           several runs over each other
    python look.py a.json b.json                  evaluations (eval.py --json), and their comparison
    python look.py docs/seed0 docs/shuffled --picture docs/picture.svg       README's picture

A run may still be going on. The file needs no network and no other file; its layout and script are in
look.html.jinja. Of a run's episodes it shows those that evaluation/kept.py keeps.

Not a dashboard: nothing is watched and nothing is served.
"""

import cli  # noqa: F401, I001 (first: it says that torch is being loaded)
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from cli import screen
from cli.disk import read_json, readable, whole
from cli.parser import NEEDED, Flag, parse, with_defaults
from evaluation import report
from evaluation.health import alarm
from evaluation.kept import SCORES, outcome

LIMIT = 2_700_000  # characters of episodes on a page
DRAWS = 2_000  # resamples of an interval
FILES = FileSystemLoader(Path(__file__).parent)
TEMPLATES = Environment(loader=FILES, autoescape=True, trim_blocks=True, lstrip_blocks=True)
FLAGS = {
    "what is shown": [
        Flag("runs", str, NEEDED, "directories of runs, files of eval.py --json", "RUN", many="+", bare=True),
        Flag("out", str, "", "the page (look.html in the first run's directory, or beside its file)", "FILE"),
        Flag("picture", str, "", "instead: an SVG of rewards and of one episode's mask", "FILE"),
    ]
}
CHARTS = {  # title -> what it means, the figures in it: the first one solid, the second dashed
    "Reward": ("mean of the episodes of training", "reward"),
    "Held-out F1": ("through a real engine; dashed: --eval-every, greedy", "held", "held_f1"),
    "Exact match": ("share of episodes", "em"),
    "Searches": ("an episode", "searches"),
    "No answer": ("share of episodes", "unanswered"),
    "Noise": ("share of searches with noisy documents", "noise"),
    "KL": ("to the policy as it started, nats a token", "kl"),
    "Entropy": ("nats a token", "entropy"),
    "Gap": ("|log-prob in training - when sampled|", "gap"),
    "Gradient norm": ("before clipping", "grad_norm"),
    "Tokens a second": ("sampled, of policy and simulator", "tokens_per_second"),
    "Seconds a step": ("to act; dashed: to learn", "seconds_act", "seconds_learn"),
}


class Run(NamedTuple):
    """What is on disk of a run, or of an evaluation."""

    name: str
    flags: dict
    log: list[dict]  # rows of log.jsonl
    kept: list[dict]  # rows of episodes.jsonl, with what they are called: "when"
    table: list[dict]  # scores


def rows_of(path: Path) -> list[dict]:
    """The whole lines of a file of JSON lines that may be being written. Raises ValueError."""
    data = path.read_bytes() if path.exists() else b""
    try:
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON lines ({e})") from None


def read_run(path: Path) -> Run:
    """A run's directory. Raises ValueError where it is none."""
    flags = read_json(path / "args.json", "the directory of a run", settled=dict)["settled"]
    log, kept = rows_of(path / "log.jsonl"), rows_of(path / "episodes.jsonl")
    for row in kept:
        held = "held-out, after" if row["step"] else "held-out, before"
        row["when"] = held if "held" in row else f"step {row['step']}"
    return Run(str(path), flags, log, kept, held_out([row["held"] for row in kept if "held" in row]))


def read_evaluation(path: Path) -> Run:
    """A file of eval.py --json. Raises ValueError where it is none."""
    data, kept, table = read_json(path, "that of eval.py --json", flags=dict, questions=list), [], []
    for row in data["questions"]:
        e = {k: row[k] for k in ("answer", "end", "f1")} | {"outcome": outcome(row)}
        e["searches"] = [[query, None] for query in row["queries"]]
        group = {"question": row["question"], "golds": row["golden_answers"], "episodes": [e]}
        kept.append({"when": row["set"], "groups": [group]})
    for name, part in data.get("sets", {}).items():
        ends = part.get("intervals", {})
        table.append(
            {"set": name, **{k: (v, ends.get(k)) for k, v in part.items() if not isinstance(v, dict)}}
        )
    return Run(str(path), data["flags"], [], kept, table)


def sure(values: Sequence[float]) -> tuple[float, list[float] | None]:
    """A mean and its 95 % interval, as evaluation/report.py has them."""
    return mean(values), *report.interval(report.resampled(np.array(values)[:, None], 0, DRAWS))


def held_out(parts: list[dict[str, list]]) -> list[dict]:
    """The table of scores before and after training, a row for each way to ask; parts: "held" of `kept`."""
    out = []
    for way in parts[0] if parts else ():
        both = dict(zip(("before", "after"), ([dict(zip(SCORES, r)) for r in part[way]] for part in parts)))
        out.append({"asked": way, "n": len(both["before"])})
        for score in ("f1", "em", "searches"):
            out[-1] |= {f"{score} {when}": sure([r[score] for r in rows]) for when, rows in both.items()}
        if "after" in both:
            out[-1]["change of f1"] = sure([y["f1"] - x["f1"] for x, y in zip(both["before"], both["after"])])
    return out


# ----------------------------------------------------------------------------------------------------- curves

Line = tuple[str, list[tuple[float, float]], int, bool]  # name, points, number of the colour, dashed


def lines(runs: Sequence[Run], figures: Sequence[str]) -> list[Line]:
    """The lines of a chart."""
    out = []
    for number, run in enumerate(runs):
        rows = list(run.log)
        for step, name in ((0, "f1 before"), (run.flags.get("steps"), "f1 after")):
            rows += [{"step": step, "held": row[name][0]} for row in run.table[:1] if name in row]
        for figure in figures:
            points = [(row["step"], row[figure]) for row in rows if row.get(figure) is not None]
            out += [(run.name, points, number, figure != figures[0])] if points else []
    return out


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    """Round numbers, about n of them, from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / n))
    step = next(size * m for m in (1, 2, 5, 10) if span / (size * m) <= n)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def chart(drawn: Sequence[Line], width: int = 300, height: int = 150) -> Markup:
    """Lines as an SVG; its classes (c0 ... c5, line, dashed, axis) are for the page to style."""
    left, right, top, bottom = 44, width - 8, 8, height - 20
    ys = [y for _, points, *_ in drawn for _, y in points]
    ys, last = ticks(min(0.0, *ys), max(ys)), max(2, *(points[-1][0] for _, points, *_ in drawn))

    def place(x: float, y: float) -> tuple[float, float]:
        up = (bottom - top) * (y - ys[0]) / (ys[-1] - ys[0])
        return round(left + (right - left) * x / last, 1), round(bottom - up, 1)

    out = []
    for y in ys:
        at, label = place(0, y)[1], f"{y / 1000:g}k" if abs(y) >= 1000 else f"{y:.3g}"
        out.append(f'<path class="axis" d="M{left} {at}H{right}"/>')
        out.append(f'<text x="{left - 6}" y="{at + 3.5}" text-anchor="end">{label}</text>')
    for x in (x for x in ticks(0, last) if x <= last):
        out.append(f'<text x="{place(x, 0)[0]}" y="{height - 5}" text-anchor="middle">{x:g}</text>')
    for name, points, number, dashed in drawn:
        d = "L".join("{} {}".format(*place(*point)) for point in points) + "h0"  # a single point shows
        kind = f"line c{number % 6}{' dashed' * dashed}"
        out.append(f'<path class="{kind}" data-name="{escape(name)}" d="M{d}"/>')
    head = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return Markup(f"<svg {head}>{''.join(out)}</svg>")


def picture(runs: Sequence[Run], columns: int = 46) -> str:
    """README's picture: rewards, and the mask of an episode that needed two searches and answered right."""
    told = [e | {"hops": g["hops"]} for row in runs[0].kept for g in row["groups"] for e in g["episodes"]]
    if not told:
        raise ValueError(f"{runs[0].name} has kept no episode")
    episode = max(told, key=lambda e: (e["outcome"] == "right" and len(e["searches"]) == 2, e["hops"]))
    kinds = [part % 2 for part, length in enumerate(episode["runs"]) for _ in range(length)]
    rows, room = [[]], columns  # of (sampled?, text)
    for piece, sampled in zip(episode["pieces"], kinds):
        for k, text in enumerate(piece.split("\n")):
            if k or len(text) > room:
                rows, room = [*rows, []], columns
            rows[-1].append((sampled, text))
            room -= len(text)
    rewards = chart(lines(runs, ["reward"]), 420, 250)
    return TEMPLATES.get_template("look.svg.jinja").render(chart=rewards, runs=runs, rows=rows)


# --------------------------------------------------------------------------------------------------- the page


def story(run: Run) -> list[str]:
    """Whether a run learnt, where it fails, what it was, and what to look out for."""
    f, told = run.flags, []
    for row in [row for row in run.table[:1] if "change of f1" in row]:
        change, ends = row["change of f1"]
        low, high = ends or (change, change)
        verdict = "It learnt" if low > 0 else "It got worse" if high < 0 else "It learnt nothing that shows"
        f1, searches = ([row[f"{s} {when}"][0] for when in ("before", "after")] for s in ("f1", "searches"))
        told.append(f"{verdict}: held-out F1 {f1[0]:.3f} before, {f1[1]:.3f} after, {change:+.3f}")
        told[0] += f" (95 % interval {low:+.3f} to {high:+.3f})" if ends else ""
        told[0] += f"; searches {searches[0]:.2f} to {searches[1]:.2f} ({row['asked']}, n = {row['n']})."
    if f["shuffle_rewards"]:
        told.append("A control: rewards were shuffled among siblings, so that they teach nothing.")
    for row in run.kept[-1:]:
        ends = Counter(row["outcomes"])
        bad = ", ".join(f"{count} {name}" for name, count in ends.most_common() if name != "right")
        right = f"{ends['right']} of {ends.total()} episodes ({row['when']}) are right"
        told.append(f"Where it fails: {right}; {bad or 'none fails'}.")
    spent = sum(row["seconds_act"] + row["seconds_learn"] for row in run.log)
    told.append(f"{len(run.log)} of {f['steps']} steps of {f['questions']} x {f['group']} episodes in ")
    told[-1] += f"{spent:,.0f} s on {f['device']}: policy {f['policy']}, simulator {f['sim']}, "
    told[-1] += f"{f['algorithm']}, seed {f['seed']}."
    return told + [f"Look out: {worse}." for worse in [alarm(run.log)] if worse]


def episodes(runs: Sequence[Run]) -> tuple[list[dict], str]:
    """Questions with all their episodes, as they are on disk, and how many they are, in words."""
    asked: dict[tuple, dict] = {}
    for run in runs:
        for row in run.kept:
            for g in row["groups"]:
                q = asked.setdefault((g["question"], *g["golds"]), g | {"episodes": []})
                q["episodes"] += [e | {"run": run.name, "when": row["when"]} for e in g["episodes"]]
    nth = math.ceil(len(json.dumps(list(asked.values()))) / LIMIT)
    shown = list(asked.values())[::nth]
    told = f"On this page: {sum(len(q['episodes']) for q in shown):,} episodes of {len(shown):,} questions"
    return shown, told + f", one in {nth} of those that were kept, as a page has a limit" * (nth > 1)


def cell(value: object) -> str:
    """A table's value as text; a mean and its interval in two lines."""
    if isinstance(value, tuple):
        return "\n".join(cell(part) for part in value if part is not None)
    return "{:.3f}\u00a0to\u00a0{:.3f}".format(*value) if isinstance(value, list) else screen.cell(value)


def page(runs: Sequence[Run], compare: dict[str, dict]) -> str:
    """The HTML."""
    questions, kept = episodes(runs)
    keys = dict.fromkeys(key for run in runs for key, value in run.flags.items() if value not in ("", None))
    flags = [{"flag": key} | {run.name: str(run.flags.get(key)) for run in runs} for key in keys]
    return TEMPLATES.get_template("look.html.jinja").render(
        runs=runs,
        story=story,
        charts=[(k, note, chart(some)) for k, (note, *of) in CHARTS.items() if (some := lines(runs, of))],
        compare=[{"score": name} | row | {"p": f"{row['p']:.4f}"} for name, row in compare.items()],
        flags=sorted(flags, key=lambda row: -len(set(row.values()))),  # those that differ first
        cell=cell,
        kept=kept,
        data=Markup(json.dumps(questions, separators=(",", ":")).replace("<", "\\u003c")),
    )


def main(argv: list[str] | None = None) -> None:
    """Read, draw, write."""
    a = with_defaults(FLAGS, parse(__doc__, FLAGS, argv))
    paths = [Path(name) for name in a.runs]
    with screen.waiting(f"drawing {', '.join(a.runs)}"), readable(", ".join(a.runs)):
        runs = [read_run(path) if path.is_dir() else read_evaluation(path) for path in paths]
        compare = report.compare(*a.runs) if [path.is_dir() for path in paths] == [False, False] else {}
        text = picture(runs) if a.picture else page(runs, compare)
    usual = paths[0] / "look.html" if paths[0].is_dir() else paths[0].with_suffix(".html")
    out = Path(a.picture or a.out or usual)
    with whole(out) as part:
        part.write_text(text, encoding="utf-8", errors="replace")
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    screen.run(main)
