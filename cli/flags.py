"""Every flag of train.py, eval.py and simulator.py, once: name, type, default, meaning, bounds.

Commands share groups of flags. A flag that was not given takes its default from the first of these that has
one: the task (the toy world's are in toy/task.py), the column `cpu` for a real checkpoint without a GPU, the
table itself. `settle` is the only place where that is decided.

What this is not: configuration files. `python train.py --help` prints this table.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import compat
import tasks
from cli import ranks
from cli.parser import MOST, NEEDED, Flag, Groups, parse, parse_verb
from evaluation.modes import MODES
from model import DTYPES
from questions import SETS
from recipes import ADVANTAGES, ALONE, KL, PARTS, RATIOS, RECIPES
from servers import is_address
from weights import PRESETS

BODY = f"{', '.join(PRESETS)}; a directory in Hugging Face format, or a hub id"
ENGINE = "none, bm25:CORPUS, http://HOST:PORT or serpapi"
LABELS = ("judge", "answer", "trajectory")

# ------------------------------------------------------------------------------------------- shared, by group

# fmt: off
POLICY = Flag("policy", str, "", "the body that searches: " + BODY, "BODY")
ADAPTER = Flag("adapter", str, "", "PEFT directory of the policy's adapter (none: the body as it is)", "DIR")
SIM = Flag("sim", str, "", "the simulator's body (the policy's: one copy), or http://HOST:PORT/v1", "BODY")
OWN, REAL = "self", "real"  # --sim: the policy writes its own documents; the real engine answers
SIM_BITS = Flag("sim-bits", ("8", "4"), "", "of a simulator with a body of its own (as --bits)")
SIM_ADAPTER = Flag("sim-adapter", str, "", "PEFT directory of a fine-tuned simulator (none: prompted)", "DIR")
POLICY_PROMPT = Flag("policy-prompt", str, "", "short, JSON: prompt, notice, system (the adapter's)", "FILE")
SIM_PROMPT = Flag("sim-prompt", str, "", "sft, prompted, short, JSON (the adapter's, or prompted)", "FILE")
DATA = Flag("data", str, "", f"question files (JSONL, parquet) or sets ({', '.join(SETS)}), or toy", "A,B")
LIMIT = Flag("limit", int, None, "questions a file, drawn by a fixed seed (all)")
SEARCH = Flag("search", str, "", f"the real engine: {ENGINE}, or toy", "ENGINE")
DOCUMENTS = [
    Flag("documents", int, 5, "that a real engine returns for a search"),
    Flag("document-words", int, None, "cut each of its documents after so many words (whole)"),
]
NOISE = Flag("noise", float, 0.0, "share of searches that go wrong (simulator and toy engine)", most=1)
LENGTHS = [
    Flag("turns", int, 5, "searches before the last generation, an answer (not tokens)", cpu=2, least=0),
    Flag("prompt-tokens", int, 2048, "a longer question is an error", cpu=1024),
    Flag("episode-tokens", int, 4096, "prompt, turns and documents together", cpu=1536),
    Flag("turn-tokens", int, 500, "a turn of the policy", cpu=128),
    Flag("observation-tokens", int, 500, "the documents of one search", cpu=256),
]
SIM_TOKENS = Flag("sim-tokens", int, 600, "what the simulator writes for one search", cpu=256)
SEAT_TOKENS = Flag("seat-tokens", int, 4096, "an episode, or a simulator's prompt and documents", cpu=2048)
SEATS = Flag("seats", int, None, "rows decoded together (16; on a GPU as many as fit and are of use)")
SEED = Flag("seed", int, 0, "of everything that is random", least=0)
MACHINE = [
    Flag("dtype", tuple(DTYPES), "", "of the bodies (bf16 on a GPU, else fp32)"),
    Flag("device", str, "", "cuda where there is one, else cpu", "NAME"),
    Flag("bits", ("8", "4"), "", "of the bodies' frozen matrices, to save memory (those of --dtype)"),
]
ADAPTED = [
    Flag("rank", int, 16, "of a new LoRA adapter"),
    Flag("alpha", float, 32.0, "its scale, times the rank"),
]
RESUME = Flag("resume", bool, False, "go on with the run in --out")

# ------------------------------------------------------------------------------------------------- train.py

TRAIN: Groups = {
    "bodies": [
        replace(POLICY, help="the body that learns to search: " + BODY),
        replace(SIM, help=SIM.help + f"; {OWN}: the policy itself; {REAL}: a real search engine"),
        replace(ADAPTER, help="start from this PEFT adapter of the policy"),
        SIM_ADAPTER,
        POLICY_PROMPT,
        SIM_PROMPT,
        SIM_BITS,
        *MACHINE,
    ],
    "questions": [
        DATA,
        Flag("eval-data", str, "", "held-out question files, scored before and after", "A,B"),
        Flag("eval-search", str, "", f"the engine that answers them: {ENGINE}", "ENGINE"),
        Flag("eval-questions", int, 500, "how many of them (0: no evaluation)", cpu=64, least=0),
        Flag("eval-every", int, 0, "steps between greedy looks at the first of them (0: none)", least=0),
        Flag("eval-few", int, 64, "questions of such a look; the best policy so far is kept in OUT/best"),
        *DOCUMENTS,
    ],
    "how much": [
        Flag("steps", int, 200, "of training", cpu=12),
        Flag("questions", int, 64, "a step", cpu=8),
        Flag("group", int, 5, "episodes a question (siblings), compared with each other", cpu=4),
        SEED,
    ],
    "the curriculum": [
        Flag("noise-start", float, 0.0, "probability of noisy documents at the first step", most=1),
        Flag("noise-end", float, 0.5, "and at the last", most=1),
        Flag("noise-shape", ("exponential", "linear", "constant", "reverse"), "exponential", "how it rises"),
        Flag("shared-coins", bool, False, "siblings share their noise coins"),
        Flag("heed", float, 0.0, "P(useful) *= (share of the question's words that are asked for) ** this"),
    ],
    "learning": [
        Flag("algorithm", tuple(RECIPES), "grpo", "a row of recipes.py; the next eight override its parts"),
        Flag("advantage", tuple(ADVANTAGES), "", "of an episode, from the rewards of its group"),
        Flag("ratio", tuple(RATIOS), "", "loss of a token: probability ratio and clip"),
        Flag("clip-low", float, None, "how far below 1 a ratio counts"),
        Flag("clip-high", float, None, "and above"),
        Flag("normaliser", ("token", "sequence", "prompt", "constant"), "", "what weighs alike in the loss"),
        Flag("kl-in", ("loss", "reward", "none"), "", "where the KL to the reference stands"),
        Flag("kl-estimator", tuple(KL), "", "of that KL"),
        Flag("resample", int, None, "rounds that replace groups without a difference", least=0),
        Flag("lr", float, 1e-5, "at the start; falls linearly to 0"),
        Flag("critic-lr", float, None, "of the critic of ppo (ten times --lr)"),
        *ADAPTED,
        Flag("kl", float, 1e-3, "coefficient of the KL to the reference (0 saves its forward pass)"),
        Flag("gamma", float, 1.0, "discount of a reward, a sampled token", most=1),
        Flag("lam", float, 1.0, "lambda of gae", most=1),
        Flag("entropy", float, 0.0, "coefficient of the entropy bonus"),
        Flag("strata", float, 0.0, "share of comparing siblings of as many searches (2510.06214)", most=1),
        Flag("guard", float, 0.0, "likelihood guard (2512.04220): .1; needs --updates above 1"),
        Flag("grad-clip", float, 1.0, "largest norm of a gradient"),
        Flag("weight-decay", float, 0.01, "of AdamW"),
        Flag("updates", int, 1, "optimiser steps a rollout: more than one makes the clip matter"),
        Flag("reward", ("f1", "em", "cover-em"), "f1", "score of an answer that is its reward"),
        Flag("compat", str, "", "defects of the authors' code (compat.py): zerosearch is all", "NAME,..."),
        Flag("shuffle-rewards", bool, False, "a control: shuffled among siblings, rewards can teach nothing"),
    ],
    "lengths, in tokens": [*LENGTHS, SIM_TOKENS, SEAT_TOKENS],
    "memory": [
        replace(SEATS, default=0, least=0, help="rows decoded together (0: as many as fit and are of use)"),
        Flag("micro-tokens", int, 0, "padded tokens a pass (0: as memory allows)", least=0),
        Flag("recompute", bool, False, "keep no activations (where memory is short; a third slower)"),
        Flag("memory", float, 0.0, "GiB to plan for (0: what is free, on a CPU half of it)"),
    ],
    "fine-tuning of the task's own simulator (elsewhere: simulator.py sft, then --sim-adapter)": [
        Flag("sft-steps", int, 0, "updates of the simulator before the policy's first", least=0),
        Flag("sft-lr", float, 5e-3, "falls linearly to 0"),
        Flag("no-audit", bool, False, "of a simulator that was audited before"),
    ],
    "output": [
        Flag("out", str, "", "directory of the run (runs/<date_time>)", "DIR"),
        RESUME,
        Flag("keep", int, 0, "policies of so many last looks that are kept, in OUT/policies", least=0),
        Flag("save-every", int, 10, "steps between saves; Ctrl-C saves too"),
        Flag("show-every", int, 20, "steps between coloured trajectories"),
        Flag("track", ("tensorboard", "wandb", "trackio"), "", "send the log there too (its own library)"),
    ],
}

# -------------------------------------------------------------------------------------------------- eval.py

EVAL: Groups = {
    "what is done": [
        Flag("ask", str, None, "show one episode as it happens, instead of measuring", "QUESTION"),
        Flag("answer", str, "", "its golden answer, which a simulator has to be told", "TEXT"),
        Flag("compare", str, None, "is B better than A? two files of --json, or A1,A2 B1,B2", "FILE", many=2),
        Flag("mode", tuple(MODES), "agent", "search agent, or one of the paper's baselines"),
    ],
    "what is measured": [
        replace(POLICY, help="none: the engine alone; else the body that answers: " + BODY),
        ADAPTER,
        POLICY_PROMPT,
        replace(DATA, help=DATA.help + ", or all for these sets"),
        LIMIT,
        replace(SEARCH, help=f"sim (the simulator), {ENGINE}, or toy"),
        *DOCUMENTS,
        Flag("json", str, "", "write figures, flags, and every question's answer and scores here", "FILE"),
        replace(RESUME, help="go on with what --json FILE has kept of a run that was cut"),
    ],
    "lengths, in tokens": [*LENGTHS, SIM_TOKENS],
    "sampling": [
        Flag("temperature", float, 0.0, "of the policy; 0 is greedy"),
        SEED,
        Flag("world", int, 1, "toy: the seed of its facts"),
    ],
    "the simulator (--search sim), and noise": [SIM, SIM_BITS, SIM_ADAPTER, SIM_PROMPT, NOISE],
    "the machine": [SEATS, *MACHINE],
}

# --------------------------------------------------------------------------------------------- simulator.py

COLUMNS = Flag("columns", str, "", "what the file calls prompt, documents, query, ...", "OURS=THEIRS,...")
WRITING = [
    replace(SIM, default=NEEDED, help=f"{BODY}, or a chat server: http://HOST:PORT/v1"),
    SIM_ADAPTER,
    SIM_PROMPT,
    SIM_TOKENS,
    Flag("temperature", float, 0.8, "of its sampling; 0 is greedy"),
]
COLLECT: Groups = {
    "what is asked": [
        replace(POLICY, default=NEEDED),
        ADAPTER,
        POLICY_PROMPT,
        replace(DATA, default=NEEDED),
        LIMIT,
        replace(SEARCH, default=NEEDED),
        *DOCUMENTS,
        replace(NOISE, default=None, help="toy: share of searches that find nothing"),
    ],
    "what is kept": [
        Flag("rows", int, NEEDED, "half of them useful, half noisy", least=2),
        Flag("judge", LABELS, "judge", "the label that becomes the quality"),
        Flag("out", str, NEEDED, "file of rows (JSON lines); beside it the log of all episodes", "FILE"),
        replace(RESUME, help="go on; more rows, or another --judge, are welcome"),
    ],
    "the episode": [
        Flag("samples", int, 1, "episodes a question, at most"),
        Flag("temperature", float, 1.0, "of the policy"),
        Flag("force-search", bool, False, "search for the question where an episode did not"),
        *LENGTHS,
    ],
    "the machine": [SEED, SEATS, *MACHINE],
}
SFT: Groups = {
    "what is learnt": [
        Flag("rows", str, NEEDED, "JSON lines of `collect`, or a released set: file or hub name", "FILE"),
        COLUMNS,
        Flag("out", str, NEEDED, "directory for the adapter (PEFT format), its words, sft.json", "DIR"),
        RESUME,
    ],
    "the simulator": [replace(WRITING[0], help=BODY), *WRITING[2:], *ADAPTED],
    "learning": [
        Flag("steps", int, 1000, "as in the paper"),
        Flag("lr", float, 1e-4, "at the start; falls linearly to 0"),
        Flag("tokens", int, 4096, "a step"),
        Flag("micro", int, 1024, "tokens a pass, padding included: sets the memory"),
    ],
    "what is measured": [
        Flag("held", int, 64, "rows held out (at most a tenth), by whole questions", least=0),
        Flag("held-rows", str, "", "another file of rows to hold out, instead of a part of --rows", "FILE"),
        Flag("audit", int, 32, "held-out rows that are audited before and after", least=0),
        Flag("every", int, 50, "steps between held-out losses, and between saves"),
    ],
    "the machine": [SEED, SEATS, *MACHINE],
}
AUDIT: Groups = {
    "the simulator": WRITING,
    "queries": [
        Flag("rows", str, "", "rows that it was not trained on, as for sft", "FILE"),
        COLUMNS,
        Flag("data", str, "", "instead of rows: a question file; each question is a query", "FILE"),
        LIMIT,
        Flag("json", str, "", "write the figures and the flags here", "FILE"),
    ],
    "the machine": [SEED, SEATS, *MACHINE],
}
WRITE: Groups = {
    "the simulator": WRITING,
    "the query": [
        Flag("query", str, NEEDED, "what the policy would search for"),
        Flag("question", str, NEEDED, "what it wants to answer"),
        Flag("answer", str, NEEDED, "the golden answer"),
    ],
    "the machine": [SEED, *MACHINE],
}
VERBS = {
    "collect": ("rows for sft: a policy's searches, a real engine's documents, labels", COLLECT),
    "sft": ("fine-tune an adapter that writes useful or noisy documents, as asked", SFT),
    "audit": ("how good is a simulator, on the queries of held-out rows?", AUDIT),
    "write": ("what the simulator writes for one query, useful and noisy side by side", WRITE),
}
COLD: Groups = {  # python -m prepare.cold
    "traces": [
        Flag("traces", str, "", "recorded ones (JSON lines); else scripted from --data and --search", "FILE"),
        Flag("least", float, 0.0, "only traces with an f1 of at least this", most=1),
        replace(DATA, help="questions to script traces from"),
        LIMIT,
        SEARCH,
        *DOCUMENTS,
        Flag("scripts", int, 320, "traces to script"),
        Flag("searching", float, 0.3, "share of them that search; the others answer at once", most=1),
    ],
    "the policy": [replace(POLICY, default=NEEDED), POLICY_PROMPT, *ADAPTED, *LENGTHS],
    "learning": [
        Flag("steps", int, 80, "of fine-tuning"),
        Flag("lr", float, 1e-3, "at the start; falls linearly to 0"),
        Flag("tokens", int, 512, "a step"),
        Flag("micro", int, 1024, "tokens a pass, padding included: sets the memory"),
        Flag("held", int, 32, "traces held out (at most a tenth)", least=0),
        Flag("every", int, 30, "steps between held-out losses, and between saves"),
    ],
    "output": [Flag("out", str, NEEDED, "directory for the adapter (PEFT) and its prompts", "DIR"), RESUME],
    "the machine": [SEED, *MACHINE],
}
COMMANDS: dict[str, Groups] = {"train": TRAIN, "eval": EVAL, "cold": COLD} | {
    verb: groups for verb, (_, groups) in VERBS.items()
}
# fmt: on

# ------------------------------------------------------------------------------------------------- settling


def given_to(command: str, doc: str, argv: list[str] | None = None) -> dict[str, object]:
    """The flags that were given to train or eval."""
    return parse(doc, COMMANDS[command], argv, tasks.defaults(tasks.FIRST, command))


def given_to_verb(doc: str, argv: list[str] | None = None) -> tuple[str, dict[str, object]]:
    """The verb and the flags that were given to simulator.py."""
    return parse_verb(doc, VERBS, argv, {verb: tasks.defaults(tasks.FIRST, verb) for verb in VERBS})


def machine(device: str, dtype: str) -> tuple[str, str]:
    """Names of device and type (a key of DTYPES): by default a GPU in bf16, else the CPU in fp32.

    Raises ValueError for a device that torch does not know or does not see.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {device} is unknown or not supported: use cpu, cuda or cuda:1")
    if kind == "cuda" and ranks.world() > 1 and (":" in device or torch.cuda.device_count() <= ranks.LOCAL):
        few = f"of {torch.cuda.device_count()} here: start no more, and leave out --device {device}"
        raise ValueError(f"each process takes one GPU, {few}")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device}, but torch sees no such GPU: use --device cpu, or a CUDA build of torch"
        )
    return device, dtype or ("fp32" if kind == "cpu" else "bf16")


