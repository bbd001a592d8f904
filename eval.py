"""The truth: questions with golden answers, the scores, and a policy measured with any search engine.

It deliberately is not: a judge, a sampler of favourites (greedy, unless told otherwise), a filter. Every
question counts, an episode without an answer too: as 0.

    python eval.py --policy 3b --adapter runs/x/policy --data hotpotqa.jsonl --search bm25:corpus.jsonl.gz
    python eval.py --data hotpotqa.jsonl --search bm25:corpus.jsonl.gz          # no policy: the engine alone
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

import model as models
import toy
from model import POLICY, SIMULATOR, Model
from questions import cover_em, exact_match, f1, load_questions
from rollout import WORDS, Engine, Limits, Question, Search, Stats, Trajectory, Words, episode
from search import BM25, open_bm25, open_search
from simulator import Simulator, words_for
from tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------- evaluating

LIMITS = Limits()


def score(t: Trajectory) -> dict:
    """One episode's worth, and its engine's: `found` is 1.0 if a golden answer stood in a document."""
    golds = t.question.answers
    return {
        "f1": f1(t.answer, golds),
        "em": exact_match(t.answer, golds),
        "cover_em": cover_em(t.answer, golds),
        "searches": len(t.searches),
        "found": cover_em("\n".join(documents.text for _, documents in t.searches), golds),
    }


def summarise(trajectories: list[Trajectory]) -> dict:
    """Means over all episodes, ends by cause, and the means by hops where the questions tell them.

    {"n", "f1", "em", "cover_em", "searches", "found", "ends": {cause: episodes}, "by_hop": {"1": means, ...}}
    """
    hops = sorted({t.question.hops for t in trajectories} - {0})
    return {
        **_means(trajectories),
        "ends": dict(Counter(t.end for t in trajectories).most_common()),
        "by_hop": {str(h): _means([t for t in trajectories if t.question.hops == h]) for h in hops},
    }


def _means(trajectories: list[Trajectory]) -> dict:
    scores, n = [score(t) for t in trajectories], len(trajectories)
    return {"n": n} | {key: sum(s[key] for s in scores) / n for key in scores[0]}


def evaluate(
    engine: Engine,
    tok: Tokenizer,
    questions: list[Question],
    search: Search,
    limits: Limits = LIMITS,
    words: Words = WORDS,
    temperature: float = 0.0,
    address: tuple[int, int] = (0, 0),
    tell: Callable[[int, int, Stats], None] | None = None,
) -> tuple[dict, list[Trajectory]]:
    """One episode a question -> (`summarise` of them, the episodes in the order of the questions).

    address (seed, step) begins the address of every random number: temperature 0 needs none, but a simulator
    draws its documents. tell(done, of, stats) is called as episodes end.
    """
    episodes = [
        episode(question, search, tok, limits, words, temperature, (*address, i, 0))
        for i, question in enumerate(questions)
    ]
    trajectories = engine.run(episodes, tell)
    return summarise(trajectories), trajectories


def show_progress(bar: tqdm, done: int, of: int, stats: Stats) -> None:
    """With its bar, a `tell` for `evaluate`: questions done, rate, time left, tokens a second."""
    bar.set_postfix_str(f"{stats.decoded / max(stats.seconds, 1e-9):,.0f} tokens/s", refresh=False)
    bar.update(done - bar.n)


def retrieval(index: BM25, questions: list[Question], depths: tuple[int, ...] = (1, 3, 5, 10)) -> dict:
    """The engine alone: {"n", "top 1", "top 3", ..., "ms"}.

    "top k" is the share of questions of which a golden answer stands in the first k passages that the
    question itself finds; "ms" the mean time of a query.
    """
    found, spent = Counter(), 0.0
    for question in questions:
        began = time.perf_counter()
        top = index.top(question.text, max(depths))
        spent += time.perf_counter() - began
        hits = [cover_em(" ".join(index.passages[i]), question.answers) for i in top]
        found.update({k: max(hits[:k], default=0.0) for k in depths})
    n = len(questions)
    return {"n": n} | {f"top {k}": found[k] / n for k in depths} | {"ms": 1e3 * spent / n}


# ----------------------------------------------------------------------------------------------- command line


def average(sets: dict[str, dict]) -> dict:
    """The mean of the sets' means, whatever their sizes, as the paper's tables have it; "n" is the sum."""
    parts = list(sets.values())
    if len(parts) == 1:
        return parts[0]
    means = {k: sum(p[k] for p in parts) / len(parts) for k, v in parts[0].items() if isinstance(v, float)}
    return {"n": sum(p["n"] for p in parts)} | means


def table(rows: dict[str, dict]) -> str:
    """Rows of figures under the names of their columns: means with three decimals, counts as they are."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [["", *columns]] + [
        [name, *(_cell(row.get(c, "")) for c in columns)] for name, row in rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([c[0].ljust(widths[0]), *map(str.rjust, c[1:], widths[1:])]).rstrip() for c in cells]
    return "\n".join(lines)


