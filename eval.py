"""The truth: a policy measured, with any search engine or none; two results compared; one episode live.

It deliberately is not: a judge, a sampler of favourites (greedy, unless told otherwise), a filter. Every
question counts, an episode without an answer too: as 0. The scores are in questions.py, intervals and tables
in report.py, the baselines in modes.py.

    python eval.py --policy 3b --adapter runs/x/policy --data all --limit 500 --search bm25:corpus.jsonl.gz
    python eval.py --policy 3b --data nq,mine.jsonl --mode rag --search http://127.0.0.1:8000 --json rag.json
    python eval.py --compare direct.json rag.json      # is the difference more than luck?
    python eval.py --ask "colour of Balan?"            # one episode, token by token, in the toy world
    python eval.py --data hotpotqa.jsonl --search bm25:corpus.jsonl.gz      # no policy: the engine alone

An evaluation with --json FILE keeps each answered question in FILE.part at once; --resume goes on from there.
"""

import argparse
import codecs
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

import model as models
import report
import toy
from collect import stands
from model import POLICY, SIMULATOR, Model
from modes import MODE_WORDS, MODES
from prompts import load_policy_words
from questions import SETS, cover_em, exact_match, f1, load_questions
from report import Ledger, table
from rollout import (
    WORDS,
    Engine,
    Episode,
    Limits,
    Question,
    Sampled,
    Search,
    Stats,
    Trajectory,
    Turn,
    Words,
    harmless,
    stopped,
)
from search import BM25, open_bm25, open_search
from servers import Chat, is_address
from simulator import Simulator, limits_for, words_for
from tokenizer import Tokenizer

__all__ = ["evaluate", "show_progress", "summarise", "table"]  # what training asks for

# ------------------------------------------------------------------------------------------------- evaluating

LIMITS = Limits()


def answered(t: Trajectory) -> dict:
    """One episode as a row: what was asked, done and answered, and what it is worth.

    `found` is 1.0 where a golden answer stood in a document, None where it is yes or no (`collect.stands`).
    """
    q, golds = t.question, t.question.answers
    held = stands("\n".join(documents.text for _, documents in t.searches), golds)
    return {
        **{"id": q.id, "question": q.text, "golden_answers": list(golds), "hops": q.hops},
        **{"answer": t.answer, "end": t.end, "queries": [query.text for query, _ in t.searches]},
        "f1": f1(t.answer, golds),
        "em": exact_match(t.answer, golds),
        "cover_em": cover_em(t.answer, golds),
        "searches": len(t.searches),
        "found": None if held is None else float(held),
    }


def summarise(trajectories: list[Trajectory]) -> dict:
    """`report.summary` of episodes: means, ends by cause, means by hops."""
    return report.summary([answered(t) for t in trajectories])


def episodes(
    tok: Tokenizer,
    questions: list[Question],
    search: Search,
    limits: Limits = LIMITS,
    words: Words = WORDS,
    temperature: float = 0.0,
    address: tuple[int, int] = (0, 0),
    mode: str = "agent",
) -> list[Episode]:
    """One episode a question, not begun, in one of the ways of modes.py.

    address (seed, step) begins the address of every random number: temperature 0 needs none, but a simulator
    draws its documents.
    """
    play = MODES[mode]
    return [
        play(question, search, tok, limits, words, temperature, (*address, i, 0))
        for i, question in enumerate(questions)
    ]


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
    """One search-agent episode a question -> (`summarise` of them, the episodes in the questions' order).

    tell(done, of, stats) is called as episodes end; for the rest see `episodes`.
    """
    trajectories = engine.run(episodes(tok, questions, search, limits, words, temperature, address), tell)
    return summarise(trajectories), trajectories


def show_progress(bar: tqdm, done: int, of: int, stats: Stats, before: int = 0) -> None:
    """With its bar, a `tell` for `evaluate`: questions done, rate, time left, tokens a second.

    before: questions that were done when this run began.
    """
    bar.set_postfix_str(f"{stats.decoded / max(stats.seconds, 1e-9):,.0f} tokens/s", refresh=False)
    bar.update(before + done - bar.n)


def retrieval(index: BM25, questions: list[Question], depths: tuple[int, ...] = (1, 3, 5, 10)) -> dict:
    """The engine alone: {"n", "top 1", "top 3", ..., "ms"}.

    "top k" is the share of questions of which a golden answer stands in the first k passages that the
    question itself finds; "ms" the mean time of a query. Questions whose answer is yes or no, which no
    passage holds, are left out of all of them: where there are no others, shares and time are None.
    """
    found, spent = Counter(), 0.0
    questions = [question for question in questions if stands("", question.answers) is not None]
    for question in questions:
        began = time.perf_counter()
        top = index.top(question.text, max(depths))
        spent += time.perf_counter() - began
        hits = [stands(" ".join(index.passages[i]), question.answers) for i in top]
        found.update({k: any(hits[:k]) for k in depths})
    n, sums = len(questions), {f"top {k}": found[k] for k in depths} | {"ms": 1e3 * spent}
    return {"n": n} | {name: value / n if n else None for name, value in sums.items()}