def settle(command: str, given: dict[str, object]) -> argparse.Namespace:
    """Every flag with its value: what was given, else its default. Raises ValueError for nonsense.

    Also `command`; `task`, the name of the task ("" for question files and real engines); `planned`, whether
    the memory plan has settled its flags; and `pages` and `lend`, which it settles too (see `plan.Settings`).
    """
    a = argparse.Namespace(command=command, task=tasks.named(command, given), planned=False)
    a.pages, a.lend = 0, False
    a.device, a.dtype = machine(given.get("device", ""), given.get("dtype", ""))
    usual = tasks.defaults(a.task, command)
    real_on_cpu = not a.task and a.device == "cpu"
    for f in flags_of(command):
        if f.name not in ("device", "dtype"):
            default = f.cpu if real_on_cpu and f.cpu is not None else usual.get(f.name, f.default)
            setattr(a, f.key, given.get(f.name, default))
    follow(a, given)
    check(a)
    return a


def flags_of(command: str) -> list[Flag]:
    return [f for flags in COMMANDS[command].values() for f in flags]


def follow(a: argparse.Namespace, given: dict[str, object]) -> None:
    """Fill in what follows from other flags."""
    if a.command == "train":
        for part, usual in zip(PARTS, RECIPES[a.algorithm]):
            if part.replace("_", "-") not in given:
                setattr(a, part, usual)
        if "substring" in compat.chosen(a.compat):
            a.reward = "cover-em"
        a.critic_lr = min(10 * a.lr, MOST[float]) if a.critic_lr is None else a.critic_lr
        a.data, a.sim = a.data or "nq,hotpotqa", a.sim or a.policy
        if "sft-steps" not in given and (is_address(a.sim) or a.sim_adapter or a.sim in (OWN, REAL)):
            a.sft_steps = 0  # that simulator has been fine-tuned already
        if "seat-tokens" not in given:
            a.seat_tokens = max(a.seat_tokens, a.episode_tokens)
    if a.command == "eval":
        if "policy" not in given and a.ask is None:
            a.policy = ""  # the engine alone
        if not a.search:
            a.search = "none" if a.mode in ("direct", "cot") else a.task if a.ask is not None else ""
    if a.command in ("eval", "collect"):
        half = a.episode_tokens // 2
        own = a.command == "eval" and a.ask is not None and "prompt-tokens" not in given
        a.prompt_tokens = half if own else min(a.prompt_tokens, half)  # a question of one's own may be long


