"""One HTML file in which a run can be looked at: curves, the table before and after, flags, and episodes.

    python look.py runs/mine                      -> runs/mine/look.html
    python look.py runs/mine runs/other           the same of several runs, over each other
    python look.py a.json b.json                  evaluations (eval.py --json), and their comparison
    python look.py runs/mine runs/control --picture picture.svg      README's picture

A run may still be going on. The file needs no network and no other file. Runs keep part of their episodes
(evaluation/kept.py); the page says which part. Layout and script are in look.html.jinja.

Not a dashboard: nothing is watched and nothing is served.
"""

import cli  # noqa: F401, I001 (first: it says that torch is being loaded)
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from cli import screen
from cli.disk import read_json, whole
from cli.parser import NEEDED, Flag, parse, with_defaults
from evaluation import report
from evaluation.kept import OUTCOMES, SCORES, outcome

LIMIT = 2_500_000  # bytes of episodes on a page
FLAGS = {
    "what is shown": [
        Flag("runs", str, NEEDED, "directories of runs, files of eval.py --json", "RUN", many="+", bare=True),
        Flag("out", str, "", "the page (look.html in the first run's directory, or beside its file)", "FILE"),
        Flag("picture", str, "", "instead: an SVG of rewards and one episode's mask", "FILE"),
    ]
}
# key of the log -> title, what it means
CURVES = {
    "reward": ("Reward", "mean of the step's episodes, on documents that the curriculum makes worse"),
    "held": ("Held-out F1", "before and after, real engine; dashed: the other ways to ask"),
    "em": ("Exact match", "share of episodes"),
    "searches": ("Searches", "an episode"),
    "unanswered": ("No answer", "share of episodes that end without one"),
    "noise": ("Noise", "share of searches that got noisy documents"),
    "hit": ("Documents with the answer", "share of useful documents; dashed: of noisy ones"),
    "length": ("Length", "tokens of an episode, documents included"),
    "kl": ("KL", "to the body without an adapter, nats a token"),
    "entropy": ("Entropy", "nats a token"),
    "gap": ("Gap", "mean |log-prob in training - in sampling|: 0, or something is wrong"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "skipped_groups": ("Skipped groups", "siblings all had the same reward: nothing to learn from"),
    "tokens_per_second": ("Tokens a second", "sampled, of policy and simulator"),
    "seconds_act": ("Seconds to act", "a step"),
    "seconds_learn": ("Seconds to learn", "a step"),
}


@dataclass
class Run:
    """What is on disk of a run. kept: step -> its row of episodes.jsonl."""

    name: str
    flags: dict
    given: dict
    log: list[dict]
    kept: dict[int, dict]
    result: dict

    @property
    def steps(self) -> int:
        return self.flags["steps"]

    def held(self, step: int) -> dict[str, list[dict]]:
        """Scores of the held-out questions before (0) or after (steps + 1), by way."""
        ways = self.kept.get(step, {}).get("held", {})
        return {way: [dict(zip(SCORES, row)) for row in rows] for way, rows in ways.items()}


def rows_of(path: Path) -> list[dict]:
    """The whole lines of a file of JSON lines that somebody may be writing. Raises ValueError."""
    data = path.read_bytes() if path.exists() else b""
    try:
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    except ValueError as e:
        raise ValueError(f"{path} is not JSON lines ({e})") from None


def read(path: Path, name: str) -> Run:
    """A run's directory. Raises ValueError where it is none."""
    kept = read_json(path / "args.json", "the directory of a run", settled=dict)
    result = read_json(path / "result.json", "a run") if (path / "result.json").exists() else {}
    log, episodes = rows_of(path / "log.jsonl"), rows_of(path / "episodes.jsonl")
    return Run(name, kept["settled"], kept["given"], log, {row["step"]: row for row in episodes}, result)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names that tell paths apart."""
    for parts in range(1, 1 + max(len(p.parts) for p in paths)):
        names = ["/".join(p.parts[-parts:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same run is named twice")


# ----------------------------------------------------------------------------------------------------- curves


def value(row: dict, key: str) -> float | None:
    """A figure of a step's row of the log, or one made from it; None where it has none."""
    if key == "unanswered":
        return 1 - row["ends"].get("answer", 0) / sum(row["ends"].values())
    if key in ("useful", "noisy"):
        return row["simulator"].get(key, {}).get("answer")
    return row.get(key)


Line = tuple[str, list[float], list[float], int, bool]  # name, steps, values, colour, dashed


def lines(runs: Sequence[Run], key: str) -> list[Line]:
    """The lines of a chart."""
    if key == "held":
        ends = [(i, run, run.held(0), run.held(run.steps + 1)) for i, run in enumerate(runs)]
        return [
            (f"{run.name}, {way}", [0, run.steps][: len(both)], both, i, k > 0)
            for i, run, before, after in ends
            for k, way in enumerate(before)
            if (both := [float(np.mean([r["f1"] for r in part[way]])) for part in (before, after) if part])
        ]
    out = []
    for i, run in enumerate(runs):
        for k, name in enumerate(("useful", "noisy") if key == "hit" else (key,)):
            points = [(r["step"], y) for r in run.log if (y := value(r, name)) is not None]
            label = f"{run.name}, {name}" if key == "hit" else run.name
            out += [(label, [x for x, _ in points], [y for _, y in points], i, k > 0)] if points else []
    return out


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    """Round numbers, about n of them, from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / n))
    step = next(size * m for m in (1, 2, 5, 10) if span / (size * m) <= n)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def brief(y: float) -> str:
    """A number for an axis."""
    return f"{y / 1000:g}k" if abs(y) >= 1000 else f"{y:.3g}"


def chart(drawn: Sequence[Line], width: int = 300, height: int = 150, least: float = 0.0) -> Markup:
    """Lines as an SVG. Points are in data-points, for the script that follows the mouse."""
    left, right, top, bottom = 44, 8, 8, 20
    ys = ticks(min(least, *(min(y) for _, _, y, *_ in drawn)), max(max(y) for _, _, y, *_ in drawn))
    last = max(2, *(x[-1] for _, x, *_ in drawn))

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (width - left - right) * x / last
        up = height - bottom - (height - top - bottom) * (y - ys[0]) / (ys[-1] - ys[0])
        return round(across, 1), round(up, 1)

    out = []
    for y in ys:
        at = place(0, y)[1]
        line = '<path class="grid" d="M{} {}H{}"/><text x="{}" y="{}" text-anchor="end">{}</text>'
        out.append(Markup(line).format(left, at, width - right, left - 6, at + 3.5, brief(y)))
    for x in (x for x in ticks(0, last) if x <= last):
        mark = '<text x="{}" y="{}" text-anchor="middle">{:g}</text>'
        out.append(Markup(mark).format(place(x, 0)[0], height - 5, x))
    for name, xs, values, colour, dashed in drawn:
        points = [place(x, y) for x, y in zip(xs, values)]
        path, style = "M" + "L".join(f"{x} {y}" for x, y in points), " dashed" if dashed else ""
        data = json.dumps([[x, float(f"{y:.4g}")] for x, y in zip(xs, values)])
        line = '<path class="line c{}{}" d="{}" data-name="{}" data-points="{}"/>'
        out.append(Markup(line).format(colour % 6, style, path, name, data))
        if len(points) < 3:
            dot = Markup('<circle class="c{}" cx="{}" cy="{}" r="3"/>')
            out += [dot.format(colour % 6, *point) for point in points]
    size = Markup('viewBox="0 0 {0} {1}" width="{0}" height="{1}"').format(width, height)
    head = '<svg {} data-last="{}" data-left="{}" data-right="{}">{}</svg>'
    return Markup(head).format(size, last, left, right, Markup("").join(out))


def bands(run: Run, width: int = 640, height: int = 170) -> Markup:
    """How episodes went: a stacked bar for the held-out questions before, each step, and those after."""
    named = {0: "held-out, before", run.steps + 1: "held-out, after"}
    rows = [(named.get(n, f"step {n}"), row["outcomes"]) for n, row in sorted(run.kept.items())]
    bar = '<rect class="o{}" x="{:.1f}" y="{:.1f}" width="{:.2f}" height="{:.1f}"><title>{}</title></rect>'
    out, wide = [], width / max(1, len(rows))
    for i, (label, counts) in enumerate(rows):
        y, total = 0.0, sum(counts.values()) or 1
        for k, name in enumerate(OUTCOMES):
            tall = height * counts.get(name, 0) / total
            told = f"{label}: {counts.get(name, 0)} of {total} {name}"
            out.append(Markup(bar).format(k, i * wide, y, wide - min(1.5, wide / 8), tall, told))
            y += tall
    head = '<svg viewBox="0 0 {} {}" preserveAspectRatio="none" style="height: {}px">{}</svg>'
    return Markup(head).format(width, height, height, Markup("").join(out))


def picture(runs: Sequence[Run], columns: int = 46) -> str:
    """README's picture: rewards, and the mask of one episode that searched and answered right."""
    told = [(g, e) for _, row in sorted(runs[0].kept.items()) for g in row["groups"] for e in g["episodes"]]
    right = [(g["hops"], e) for g, e in told if e["outcome"] == OUTCOMES[0] and len(e["searches"]) == 2]
    _, episode = max(right or [(0, e) for _, e in told], key=lambda pair: pair[0])
    kinds = [part % 2 for part, length in enumerate(episode["runs"]) for _ in range(length)]
    words, x, y = [], 0, 0  # (sampled?, column, row, text)
    for piece, sampled in zip(episode["pieces"], kinds):
        for k, text in enumerate(piece.split("\n")):
            x, y = (0, y + 1) if k or x + len(text) > columns else (x, y)
            words += [(sampled, x, y, text)] if text else []
            x += len(text)
    drawn = chart(lines(runs, "reward"), 420, 250)
    return environment().get_template("look.svg.jinja").render(chart=drawn, runs=runs, words=words)


# --------------------------------------------------------------------------------------------- what happened


def compared(run: Run) -> list[dict]:
    """Lines of the table: a way to ask, all questions or those of so many hops, before and after."""
    out, (before, after) = [], (run.held(0), run.held(run.steps + 1))
    for way, rows in before.items():
        for hops in (0, *sorted({r["hops"] for r in rows} - {0})):
            both = [[r for r in part.get(way, ()) if hops in (0, r["hops"])] for part in (before, after)]
            line = {"run": run.name, "way": way, "hops": hops, "n": len(both[0])}
            for when, part in zip(("before", "after"), both):
                line[when] = {s: sure(np.array([r[s] for r in part])) for s in ("f1", "em")} if part else None
                line[f"{when} searches"] = np.mean([r["searches"] for r in part]) if part else None
            if both[1]:
                change = np.array([y["f1"] - x["f1"] for x, y in zip(*both)])
                line |= {"change": sure(change), "p": report.p_value(change, 0)}
            out.append(line)
    return out


def sure(values: np.ndarray) -> tuple[float, list[float] | None]:
    """A mean (n,) and its 95 % interval, as evaluation/report.py has them."""
    return float(values.mean()), report.interval(report.resampled(values[:, None], 0, 2000))[0]


def story(run: Run) -> list[str]:
    """What happened in a run, where it fails, and what to look out for, in sentences."""
    f, n, part = run.flags, len(run.log), max(1, len(run.log) // 8)
    told = [
        f"{n} of {run.steps} steps of {f['questions']} questions and {f['group']} episodes a question; "
        f"policy {f['policy']}, simulator {f['sim']}, {f['algorithm']}, seed {f['seed']}, on {f['device']}; "
        + (f"{run.result['seconds']:,.0f} s in all." if run.result else "not finished.")
    ]
    if f["shuffle_rewards"]:
        told.append("A control: rewards were shuffled among siblings, so that they teach nothing.")
    table = compared(run)
    if table and table[0]["after"]:
        line, d = table[0], table[0]["change"]
        told.append(
            f"Held-out F1 ({line['way']}, {line['n']} questions) went from {line['before']['f1'][0]:.3f} to "
            f"{line['after']['f1'][0]:.3f}: {d[0]:+.3f}"
            + (f" (95 % interval {d[1][0]:+.3f} to {d[1][1]:+.3f})" if d[1] else "")
            + (", more than luck" if line["p"] < 0.05 else ", no more than luck may do")
            + f"; searches from {line['before searches']:.2f} to {line['after searches']:.2f}."
        )
    if not run.log:
        return [*told, "No step has ended yet."]

    def mean(key: str, rows: list[dict]) -> float:
        return float(np.mean([value(row, key) or 0.0 for row in rows]))

    first, last = run.log[:part], run.log[-part:]
    moves = [
        f"{what} {mean(key, first):.2f} to {mean(key, last):.2f}"
        for key, what in (
            ("reward", "reward"),
            ("searches", "searches"),
            ("noise", "share of noisy searches"),
        )
    ]
    best = max(run.log, key=lambda row: row["reward"])
    told.append(
        f"In training, from the first {part} steps to the last {part}: {', '.join(moves)}. "
        f"The best step was {best['step']}, with a reward of {best['reward']:.3f}."
    )
    if run.kept:
        end, row = max(run.kept.items())
        where = "held-out questions after training" if end > run.steps else f"episodes of step {end}"
        ends = Counter(row["outcomes"])
        bad = ", ".join(f"{count} {name}" for name, count in ends.most_common() if name != OUTCOMES[0])
        told.append(
            f"Where it fails: of {sum(ends.values())} {where}, {ends[OUTCOMES[0]]} are right; "
            f"{bad or 'none fails'}."
        )
    skipped = mean("skipped_groups", last) / f["questions"]
    checks = (
        (mean("unanswered", last) > 0.1, f"{mean('unanswered', last):.0%} of episodes end without an answer"),
        (mean("gap", last) > 0.05, f"sampling and training differ (gap {mean('gap', last):.1e} nats)"),
        (skipped > 0.5, f"{skipped:.0%} of groups are skipped, as their siblings have the same reward"),
        (mean("entropy", last) < 0.01, "siblings are nearly copies (entropy below 0.01 nats)"),
        (mean("grad_norm", last) > 3 * f["grad_clip"], "gradients are clipped to less than a third"),
    )
    return told + [f"Look out, at the end: {what}." for bad, what in checks if bad]


# --------------------------------------------------------------------------------------------------- episodes


def episodes(runs: Sequence[Run], evals: dict[str, dict]) -> tuple[dict, str]:
    """All kept groups for the script, and what share of them fits. Pieces of text are numbered.

    A group is a question at a step of training, or held out; where several runs have it, side by side.
    """
    numbers: dict[str, int] = {}
    groups: dict[tuple, dict] = {}

    def group(when: str, q: str, golds: list[str], hops: int) -> list[dict]:
        return groups.setdefault((when, q), {"when": when, "q": q, "golds": golds, "hops": hops, "eps": []})[
            "eps"
        ]

    for number, run in enumerate(runs):
        for step, row in sorted(run.kept.items()):
            when = {0: "before", run.steps + 1: "after"}.get(step)
            for g in row["groups"]:
                eps = group("held-out" if when else str(step), g["question"], g["golds"], g["hops"])
                eps += [short(e, numbers) | {"run": number, "when": when} for e in g["episodes"]]
    for number, data in enumerate(evals.values(), len(runs)):
        for row in data["questions"]:
            eps = group(row["set"], row["question"], row["golden_answers"], row["hops"])
            eps.append(
                {"q": row["queries"], "a": row["answer"], "e": row["end"], "f": row["f1"], "run": number}
                | {"o": OUTCOMES.index(outcome(row)), "found": row["found"]}
            )
    size = len(json.dumps([*groups.values(), *numbers]))
    every = math.ceil(size / LIMIT)
    shown = list(groups.values())[::every]
    told = f"On this page: {sum(len(g['eps']) for g in shown):,} episodes of {len(shown):,} questions"
    if every > 1:
        told += f" (one in {every} of the {len(groups):,} that were kept, as a page has a limit)"
    names = [*(run.name for run in runs), *evals]
    return {"groups": shown, "pieces": list(numbers), "runs": names, "outcomes": OUTCOMES}, told


def short(e: dict, numbers: dict[str, int]) -> dict:
    """An episode with numbers for its pieces of text; log-probs in hundredths, ratios in thousandths."""
    return {
        "t": [numbers.setdefault(piece, len(numbers)) for piece in e["pieces"]],
        "r": e["runs"],
        "l": [round(100 * x) for x in e["logps"]],
        "x": [round(1000 * x) for x in e.get("ratios", ())],
        **{"s": e["searches"], "a": e["answer"], "e": e["end"], "o": OUTCOMES.index(e["outcome"])},
        **{"f": e["f1"], "w": e.get("reward"), "adv": e.get("advantage")},
    }


# -------------------------------------------------------------------------------------------------- the files


def environment() -> Environment:
    """Templates beside this file; whatever goes into them is escaped, unless it is `Markup` of ours."""
    folder = Path(__file__).resolve().parent
    return Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def page(runs: Sequence[Run], evals: dict[str, dict], compare: dict | None) -> str:
    """The HTML."""
    data, kept = episodes(runs, evals)
    settled = [*(run.flags for run in runs), *(d["flags"] for d in evals.values())]
    hidden = ("command", "task", "planned", "resume")
    flags = {k: [some.get(k) for some in settled] for some in settled for k in some if k not in hidden}
    return (
        environment()
        .get_template("look.html.jinja")
        .render(
            runs=runs,
            names=data["runs"],
            stories=[(run, story(run)) for run in runs],
            charts=[(*CURVES[key], chart(some)) for key in CURVES if (some := lines(runs, key))],
            bands=[(run, bands(run)) for run in runs if run.kept],
            outcomes=OUTCOMES,
            table=[line for run in runs for line in compared(run)],
            sets=[(name, *part) for name, d in evals.items() for part in d.get("sets", {}).items()],
            compare=compare,
            flags=flags,
            given={name for run in runs for name in run.given},
            kept=kept,
            data=Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")),
        )
    )


def main(argv: list[str] | None = None) -> None:
    """Read, draw, write."""
    a = with_defaults(FLAGS, parse(__doc__, FLAGS, argv))
    paths = [Path(name) for name in a.runs]
    files = [p for p in paths if not p.is_dir()]
    named = dict(zip(paths, names_of([p.resolve() for p in paths])))
    runs = [read(p, named[p]) for p in paths if p.is_dir()]
    evals = {named[p]: read_json(p, "of eval.py --json", flags=dict, questions=list) for p in files}
    compare = report.compare(*map(str, files)) if len(files) == 2 else None
    text = picture(runs) if a.picture else page(runs, evals, compare)
    out = Path(
        a.picture or a.out or (paths[0] / "look.html" if paths[0].is_dir() else paths[0].with_suffix(".html"))
    )
    with whole(out) as part:
        part.write_text(text, encoding="utf-8", errors="replace")
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    screen.run(main)