# ------------------------------------------------------------------------------------------------------- live


class Screen:
    """Writes tokens as they come: sampled ones green, given ones grey, or in [brackets] without colour.

    A character whose bytes are spread over tokens appears with its last one.
    """

    def __init__(self, tok: Tokenizer, write: Callable[[str], object], colour: bool):
        self.tok, self.write = tok, write
        # before and after given text, before and after sampled text
        self.opened = ("\033[90m", "\033[32m") if colour else ("[", "")
        self.closed = ("\033[0m", "\033[0m") if colour else ("]", "")
        self.sampled: bool | None = None
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self, ids: list[int], sampled: bool) -> None:
        """Write tokens of one kind."""
        if ids and sampled != self.sampled:
            self.end()
            self.sampled = sampled
            self.write(self.opened[sampled])
        self._text(b"".join(map(self.tok.token_bytes, ids)))

    def end(self) -> None:
        """Close the stretch of sampled or given text."""
        if self.sampled is not None:
            self._text(b"", final=True)
            self.write(self.closed[self.sampled])
        self.sampled = None

    def _text(self, data: bytes, final: bool = False) -> None:
        self.write(harmless(self.decoder.decode(data, final)))


def live(run: Episode, tok: Tokenizer, show: Callable[[list[int], bool], None]) -> Episode:
    """The same episode, its policy's turns asked for token by token: show(ids, sampled) tells each."""
    value = None
    while True:
        try:
            wish = run.send(value)
        except StopIteration as end:
            return end.value
        if isinstance(wish, Turn) and wish.role == POLICY:
            show(wish.ids, False)
            value = yield from token_by_token(wish, tok, show)
        else:
            value = yield wish


def token_by_token(turn: Turn, tok: Tokenizer, show: Callable[[list[int], bool], None]) -> Episode:
    """One turn as turns of one token, which share its seat. Returns what the whole turn would have sampled.

    (At temperatures above 0, what it could have sampled: each token draws from an address of its own.)
    """
    ids, logps, given, end = [], [], turn.ids, "limit"
    while end == "limit" and len(ids) < turn.limit:
        one = yield replace(turn, ids=given, limit=1, address=(*turn.address, len(ids)))
        ids, logps, given = ids + one.ids, logps + one.logps, []
        show(one.ids, True)
        stop = stopped([*turn.before, *ids], turn.stops, tok)
        end = "eos" if one.end == "eos" else "stop" if stop else "limit"
    return Sampled(ids, logps, end)


def ask(args: argparse.Namespace) -> None:
    """One episode on the screen, and its answer on the last line."""
    question = Question(args.ask, (args.answer,) if args.answer else ())
    s, colour = setting(args), sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    (run,) = episodes(
        s.tok, [question], s.search, s.limits, s.words, args.temperature, (args.seed, 0), args.mode
    )
    screen = Screen(s.tok, partial(print, end="", flush=True), colour)
    try:
        (t,) = s.engine.run([live(run, s.tok, screen.show)])
    finally:
        screen.end()  # Ctrl-C leaves no green terminal
    stats = s.engine.stats
    spent = f"{stats.decoded} tokens sampled in {stats.seconds:.1f} s"
    print(f"\n\n{spent}, searches: {len(t.searches)}, end: {t.end}")
    print("(no answer)" if t.answer is None else harmless(" ".join(t.answer.split())))


