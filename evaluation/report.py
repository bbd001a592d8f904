"""Means of answered questions with confidence intervals, as tables, and two evaluations compared.

A *row* is one answered question, as eval.py writes it: {"set", "id", "question", "hops", "answer", "end",
"f1", "em", "cover_em", "searches", "found", "seconds", ...}. Everything here is made from rows.

Intervals are 95 % bootstrap percentiles over 10,000 resamples of a set's questions, from a fixed seed (Efron
and Tibshirani 1993, An Introduction to the Bootstrap). For the average of sets each set is resampled by
itself: the sets are fixed, the questions a sample. Where all questions score alike there is no interval, for
it would have no width. Two evaluations of the same questions are compared pair by pair, with a sign-flip test
(Fisher 1935, The Design of Experiments): a bootstrap interval is too narrow where few questions differ.

Not a claim about other questions, other seeds of training, or other words in the prompt.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import chain, product
from pathlib import Path

import numpy as np

from cli.disk import read_json
from cli.screen import table
from questions import SETS
from weights import PRESETS

SCORES = ("f1", "em", "cover_em")
MEANS = (*SCORES, "searches", "found")
DRAWS = 10_000
EXACT = 12  # questions that differ, up to which every pattern of signs is looked at: 4,096

# -------------------------------------------------------------------------------------------------- summaries


def check(row: dict) -> None:
    """Raise TypeError for a row that holds something else than an answered question."""
    numbers = [row[key] for key in (*MEANS, "seconds") if key != "found" or row[key] is not None]
    sound = isinstance(row["hops"], int) and isinstance(row["end"], str)
    if not sound or not all(isinstance(x, int | float) and 0 <= x < np.inf for x in numbers):
        raise TypeError("a score that is no number, or an end that is no word")


def means(rows: list[dict]) -> dict:
    """{"n", "f1", "em", "cover_em", "searches", "found"} of rows.

    "found": the share whose documents held a golden answer, yes/no questions (null) excluded, or None.
    """
    return {"n": len(rows)} | {key: _mean([row[key] for row in rows]) for key in MEANS}


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are not None; None where all are."""
    counted = [value for value in values if value is not None]
    return sum(counted) / len(counted) if counted else None


def summary(rows: list[dict]) -> dict:
    """`means` of all rows, with "ends": {cause: rows} and "by_hop": {"1": means, ...} of known hops."""
    hops = sorted({row["hops"] for row in rows} - {0})
    return {
        **means(rows),
        "ends": dict(Counter(row["end"] for row in rows).most_common()),
        "by_hop": {str(h): means([row for row in rows if row["hops"] == h]) for h in hops},
    }


def average(sets: dict[str, dict]) -> dict:
    """The unweighted mean of the sets' means, as in the paper's tables, without the None; "n" is the sum."""
    first, *others = parts = list(sets.values())
    names = [k for k, v in first.items() if v is None or isinstance(v, float)]
    shared = {k: _mean(part[k] for part in parts) for k in names}
    return {"n": sum(p["n"] for p in parts)} | shared if others else first


# ------------------------------------------------------------------------------------------------ uncertainty


def resampled(values: np.ndarray, stream: int, draws: int = DRAWS) -> np.ndarray:
    """Means of `draws` resamples, with replacement, of the rows of values (n, m) -> (draws, m).

    The same stream and n draw the same questions, so pairs stay pairs.
    """
    n, rng = len(values), np.random.default_rng([0, stream])
    return np.stack([values[rng.integers(n, size=n)].mean(0) for _ in range(draws)])


def interval(drawn: np.ndarray) -> list[list[float] | None]:
    """95 % interval [low, high] of each column of resampled means (draws, m); None without width."""
    ends = np.percentile(drawn, [2.5, 97.5], axis=0).T.tolist()
    return [[low, high] if high - low > 1e-9 else None for low, high in ends]  # less is rounding


def p_value(differences: np.ndarray, stream: int, draws: int = DRAWS) -> float:
    """Two-sided sign-flip test of weighted paired differences (n,): does their sum differ from 0 by luck?

    p is the share of sign patterns whose sum is at least as far from 0 as the observed one: of all 2^k where
    k <= EXACT questions differ; else of `draws` random ones and the observed, so that p is never 0 (Phipson
    and Smyth 2010).
    """
    differ = differences[differences != 0]
    if len(differ) <= EXACT:
        patterns = map(np.array, product((1, -1), repeat=len(differ)))
    else:
        rng = np.random.default_rng([0, stream])
        drawn = (1 - 2 * rng.integers(2, size=len(differ)) for _ in range(draws))
        patterns = chain([np.ones(len(differ))], drawn)
    sums = np.array([differ @ pattern for pattern in patterns])
    bar = abs(differ.sum()) - 1e-9 * np.abs(differ).sum()  # sums that are equal but for rounding count
    return float((np.abs(sums) >= bar).mean())