def _cell(value: float | int | str) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def report(sets: dict[str, dict]) -> str:
    """The table of `summarise` by set: a line a set, a line a number of hops, the mean over the sets."""
    rows = {}
    for name, summary in sets.items():
        means = {k: v for k, v in summary.items() if k not in ("ends", "by_hop")}
        rows[name] = means | {f"end: {cause}": count for cause, count in summary["ends"].items()}
        rows |= {f"  {hops} hop": part for hops, part in summary["by_hop"].items()}
    if len(sets) > 1:
        rows["mean of sets"] = average(sets)
    return table(rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags, each with its meaning; where a default is not named, the toy world's differs."""
    p = models.OneLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what is measured
    p.add_argument("--policy", help="preset, checkpoint directory or hub id; absent: the engine alone")
    p.add_argument("--adapter", help="PEFT directory of the policy's adapter; absent: the body as it is")
    p.add_argument("--data", default="toy", help="question files, comma-separated; toy: the toy world's")
    p.add_argument("--limit", type=int, help="questions a file, from the top (all; toy: 300)")
    p.add_argument("--search", required=True, help="sim, none, toy or bm25:CORPUS")
    p.add_argument("--json", help="file for figures, flags, and every question's answer and scores")
    # the episode
    p.add_argument(
        "--policy-prompt", help="JSON file with other words for the policy: prompt, notice, system"
    )
    p.add_argument("--turns", type=int, help="searches before the last answer (5; toy: 4)")
    p.add_argument("--episode-tokens", type=int, help="prompt, turns and documents together (4096; toy: 192)")
    p.add_argument("--documents", type=int, default=5, help="that bm25 returns a search")
    p.add_argument("--temperature", type=float, default=0.0, help="of the policy; 0 is greedy")
    p.add_argument("--seed", type=int, default=0, help="of all sampling: the simulator's, and the policy's")
    p.add_argument("--world", type=int, default=1, help="toy: the seed of its facts")
    # the simulator, and noise
    p.add_argument("--sim", help="--search sim: its body; absent: the policy's own, in a second role")
    p.add_argument("--sim-adapter", help="PEFT directory of the simulator's adapter; absent: prompted only")
    p.add_argument(
        "--sim-prompt", help="sft, prompted or a JSON file; absent: what its adapter was trained on"
    )
    p.add_argument("--noise", type=float, default=0.0, help="share of searches that go wrong (sim and toy)")
    # the machine
    p.add_argument("--seats", type=int, default=16, help="episodes, and documents being written, at a time")
    p.add_argument("--dtype", choices=models.DTYPES, help="of the bodies (bf16 on a GPU, else fp32)")
    p.add_argument("--device", help="cuda where there is one, else cpu")
    return p.parse_args(arguments)


def load_words(path: str) -> Words:
    """Other words for the policy, from a JSON file. Raises ValueError for what is not such a file."""
    words = models.read_json(Path(path), "a place of policy prompts")
    if not {"prompt", "notice"} <= words.keys() <= {"prompt", "notice", "system"}:
        raise ValueError(f"{path} must hold prompt and notice (and may hold system): no other keys")
    if not all(isinstance(text, str) for text in words.values()) or "{question}" not in words["prompt"]:
        raise ValueError(f"{path}: all must be texts, and prompt must say where the {{question}} goes")
    return Words(**words)


def load_sets(args: argparse.Namespace) -> dict[str, list[Question]]:
    """The questions of every file in --data, by its name without the ending. Two of a name: ValueError."""
    if args.data == "toy":
        return {"toy": toy.World(args.world).questions(args.limit or 300)}
    sets = {}
    for path in args.data.split(","):
        name = Path(path).name.partition(".")[0]
        if name in sets:
            raise ValueError(f"--data names {name} twice: rename one file")
        sets[name] = load_questions(path, args.limit)
    return sets


def load_bodies(args: argparse.Namespace, homes: dict[int, Path]) -> dict[int, Model]:
    """role -> its body with its adapter. Roles of one checkpoint share one body."""
    device, dtype = models.machine(args.device, args.dtype)
    loaded = {home: models.load(home, models.DTYPES[dtype], device) for home in dict.fromkeys(homes.values())}
    for role, adapter in ((POLICY, args.adapter), (SIMULATOR, args.sim_adapter)):
        if adapter:
            models.load_adapter(loaded[homes[role]], role, adapter)
    return {role: loaded[home] for role, home in homes.items()}


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that contradict each other, before anything is loaded."""
    if args.policy is None and not args.search.startswith("bm25:"):
        raise ValueError(f"--search {args.search} needs a --policy: only bm25 can be measured alone")
    if not 0 <= args.noise <= 1:
        raise ValueError(f"--noise is a share, within 0..1, not {args.noise}")
    if args.noise and args.search not in ("sim", "toy"):
        raise ValueError(f"--noise is for --search sim and toy: {args.search} returns what it finds")
    if args.search != "sim" and (args.sim or args.sim_adapter or args.sim_prompt):
        raise ValueError(f"--sim, --sim-adapter and --sim-prompt are for --search sim, not {args.search}")
    for name in ("limit", "seats", "documents", "episode_tokens", "turns", "temperature"):
        value, least = getattr(args, name), int(name not in ("turns", "temperature"))
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).parent.is_dir()):
        raise ValueError(f"--json {args.json} is not a file in a directory that exists")


def open_engine(args: argparse.Namespace, tok: Tokenizer | None = None) -> Search:
    """The search that --search names; `tok` is the simulator's tokenizer."""
    if args.search == "toy":
        return partial(toy.World(args.world).lookup, noise=args.noise)
    if args.search != "sim":
        return open_search(args.search, args.documents)
    own = args.sim_adapter or args.sim_prompt or args.data != "toy"
    words = words_for(args.sim_adapter, args.sim_prompt) if own else toy.SIM_WORDS
    simulator = Simulator(tok, words, args.noise, limit=600 if own else 40)
    return simulator if own else toy.shuffled(simulator)


def limits_for(args: argparse.Namespace, usual: Limits) -> Limits:
    """The usual limits with those of the flags. A prompt may take half of an episode."""
    tokens = usual.episode if args.episode_tokens is None else args.episode_tokens
    turns = usual.turns if args.turns is None else args.turns
    return replace(usual, episode=tokens, prompt=min(usual.prompt, tokens // 2), turns=turns)


def run(args: argparse.Namespace, sets: dict[str, list[Question]]) -> tuple[dict, list[dict]]:
    """Every set through one engine -> ({set: its `summarise`}, a row a question)."""
    in_toy = "toy" in (args.data, args.search)
    words = load_words(args.policy_prompt) if args.policy_prompt else toy.WORDS if in_toy else WORDS
    limits = limits_for(args, toy.LIMITS if in_toy else LIMITS)
    names = {POLICY: args.policy} | ({SIMULATOR: args.sim or args.policy} if args.search == "sim" else {})
    homes = {role: models.resolve(name) for role, name in names.items()}
    toks = {home: Tokenizer.load(home) for home in dict.fromkeys(homes.values())}
    search = open_engine(args, toks.get(homes.get(SIMULATOR)))  # first: a broken corpus shows at once
    bodies = {role: (body, toks[homes[role]]) for role, body in load_bodies(args, homes).items()}
    engine = Engine(bodies, args.seats, limits.episode + 1)  # a seat holds a whole episode
    summaries, rows, address = {}, [], (args.seed, 0)
    for name, questions in sets.items():
        with tqdm(total=len(questions), desc=name, unit="question", mininterval=1) as bar:
            tok, tell = bodies[POLICY][1], partial(show_progress, bar)
            summaries[name], trajectories = evaluate(
                engine, tok, questions, search, limits, words, args.temperature, address, tell
            )
        rows += [answer_row(name, t) for t in trajectories]
    return summaries, rows


def answer_row(name: str, t: Trajectory) -> dict:
    """One question of the --json file."""
    q = t.question
    asked = {"set": name, "id": q.id, "question": q.text, "golden_answers": list(q.answers)}
    queries = [query.text for query, _ in t.searches]
    return asked | {"answer": t.answer, "end": t.end, "queries": queries} | score(t)


def save(path: str, result: dict) -> None:
    """Write JSON whole or not at all."""
    part = Path(path + ".part")
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the figures."""
    args = parse_arguments(arguments)
    check(args)
    sets, began = load_sets(args), time.perf_counter()
    if args.policy:
        summaries, rows = run(args, sets)
        print(report(summaries))
    else:
        index = open_bm25(args.search.removeprefix("bm25:"))
        summaries, rows = {name: retrieval(index, questions) for name, questions in sets.items()}, []
        print(table(summaries))
    if args.json:
        figures = average(summaries) | {"sets": summaries, "seconds": time.perf_counter() - began}
        save(args.json, figures | {"flags": vars(args), "questions": rows})


if __name__ == "__main__":
    models.command_line(main)