# ----------------------------------------------------------------------------------------------- command line


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags, each with its meaning; where a default is not named, the toy world's differs."""
    p = models.OneLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what is done
    p.add_argument("--ask", metavar="QUESTION", help="show one episode as it happens, instead of measuring")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two files of --json: test B - A")
    p.add_argument("--mode", choices=MODES, default="agent", help="search agent, or a baseline: see modes.py")
    # what is measured
    p.add_argument("--policy", help="preset, checkpoint directory or hub id; absent: the engine alone")
    p.add_argument("--adapter", help="PEFT directory of the policy's adapter; absent: the body as it is")
    p.add_argument(
        "--data", help=f"comma-separated: files, {', '.join(SETS)}, or all for these; toy (default)"
    )
    p.add_argument(
        "--limit", type=int, help="questions a set, drawn by a fixed seed (all; paper: 500; toy: 300)"
    )
    p.add_argument("--search", help="sim, none, toy, bm25:CORPUS, http://HOST:PORT or serpapi")
    p.add_argument("--json", help="file for figures, flags, and every question's answer and scores")
    p.add_argument(
        "--resume", action="store_true", help="go on with what --json has kept of a run that was cut"
    )
    # the episode
    p.add_argument(
        "--policy-prompt", help="JSON file with other words for the policy: prompt, notice, system"
    )
    p.add_argument("--turns", type=int, help="searches before the last answer (5; toy: 4)")
    p.add_argument("--turn-tokens", type=int, help="of a turn, at most (500; toy: 20)")
    p.add_argument("--observation-tokens", type=int, help="of a search's documents, at most (500; toy: 32)")
    p.add_argument("--episode-tokens", type=int, help="prompt, turns and documents together (4096; toy: 192)")
    p.add_argument("--documents", type=int, default=5, help="that a real engine returns a search")
    p.add_argument("--temperature", type=float, default=0.0, help="of the policy; 0 is greedy")
    p.add_argument("--seed", type=int, default=0, help="of all sampling: the simulator's, and the policy's")
    p.add_argument("--world", type=int, default=1, help="toy: the seed of its facts")
    # the simulator, and noise
    p.add_argument("--sim", help="--search sim: its body, or http://HOST:PORT/v1; absent: the policy's own")
    p.add_argument("--sim-adapter", help="PEFT directory of the simulator's adapter; absent: prompted only")
    p.add_argument(
        "--sim-prompt", help="sft, prompted or a JSON file; absent: what its adapter was trained on"
    )
    p.add_argument("--noise", type=float, default=0.0, help="share of searches that go wrong (sim and toy)")
    p.add_argument("--answer", help="--ask with --search sim: the golden answer, which a simulator is told")
    # the machine
    p.add_argument("--seats", type=int, default=16, help="episodes, and documents being written, at a time")
    p.add_argument("--dtype", choices=models.DTYPES, help="of the bodies (bf16 on a GPU, else fp32)")
    p.add_argument("--device", help="cuda where there is one, else cpu")
    return settled(p.parse_args(arguments))


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """The flags, and what follows from others: --ask is at home in the toy world, two modes do not search."""
    if args.ask is not None and args.policy is None:
        args.policy = "tiny"
    if args.search is None and args.mode in ("direct", "cot"):
        args.search = "none"
    if args.search is None and args.ask is not None and args.policy == "tiny":
        args.search = "toy"
    if args.data is None:
        args.data = (
            "toy" if args.ask is None or "tiny" in (args.policy, args.sim) or args.search == "toy" else ""
        )
    return args


def load_sets(args: argparse.Namespace) -> dict[str, list[Question]]:
    """Name of the set, or of its file without the ending -> questions. Two of a name raise ValueError."""
    if args.data == "toy":
        return {"toy": toy.World(args.world).questions(args.limit or 300)}
    sets = {}
    for source in SETS if args.data == "all" else args.data.split(","):
        name = Path(source).name.partition(".")[0]
        if name in sets:
            raise ValueError(f"--data names {name} twice: rename one file")
        sets[name] = load_questions(source, args.limit)
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
    if args.search is None:
        raise ValueError("--search is missing: sim, none, toy, bm25:CORPUS, http://HOST:PORT or serpapi")
    if args.policy is None and not args.search.startswith("bm25:"):
        raise ValueError(f"--search {args.search} needs a --policy: only bm25 can be measured alone")
    if args.mode in ("direct", "cot") and args.search != "none":
        raise ValueError(f"--mode {args.mode} does not search: leave out --search {args.search}")
    if args.ask is not None and not args.ask.strip():
        raise ValueError("--ask needs a question")
    if args.ask is not None and args.search == "sim" and not args.answer:
        raise ValueError("a simulator is told the golden answer, in order to write documents: give --answer")
    if args.search == "sim" and is_address(args.sim) and args.sim_adapter:
        raise ValueError("--sim-adapter cannot be sent to a server: let --sim serve it")
    if not 0 <= args.noise <= 1:
        raise ValueError(f"--noise is a share, within 0..1, not {args.noise}")
    if args.noise and args.search not in ("sim", "toy"):
        raise ValueError(f"--noise is for --search sim and toy: {args.search} returns what it finds")
    if args.search != "sim" and (args.sim or args.sim_adapter or args.sim_prompt):
        raise ValueError(f"--sim, --sim-adapter and --sim-prompt are for --search sim, not {args.search}")
    at_least = {"turns": 0, "temperature": 0, "limit": 1, "seats": 1, "documents": 1}
    for name, least in (
        at_least | {f"{part}_tokens": 1 for part in ("turn", "observation", "episode")}
    ).items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).parent.is_dir()):
        raise ValueError(f"--json {args.json} is not a file in a directory that exists")
    if args.resume and not args.json:
        raise ValueError("--resume goes on with what --json FILE has kept: give both")