def by_set(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """set -> its rows, both in the order of the rows."""
    sets: dict[str, list[dict]] = {}
    for row in rows:
        sets.setdefault(row["set"], []).append(row)
    return sets


def figures(rows: list[dict], draws: int = DRAWS) -> dict:
    """The `average` of all sets and, under "sets", each one's `summary`.

    Both with "intervals": {"f1": [low, high] or None, "em": ..., "cover_em": ...} and "seconds" spent.
    """
    sets, drawn = {}, []
    for stream, (name, part) in enumerate(by_set(rows).items()):
        drawn.append(resampled(np.array([[row[s] for s in SCORES] for row in part]), stream, draws))
        spent = {"seconds": sum(row["seconds"] for row in part)}
        sets[name] = summary(part) | {"intervals": dict(zip(SCORES, interval(drawn[-1])))} | spent
    whole = {"intervals": dict(zip(SCORES, interval(np.mean(drawn, 0))))}
    return average(sets) | whole | {"seconds": sum(s["seconds"] for s in sets.values()), "sets": sets}


# -------------------------------------------------------------------------------------------- the paper's own

# cover_em in percent (the paper calls it EM) of policies trained with ZeroSearch, in the order of SETS; last
# the average. arXiv 2505.04588 v3.
TRAINED = {
    "Qwen/Qwen2.5-7B": (42.4, 66.4, 60.4, 32.0, 34.0, 18.0, 33.33, 40.93),
    "Qwen/Qwen2.5-7B-Instruct": (43.6, 65.2, 48.8, 34.6, 35.2, 18.4, 27.78, 39.08),
    "Qwen/Qwen2.5-3B": (43.0, 61.6, 41.4, 33.8, 34.6, 13.0, 13.89, 34.47),
    "Qwen/Qwen2.5-3B-Instruct": (41.4, 57.4, 44.8, 27.4, 30.0, 9.8, 11.11, 31.70),
    "meta-llama/Llama-3.2-3B": (43.4, 63.8, 48.4, 32.2, 35.6, 13.8, 15.28, 36.07),
    "meta-llama/Llama-3.2-3B-Instruct": (40.2, 58.0, 46.0, 22.8, 21.4, 10.4, 18.06, 30.98),
}
UNTRAINED = {"direct": 15.00, "cot": 14.69, "rag": 25.09}  # Qwen2.5-3B, the average of all sets
AVERAGE = "mean of sets"
PAPER = (
    "paper: its cover_em (which it calls EM) for this body, as an agent after its training; its own engine, "
)
PAPER += "500 questions and words (arXiv 2505.04588)"


def papers(policy: str, mode: str) -> dict[str, float]:
    """set -> the paper's cover_em, within 0..1, for this policy in this mode; empty where it has none.

    policy: a preset, a hub id, or a directory with the name of the hub's repository.
    """
    name = PRESETS.get(policy, policy)
    body = next((b for b in TRAINED if b == name or b.split("/")[1] == Path(name).name), "")
    if mode == "agent":
        return dict(zip([*SETS, AVERAGE], (figure / 100 for figure in TRAINED.get(body, ()))))
    return {AVERAGE: UNTRAINED[mode] / 100} if body.startswith("Qwen/Qwen2.5-3B") else {}


# ----------------------------------------------------------------------------------------------------- tables


def results(whole: dict, paper: dict[str, float]) -> str:
    """The table of `figures`: a line a set, a line a number of hops, the mean of sets if there are several.

    paper: set -> its figure there, for a column of its own; the average counts where all seven sets are here.
    """
    sets, lines = whole["sets"], {}
    if not sets.keys() >= SETS.keys():
        paper = {name: figure for name, figure in paper.items() if name in sets}
    for name, part in sets.items():
        lines[name] = _line(part, paper.get(name))
        lines |= {f"  {hops} hop": means for hops, means in part["by_hop"].items()}
    if len(sets) > 1:
        lines[AVERAGE] = _line(whole, paper.get(AVERAGE))
    notes = "(low-high): 95 % bootstrap interval over questions; (-): none, as all of them score alike\n"
    notes += (
        "found: share of questions whose golden answer is in the retrieved documents (yes/no ones excluded)"
    )
    return "\n".join([table(lines), notes, *([PAPER] if paper.keys() & lines.keys() else [])])


def _line(part: dict, paper: float | None) -> dict:
    scores = {s: f"{part[s]:.3f} {_between(part['intervals'][s])}" for s in SCORES}
    beside = {} if paper is None else {"paper": paper}
    rest = {key: part[key] for key in ("searches", "found")} | {"seconds": round(part["seconds"])}
    ends = ", ".join(f"{cause} {count}" for cause, count in part.get("ends", {}).items())
    return {"n": part["n"], **scores, **beside, **rest, "ends": ends}


def _between(ends: list[float] | None) -> str:
    return f"({ends[0]:.2f}-{ends[1]:.2f})" if ends else "(-)"


# -------------------------------------------------------------------------------------------------- comparing


def read_result(path: str) -> dict[tuple, dict]:
    """The answered questions of eval.py's JSON file: (set, id, question, how many alike before) -> row."""
    rows, seen = read_json(Path(path), "a place of results").get("questions"), Counter()
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) and "f1" in r for r in rows):
        how = f"make it with eval.py --policy ... --json {path}"
        raise ValueError(f"{path} holds no answered questions: {how}")
    keyed = {}
    for row in rows:
        key = (row["set"], row["id"], row["question"])
        keyed[*key, seen[key]] = row
        seen[key] += 1
    return keyed