def check(a: argparse.Namespace) -> None:
    """Raise ValueError for what cannot work, before anything is loaded or written."""
    machine(a.device, a.dtype)
    for f in flags_of(a.command):
        f.check(getattr(a, f.key, None))
    if getattr(a, "sim_bits", "") and (is_address(a.sim) or a.sim in ("", a.policy, OWN, REAL)):
        raise ValueError("--sim-bits is for a --sim that is a body of its own: leave it out, or give --bits")
    for wrong, message in COMPLAINTS.get(a.command, lambda a: ())(a):
        if wrong:
            raise ValueError(message)


Complaints = Iterator[tuple[object, str]]


def _train(a: argparse.Namespace) -> Complaints:
    tuned = a.sim_adapter or a.sft_steps
    served = is_address(a.sim) and tuned
    none = a.sim in (OWN, REAL) and tuned
    yield none, f"--sim {a.sim} has no simulator for --sim-adapter or --sft-steps"
    real = a.sim == REAL and not a.task and not a.eval_search
    yield real, f"--sim {REAL} needs one: --eval-search ENGINE, with --eval-data"
    alone = a.advantage in ALONE
    yield a.group < 2 and not alone, "--group 1 has no siblings to be compared with: use 2 or more"
    yield a.strata and alone, f"--strata is for comparisons: --advantage {a.advantage} makes none"
    yield (
        a.guard and a.updates < 2,
        "--guard needs --updates 2: the first has lost no likelihood yet",
    )
    yield (
        a.seat_tokens < a.episode_tokens,
        f"--seat-tokens {a.seat_tokens} cannot hold an episode of {a.episode_tokens}: raise it",
    )
    yield _crowded(a)
    yield (
        a.task and (a.eval_data or a.eval_search),
        f"the task {a.task} brings its own held-out questions: --eval-data needs --data FILE",
    )
    yield a.sim_adapter and a.sft_steps, "--sim-adapter is fine-tuned already: leave --sft-steps out"
    yield served, "--sim-adapter and --sft-steps cannot be sent to a server: let --sim serve that simulator"
    yield (
        a.sft_steps and not a.task,
        "--sft-steps is for the toy task: use simulator.py sft, then --sim-adapter",
    )
    yield (
        bool(a.eval_data) != bool(a.eval_search),
        "--eval-data and --eval-search go together: questions, and the engine that answers them",
    )


