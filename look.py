"""One HTML file in which a run can be looked at: curves, scores before and after, flags, and episodes.

    python look.py runs/mine                      -> runs/mine/look.html
    python look.py runs/mine runs/other           several runs over each other
    python look.py a.json b.json                  evaluations (eval.py --json), and their comparison
    python look.py docs/seed0 docs/shuffled --picture docs/picture.svg       README's picture

A run may still be going on. The file needs no network and no other file. Of a run's episodes it shows those
that evaluation/kept.py keeps. Layout and script are in look.html.jinja.

Not a dashboard: nothing is watched and nothing is served.
"""

import cli  # noqa: F401, I001 (first: it says that torch is being loaded)
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean as mean

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from cli import screen
from cli.disk import read_json, whole
from cli.parser import NEEDED, Flag, parse, with_defaults
from evaluation import report
from evaluation.health import alarm
from evaluation.kept import OUTCOMES, SCORES, outcome

LIMIT = 2_500_000  # bytes of episodes on a page
DRAWS = 2_000  # resamples of an interval
MOVES = {"reward": "reward", "searches": "searches", "noise": "share of noisy searches"}  # told in words
SHOWN = ("f1", "em", "searches")  # of SCORES, in the table
# fmt: off
FLAGS = {"what is shown": [
    Flag("runs", str, NEEDED, "directories of runs, files of eval.py --json", "RUN", many="+", bare=True),
    Flag("out", str, "", "the page (look.html in the first run's directory, or beside its file)", "FILE"),
    Flag("picture", str, "", "instead: an SVG of rewards and of one episode's mask", "FILE"),
]}
# fmt: on
CURVES = {  # figure -> title, what it means
    "reward": ("Reward", "mean; the curriculum makes documents worse"),
    "held": ("Held-out F1", "before and after, real engine; dashed: other ways to ask, --eval-every"),
    "em": ("Exact match", "share of episodes"),
    "searches": ("Searches", "an episode"),
    "unanswered": ("No answer", "share of episodes"),
    "noise": ("Noise", "share of searches with noisy documents"),
    "hit": ("Documents with the answer", "share of useful ones; dashed: of noisy ones"),
    "length": ("Length", "tokens of an episode, documents included"),
    "kl": ("KL", "to the body without adapter, nats a token"),
    "entropy": ("Entropy", "nats a token"),
    "gap": ("Gap", "mean |log-prob in training - when sampled|"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "flat": ("Groups that teach nothing", "share: all siblings had the same reward"),
    "tokens_per_second": ("Tokens a second", "sampled, of policy and simulator"),
    "seconds": ("Seconds a step", "to act; dashed: to learn"),
}
PARTS = {"hit": ("useful", "noisy"), "seconds": ("seconds_act", "seconds_learn")}  # lines of one chart


@dataclass(eq=False)
class Run:
    """What is on disk of a run. kept: step -> its row of episodes.jsonl; seconds: None while it goes on."""

    name: str
    flags: dict
    given: dict
    log: list[dict]
    kept: dict[int, dict]
    seconds: float | None

    def held(self, after: bool) -> dict[str, list[dict]]:
        """Scores of the held-out questions before or after training, by way."""
        ways = self.kept.get(self.flags["steps"] + 1 if after else 0, {}).get("held", {})
        return {way: [dict(zip(SCORES, row)) for row in rows] for way, rows in ways.items()}


def rows_of(path: Path) -> list[dict]:
    """The whole lines of a file of JSON lines that may be being written. Raises ValueError."""
    data = path.read_bytes() if path.exists() else b""
    try:
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    except ValueError as e:
        raise ValueError(f"{path} is not JSON lines ({e})") from None


def read(path: Path, name: str) -> Run:
    """A run's directory. Raises ValueError where it is none."""
    what, result = "the directory of a run", path / "result.json"
    args = read_json(path / "args.json", what, settled=dict, given=dict)
    seconds = read_json(result, what, seconds=float)["seconds"] if result.exists() else None
    kept = {row["step"]: row for row in rows_of(path / "episodes.jsonl")}
    return Run(name, args["settled"], args["given"], rows_of(path / "log.jsonl"), kept, seconds)


# ----------------------------------------------------------------------------------------------------- curves


def value(row: dict, key: str) -> float | None:
    """A figure of a step's row of the log; None where it has none."""
    return row["simulator"].get(key, {}).get("answer") if key in PARTS["hit"] else row.get(key)


Line = tuple[str, list[tuple[float, float]], int, bool]  # name, points, number of the colour, dashed


def lines(runs: Sequence[Run], key: str) -> list[Line]:
    """The lines of a chart."""
    out = []
    for i, run in enumerate(runs):
        ends = {0: run.held(False), run.flags["steps"]: run.held(True)}
        for k, part in enumerate((PARTS | {"held": (*ends[0], "held_f1")}).get(key, (key,))):
            points = [(row["step"], y) for row in run.log if (y := value(row, part)) is not None]
            if key == "held" and part in ends[0]:
                points = [(x, mean(row["f1"] for row in ways[part])) for x, ways in ends.items() if ways]
            name = run.name if part == key else f"{run.name}, {part}"
            out += [(name, points, i, k > 0)] if points else []
    return out


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    """Round numbers, about n of them, from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / n))
    step = next(size * m for m in (1, 2, 5, 10) if span / (size * m) <= n)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def chart(drawn: Sequence[Line], width: int = 300, height: int = 150) -> Markup:
    """Lines as an SVG. Points are in data-points, for the script that follows the mouse."""
    left, right, top, bottom = 44, 8, 8, 20
    values = [y for _, points, *_ in drawn for _, y in points]
    ys = ticks(min(0.0, *values), max(values))
    last = max(2, *(points[-1][0] for _, points, *_ in drawn))

    def place(x: float, y: float) -> tuple[float, float]:
        up = (height - top - bottom) * (y - ys[0]) / (ys[-1] - ys[0])
        return round(left + (width - left - right) * x / last, 1), round(height - bottom - up, 1)

    out = []
    for y in ys:
        at, label = place(0, y)[1], f"{y / 1000:g}k" if abs(y) >= 1000 else f"{y:.3g}"
        out.append(f'<path class="grid" d="M{left} {at}H{width - right}"/>')
        out.append(f'<text x="{left - 6}" y="{at + 3.5}" text-anchor="end">{label}</text>')
    for x in (x for x in ticks(0, last) if x <= last):
        out.append(f'<text x="{place(x, 0)[0]}" y="{height - 5}" text-anchor="middle">{x:g}</text>')
    for name, points, number, dashed in drawn:
        places, colour = [place(*p) for p in points], f"c{number % 6}"
        data = json.dumps([[x, float(f"{y:.4g}")] for x, y in points])
        out.append(f'<path class="line {colour}{" dashed" * dashed}" data-name="{escape(name)}"')
        out.append(f' data-points="{data}" d="M{"L".join(f"{x} {y}" for x, y in places)}"/>')
        if len(points) < 3:
            out += [f'<circle class="{colour}" cx="{x}" cy="{y}" r="3"/>' for x, y in places]
    head = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" data-last="{last}"'
    return Markup(f'<svg {head} data-left="{left}" data-right="{right}">{"".join(out)}</svg>')


def picture(runs: Sequence[Run], columns: int = 46) -> str:
    """README's picture: rewards, and the mask of an episode that needed two searches and answered right."""
    told = [(g["hops"], e) for row in runs[0].kept.values() for g in row["groups"] for e in g["episodes"]]
    right = [(h, e) for h, e in told if e["outcome"] == OUTCOMES[0] and len(e["searches"]) == 2]
    if not told:
        raise ValueError(f"{runs[0].name} has kept no episode")
    _, episode = max(right or told, key=lambda pair: pair[0])
    kinds = [part % 2 for part, length in enumerate(episode["runs"]) for _ in range(length)]
    words, x, y = [], 0, 0  # (sampled?, column, row, text)
    for piece, sampled in zip(episode["pieces"], kinds):
        for k, text in enumerate(piece.split("\n")):
            x, y = (0, y + 1) if k or x + len(text) > columns else (x, y)
            words += [(sampled, x, y, text)] if text else []
            x += len(text)
    drawn = chart(lines(runs, "reward"), 420, 250)
    return template("look.svg.jinja").render(chart=drawn, runs=runs, words=words)


# --------------------------------------------------------------------------------------------- what happened


def sure(rows: list[list[float]]) -> list[tuple[float, list[float] | None]]:
    """The mean of each column and its 95 % interval, as evaluation/report.py has them."""
    values = np.array(rows)
    return list(zip(values.mean(0).tolist(), report.interval(report.resampled(values, 0, DRAWS))))


@cache
def compared(run: Run) -> list[dict]:
    """The table: a line for each way to ask, of all held-out questions and of those of so many hops."""
    out, (before, after) = [], (run.held(False), run.held(True))
    for way, rows in before.items():
        for hops in (0, *sorted({r["hops"] for r in rows} - {0})):
            both = [[r for r in part if hops in (0, r["hops"])] for part in (rows, after.get(way, ()))]
            scores = zip(*(sure([[r[s] for s in SHOWN] for r in part]) for part in both if part))
            out.append(
                {"run": run.name, "way": way, "hops": hops, "n": len(both[0]), **dict(zip(SHOWN, scores))}
            )
            if change := [[y["f1"] - x["f1"]] for x, y in zip(*both)]:
                p = report.p_value(np.array(change)[:, 0], 0, DRAWS)
                out[-1] |= {"change": sure(change)[0], "p": p}
    return out


def story(run: Run) -> list[str]:
    """Whether a run learnt, where it fails, what happened, and what to look out for, in sentences."""
    f, n, part = run.flags, len(run.log), max(1, len(run.log) // 8)
    told = ["Whether it learnt is not known: no held-out questions were asked before and after training."]
    for line in (line for line in compared(run)[:1] if "p" in line):
        luck, (d, ends) = line["p"] >= 0.05, line["change"]
        verdict = "It learnt nothing that shows" if luck else "It learnt" if d > 0 else "It got worse"
        f1, searches = ([score for score, _ in line[s]] for s in ("f1", "searches"))
        told = [f"{verdict}: held-out F1 {f1[0]:.3f} before, {f1[1]:.3f} after, {d:+.3f}"]
        told[0] += ", within its error" * luck
        told[0] += f" (95 % interval {ends[0]:+.3f} to {ends[1]:+.3f})" if ends else ""
        told[0] += f"; searches {searches[0]:.2f} to {searches[1]:.2f} ({line['way']}, n = {line['n']})."
    if f["shuffle_rewards"]:
        told.append("A control: rewards were shuffled among siblings, so that they teach nothing.")
    for step in list(run.kept)[-1:]:
        when, ends = {0: "before", f["steps"] + 1: "after"}.get(step), Counter(run.kept[step]["outcomes"])
        what = f"held-out questions {when} training" if when else f"episodes of step {step}"
        bad = ", ".join(f"{count} {name}" for name, count in ends.most_common() if name != OUTCOMES[0])
        right = f"{ends[OUTCOMES[0]]} of {ends.total()} {what} are right"
        told.append(f"Where it fails: {right}; {bad or 'none fails'}.")
    spent = "not finished" if run.seconds is None else f"{run.seconds:,.0f} s in all"
    told.append(
        f"{n} of {f['steps']} steps of {f['questions']} x {f['group']} episodes on {f['device']}, {spent}: "
    )
    told[-1] += f"policy {f['policy']}, simulator {f['sim']}, {f['algorithm']}, seed {f['seed']}."
    if not run.log:
        return [*told, "No step has ended yet."]
    first, last = run.log[:part], run.log[-part:]
    moves = [[mean(row[k] for row in rows) for rows in (first, last)] for k in MOVES]
    moves = ", ".join(f"{name} {x:.2f} to {y:.2f}" for name, (x, y) in zip(MOVES.values(), moves))
    best = max(run.log, key=lambda row: row["reward"])
    told.append(f"In training, from the first {part} steps to the last {part}: {moves}. The best step was ")
    told[-1] += f"{best['step']}, with a reward of {best['reward']:.3f}."
    gap = mean(row.get("gap", 0.0) for row in last)
    wrong = [f"sampling and training differ (gap {gap:.1e} nats)"] * (gap > 0.05) + [alarm(run.log)]
    return told + [f"Look out: {what}." for what in wrong if what]


# ----------------------------------------------------------------------------------------------- the episodes


def episodes(runs: Sequence[Run], evals: dict[str, dict]) -> tuple[dict, str]:
    """All kept groups for the script, and how many they are. Pieces of text are numbered.

    A group is a question at a step of training, or held out; where several runs have it, side by side.
    """
    numbers: dict[str, int] = {}
    groups: dict[tuple, dict] = {}

    def group(when: str, q: str, golds: list[str], hops: int) -> list[dict]:
        new = {"when": when, "q": q, "golds": golds, "hops": hops, "eps": []}
        return groups.setdefault((when, q), new)["eps"]

    for number, run in enumerate(runs):
        for step, row in sorted(run.kept.items()):
            when = {0: "before", run.flags["steps"] + 1: "after"}.get(step)
            for g in row["groups"]:
                eps = group("held-out" if when else f"step {step}", g["question"], g["golds"], g["hops"])
                eps += [short(e, numbers) | {"run": number, "when": when} for e in g["episodes"]]
    for number, data in enumerate(evals.values(), len(runs)):
        for row in data["questions"]:
            e = {"q": row["queries"], "a": row["answer"], "e": row["end"], "f": row["f1"], "run": number}
            e["o"] = OUTCOMES.index(outcome(row))
            group(row["set"], row["question"], row["golden_answers"], row["hops"]).append(e)
    every = math.ceil(len(json.dumps([*groups.values(), *numbers])) / LIMIT)
    shown = list(groups.values())[::every]
    told = f"On this page: {sum(len(g['eps']) for g in shown):,} episodes of {len(shown):,} questions"
    if every > 1:
        told += f" (one in {every} of the {len(groups):,} that were kept, as a page has a limit)"
    names = [*(run.name for run in runs), *evals]
    return {"groups": shown, "pieces": list(numbers), "runs": names, "outcomes": OUTCOMES}, told


def short(e: dict, numbers: dict[str, int]) -> dict:
    """An episode with numbers for its pieces of text; log-probs in hundredths, ratios in thousandths."""
    out = {"t": [numbers.setdefault(piece, len(numbers)) for piece in e["pieces"]], "r": e["runs"]}
    out |= {"l": [round(100 * x) for x in e["logps"]], "x": [round(1000 * x) for x in e["ratios"]]}
    out |= {"s": e["searches"], "a": e["answer"], "e": e["end"], "o": OUTCOMES.index(e["outcome"])}
    return out | {"f": e["f1"], "w": e.get("reward"), "adv": e.get("advantage")}


# --------------------------------------------------------------------------------------------------- the page


def template(name: str):
    """A template beside this file. What goes into it is escaped, unless it is `Markup` of ours."""
    files = FileSystemLoader(Path(__file__).resolve().parent)
    return Environment(loader=files, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(name)


def page(runs: Sequence[Run], evals: dict[str, dict], compare: dict | None) -> str:
    """The HTML."""
    data, kept = episodes(runs, evals)
    settled = [*(run.flags for run in runs), *(d["flags"] for d in evals.values())]
    hidden = ("command", "task", "planned", "resume")
    return template("look.html.jinja").render(
        runs=runs,
        names=data["runs"],
        stories=[(run, story(run)) for run in runs],
        charts=[(*CURVES[key], chart(some)) for key in CURVES if (some := lines(runs, key))],
        outcomes=OUTCOMES,
        table=[line for run in runs for line in compared(run)],
        sets=[(name, *part) for name, d in evals.items() for part in d.get("sets", {}).items()],
        compare=compare,
        flags={k: [some.get(k) for some in settled] for some in settled for k in some if k not in hidden},
        given={name for run in runs for name in run.given},
        kept=kept,
        data=Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
    )


def main(argv: list[str] | None = None) -> None:
    """Read, draw, write."""
    a = with_defaults(FLAGS, parse(__doc__, FLAGS, argv))
    paths = [Path(name) for name in a.runs]
    short = len({p.resolve().name for p in paths}) == len(paths)
    named = {p: p.resolve().name if short else str(p) for p in paths}
    runs = [read(p, named[p]) for p in paths if p.is_dir()]
    files = [p for p in paths if not p.is_dir()]
    evals = {named[p]: read_json(p, "that of eval.py --json", flags=dict, questions=list) for p in files}
    compare = report.compare(*map(str, files)) if len(files) == 2 else None
    with screen.waiting(f"drawing {', '.join(named.values())}"):
        text = picture(runs) if a.picture else page(runs, evals, compare)
    usual = paths[0] / "look.html" if paths[0].is_dir() else paths[0].with_suffix(".html")
    out = Path(a.picture or a.out or usual)
    with whole(out) as part:
        part.write_text(text, encoding="utf-8", errors="replace")
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    screen.run(main)