def read_results(paths: str) -> dict[tuple, dict]:
    """`read_result` of comma-separated files, as of several seeds: a question's scores are their means."""
    first, *others = ((path, read_result(path)) for path in paths.split(","))
    for other in others:
        same_questions(first, other)
    every = [keyed for _, keyed in (first, *others)]
    return {key: {s: sum(keyed[key][s] for keyed in every) / len(every) for s in SCORES} for key in every[0]}


def same_questions(a: tuple[str, dict], b: tuple[str, dict]) -> None:
    """Raise ValueError where two results, (path, rows by question), have different questions."""
    for (path, one), (_, other) in ((a, b), (b, a)):
        if alone := [key for key in one if key not in other]:
            first = f"the first is {alone[0][2][:60]!r} of {alone[0][0]}"
            alone = f"{len(alone)} questions are in {path} alone, {first}"
            raise ValueError(f"{a[0]} and {b[0]} cannot be compared: {alone}")


def compare(a: str, b: str, draws: int = DRAWS) -> dict[str, dict]:
    """Two results of the same questions -> {"SET SCORE": {"n", "A", "B", "B - A", "95 %", "p"}}.

    A result is a file, or several with commas between (`read_results`). The paired differences are resampled
    for the interval; p is `p_value`. Raises ValueError where the questions are not the same.
    """
    left, right = read_results(a), read_results(b)
    same_questions((a, left), (b, right))
    out, sets = {}, []
    for stream, name in enumerate(dict.fromkeys(key[0] for key in left)):
        keys = [key for key in left if key[0] == name]
        x, y = (np.array([[side[k][s] for s in SCORES] for k in keys]) for side in (left, right))  # (n, 3)
        sets.append((x.mean(0), y.mean(0), (y - x) / len(keys), resampled(y - x, stream, draws)))
        out |= _compared(name, *sets[-1], stream, draws)
    if len(sets) > 1:
        x, y, shares, drawn = zip(*sets)  # a set's questions share its weight
        whole = np.mean(x, 0), np.mean(y, 0), np.concatenate(shares), np.mean(drawn, 0)
        out |= _compared(AVERAGE, *whole, len(sets), draws)
    return out


def _compared(
    name: str, a: np.ndarray, b: np.ndarray, shares: np.ndarray, drawn: np.ndarray, stream: int, draws: int
) -> dict[str, dict]:
    """The lines of a set: means a, b (3,), a question's share in b - a (n, 3), resampled b - a (draws, 3)."""
    p = [p_value(column, stream, draws) for column in shares.T]
    columns = zip(a.tolist(), b.tolist(), (b - a).tolist(), interval(drawn), p)
    names = ("n", "A", "B", "B - A", "95 %", "p")
    return {f"{name} {s}": dict(zip(names, (len(shares), *c))) for s, c in zip(SCORES, columns)}


def comparison(lines: dict[str, dict]) -> str:
    """The table of `compare`."""
    shown = {}
    for name, line in lines.items():
        ends = "{:+.3f} .. {:+.3f}".format(*line["95 %"]) if line["95 %"] else "-"
        shown[name] = line | {"B - A": f"{line['B - A']:+.3f}", "95 %": ends, "p": f"{line['p']:.4f}"}
    notes = (
        "95 %: bootstrap interval of B - A, paired by question (-: none, as all differ alike); too narrow "
    )
    notes += "where few differ\np: two-sided, how often B - A is as large if the sign of each question's "
    return f"{table(shown)}\n{notes}difference is random"