def _eval(a: argparse.Namespace) -> Complaints:
    if a.compare:
        return
    yield not a.search, f"--search is missing: sim, {ENGINE}, or toy"
    alone = not a.policy and not a.search.startswith("bm25:")
    yield alone, f"--search {a.search} needs a --policy: only bm25 can be measured alone"
    searches = a.mode in ("direct", "cot") and a.search != "none"
    yield searches, f"--mode {a.mode} does not search: leave out --search {a.search}"
    yield a.ask is not None and not a.ask.strip(), "--ask needs a question"
    untold = a.ask is not None and a.search == "sim" and not a.answer
    yield untold, "a simulator is told the golden answer, in order to write documents: give --answer"
    if a.search == "sim":
        yield from _served(a)
    noise = a.noise and a.search not in ("sim", *tasks.NAMES)
    yield noise, f"--noise is for --search sim and toy: {a.search} returns what it finds"
    other = a.search != "sim" and (a.sim or a.sim_adapter or a.sim_prompt)
    yield other, f"--sim, --sim-adapter and --sim-prompt are for --search sim, not {a.search}"
    yield _nowhere(a)
    yield a.resume and not a.json, "--resume goes on with what --json FILE has kept: give both"


def _crowded(a: argparse.Namespace) -> tuple[object, str]:
    room = a.episode_tokens - a.prompt_tokens - 2 * min(a.turn_tokens, 64)
    return room < 0, "--episode-tokens leaves no room behind a prompt of --prompt-tokens: raise it"