def open_engine(args: argparse.Namespace, tok: Tokenizer | None = None) -> Search:
    """The search that --search names; `tok` is the simulator's tokenizer."""
    if args.search == "toy":
        return partial(toy.World(args.world).lookup, noise=args.noise)
    if args.search != "sim":
        return open_search(args.search, args.documents)
    server = Chat(args.sim) if is_address(args.sim) else None
    own = server or args.sim_adapter or args.sim_prompt or args.data != "toy"
    words = words_for(args.sim_adapter, args.sim_prompt) if own else toy.SIM_WORDS
    simulator = Simulator(tok, words, args.noise, limit=600 if own else 40, server=server)
    return simulator if own else toy.shuffled(simulator)


def words_of(args: argparse.Namespace) -> Words:
    """The policy's words for the mode: of a file, of the toy world, or the usual ones."""
    words = MODE_WORDS[args.mode]
    if args.policy_prompt:
        words = load_policy_words(args.policy_prompt)
    elif "toy" in (args.data, args.search):
        words = toy.WORDS
        if args.mode == "rag":
            found = "\n\n<information>{documents}</information>\n\n"  # as an episode has them
            words = replace(words, prompt=words.prompt + found)
    if args.mode == "rag" and "{documents}" not in words.prompt:
        raise ValueError(f"{args.policy_prompt}: for --mode rag, prompt must say where the {{documents}} go")
    return words


@dataclass
class Setting:
    """All that an episode needs."""

    engine: Engine
    tok: Tokenizer
    search: Search
    limits: Limits
    words: Words


def setting(args: argparse.Namespace) -> Setting:
    """Load and open what the flags name."""
    limits = limits_for(args, toy.LIMITS if "toy" in (args.data, args.search) else LIMITS)
    if args.ask:
        limits = replace(limits, prompt=limits.episode // 2)  # a question of one's own may be a long one
    words = words_of(args)
    here = args.search == "sim" and not is_address(args.sim)
    names = {POLICY: args.policy} | ({SIMULATOR: args.sim or args.policy} if here else {})
    homes = {role: models.resolve(name) for role, name in names.items()}
    toks = {home: Tokenizer.load(home) for home in dict.fromkeys(homes.values())}
    search = open_engine(args, toks.get(homes.get(SIMULATOR)))  # first: a broken corpus shows at once
    bodies = {role: (body, toks[homes[role]]) for role, body in load_bodies(args, homes).items()}
    engine = Engine(bodies, args.seats, limits.episode + 1)  # a seat holds a whole episode
    return Setting(engine, bodies[POLICY][1], search, limits, words)


# What may differ between a run and its resumption: it changes no answer.
FREE = ("json", "resume", "seats", "device", "compare", "ask")


def run(args: argparse.Namespace, sets: dict[str, list[Question]]) -> list[dict]:
    """Every set through one engine -> a row a question."""
    ledger = Ledger(args.json, {k: v for k, v in vars(args).items() if k not in FREE}, args.resume)
    done = {name: ledger.done(name, questions) for name, questions in sets.items()}
    s, address = setting(args), (args.seed, 0)
    ledger.start()
    for name, questions in sets.items():
        runs = episodes(s.tok, questions, s.search, s.limits, s.words, args.temperature, address, args.mode)
        runs = [kept(run, partial(ledger.add, name, i)) for i, run in enumerate(runs) if i not in done[name]]
        before = len(done[name])
        with tqdm(total=len(questions), initial=before, desc=name, unit="question", mininterval=1) as bar:
            s.engine.run(runs, partial(show_progress, bar, before=before))
    return ledger.of(sets)


def kept(run: Episode, keep: Callable[[dict], None]) -> Episode:
    """An episode whose row is kept as soon as it ends."""
    t = yield from run
    keep(answered(t))
    return t


def main(arguments: list[str] | None = None) -> None:
    """Measure, compare or ask; print; write the figures."""
    args = parse_arguments(arguments)
    if args.compare:
        print(report.comparison(report.compare(*args.compare)))
        return
    check(args)
    if args.ask is not None:
        ask(args)
        return
    sets, began = load_sets(args), time.perf_counter()
    if args.policy:
        rows = run(args, sets)
        figures = report.figures(rows)
        print(report.results(figures, report.papers(args.policy, args.mode)))
    else:
        rows, index = [], open_bm25(args.search.removeprefix("bm25:"))
        parts = {name: retrieval(index, questions) for name, questions in sets.items()}
        figures = report.average(parts) | {"sets": parts, "seconds": time.perf_counter() - began}
        print(table(parts), "top k: a golden answer stands there; yes / no questions are left out", sep="\n")
    if args.json:
        report.save(args.json, figures | {"flags": vars(args), "questions": rows})


if __name__ == "__main__":
    models.command_line(main)