def _collect(a: argparse.Namespace) -> Complaints:
    yield _crowded(a)
    other = a.task and a.search != a.task
    yield other, f"--data {a.task} is answered by --search {a.task}, not {a.search}"
    noise = a.noise is not None and not a.task
    yield noise, f"--noise is for --search toy: {a.search} returns what it finds"
    there = Path(a.out).exists() and not a.resume
    yield there, f"--out {a.out} is there already: choose another, or add --resume to go on with it"


def _cold(a: argparse.Namespace) -> Complaints:
    yield not a.traces and not (a.data and a.search), "cold needs --traces, or --data and --search"
    yield a.traces and a.search, "--traces are recorded: leave out --search, which is for scripting some"


def _nowhere(a: argparse.Namespace) -> tuple[object, str]:
    nowhere = a.json and (Path(a.json).is_dir() or not Path(a.json).parent.is_dir())
    return nowhere, f"--json {a.json} is not a file in a directory that exists"


def _audit(a: argparse.Namespace) -> Complaints:
    yield _nowhere(a)
    both = bool(a.rows) == bool(a.data)
    yield both, "audit needs --rows, or --data, and not both: rows or questions that it was not trained on"
    yield from _served(a)


def _served(a: argparse.Namespace) -> Complaints:
    own = is_address(a.sim) and a.sim_adapter
    yield own, "--sim-adapter cannot be sent to a server: let --sim serve it"


COMPLAINTS = {
    "train": _train,
    "eval": _eval,
    "cold": _cold,
    "collect": _collect,
    "audit": _audit,
    "write": _served,
}
