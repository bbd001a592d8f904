"""The story: a policy learns to search, and nobody searches.

    python train.py                          a tiny body in a toy world, on a laptop, in minutes
    python train.py --sim 3b --policy 3b     Qwen2.5-3B-Instruct as policy, simulator and reference on one GPU
    python train.py --policy DIR --sim DIR --data questions.jsonl --out runs/mine [--resume]

One step: ask questions, act (episodes against the simulator), judge (F1 of the answers), learn (GRPO on the
policy's adapter), tell (a line, a log, now and then a trajectory). `main` is that loop, and reads from top to
bottom.

What this is not: a framework. There are no callbacks and no configuration files; fork the loop.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import eval as judge_of
import grpo
import model as models
import plan
import simulator as simulators
import toy
from collect import audit_figures
from model import POLICY, SIMULATOR, Model
from prompts import load_policy_words
from questions import exact_match, f1, load_questions
from rollout import WORDS, Engine, Limits, Query, Question, Search, Trajectory, Words, episode, prompt, show
from search import open_search
from servers import Chat, is_address
from simulator import Simulator, SimWords
from tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------------ flags


@dataclass(frozen=True)
class Flag:
    """A flag: name, type (a tuple: one of these), default, and the default in the toy world, or for a real
    checkpoint on a machine without a GPU, where it is another."""

    name: str
    kind: type | tuple[str, ...]
    default: object
    help: str
    toy: object = None
    cpu: object = None


# This table is the documentation, and nothing has a second default anywhere.
FLAGS = [
    "bodies",
    Flag("policy", str, "tiny", "preset, directory or hub id of the body that learns to search"),
    Flag(
        "sim",
        str,
        "",
        "the simulator's body (the policy's: one copy plays every role), or http://HOST:PORT/v1",
    ),
    Flag("adapter", str, "", "start from this policy adapter (PEFT directory)"),
    Flag("sim-adapter", str, "", "fine-tuned simulator (PEFT directory); without it, the body is prompted"),
    Flag("policy-prompt", str, "", "JSON file with other words for the policy: prompt, notice, system"),
    Flag("sim-prompt", str, "", "sft, prompted, or a JSON file with other words for the simulator"),
    Flag("dtype", ("fp32", "bf16", "fp16"), "", "of the bodies (bf16 on a GPU, else fp32)"),
    Flag("device", str, "", "cuda where there is one, else cpu"),
    "questions",
    Flag("data", str, "", "question files, comma-separated (nq,hotpotqa; for the tiny body: the toy world)"),
    Flag("eval-data", str, "", "held-out question files, scored before and after"),
    Flag(
        "eval-search", str, "", "the engine that answers them: none, bm25:CORPUS, http://HOST:PORT or serpapi"
    ),
    Flag("eval-questions", int, 500, "how many of them (0: no evaluation)", toy=400),
    "how much",
    Flag("steps", int, 200, "updates of the policy", toy=64),
    Flag("questions", int, 64, "a step", toy=16),
    Flag("group", int, 5, "episodes a question (siblings), compared with each other", toy=8),
    Flag("seed", int, 0, "of everything that is random"),
    "the curriculum",
    Flag("noise-start", float, 0.0, "probability of noisy documents at the first step"),
    Flag("noise-end", float, 0.5, "and at the last"),
    Flag(
        "noise-shape",
        ("exponential", "linear", "constant", "reverse"),
        "exponential",
        "the paper's rises late",
    ),
    Flag("shared-coins", bool, False, "siblings share their noise coins"),
    "learning",
    Flag(
        "algorithm",
        ("grpo", "reinforce"),
        "grpo",
        "advantages: in units of the group's spread, or leave-one-out",
    ),
    Flag("lr", float, 1e-5, "at the start; falls linearly to 0", toy=2e-3),
    Flag("rank", int, 16, "of the LoRA adapter"),
    Flag("alpha", float, 32.0, "its scale, times the rank"),
    Flag("clip", float, 0.2, "of the probability ratio"),
    Flag("kl", float, 1e-3, "coefficient of the KL to the reference (0 saves its forward pass)"),
    Flag("entropy", float, 0.0, "coefficient of the entropy bonus"),
    Flag("grad-clip", float, 1.0, "largest norm of a gradient"),
    Flag("weight-decay", float, 0.01, "of AdamW"),
    Flag("updates", int, 1, "optimiser steps a rollout: more than one makes the clip matter"),
    Flag(
        "micro-tokens",
        int,
        0,
        "padded tokens in one forward and backward pass (0: as memory allows)",
        toy=4096,
    ),
    Flag(
        "recompute",
        bool,
        False,
        "keep no activations of the layers (chosen where memory is short; a third slower)",
    ),
    Flag("reward", ("f1", "em"), "f1", "of the answer, as in questions.py"),
    Flag("shuffle-rewards", bool, False, "a control: shuffled among siblings, rewards can teach nothing"),
    "lengths, in tokens",
    Flag("turns", int, 5, "searches before the last generation (not tokens)", toy=4, cpu=2),
    Flag("prompt-tokens", int, 2048, "a longer question is an error", toy=16, cpu=1024),
    Flag("episode-tokens", int, 4096, "prompt, turns and documents together", toy=192, cpu=1536),
    Flag("turn-tokens", int, 500, "a turn of the policy", toy=20, cpu=128),
    Flag("observation-tokens", int, 500, "the documents of one search", toy=32, cpu=256),
    Flag("sim-tokens", int, 600, "what the simulator writes for one search", toy=40, cpu=256),
    Flag("seat-tokens", int, 4096, "an episode, or a simulator's prompt and documents", toy=256, cpu=2048),
    Flag("seats", int, 0, "rows decoded together (not tokens; 0: as many as fit and are of use)"),
    Flag("memory", float, 0.0, "GiB to plan for (0: what is free, on a CPU half of it)"),
    "the simulator's fine-tuning (toy world only; elsewhere: python simulator.py sft, then --sim-adapter)",
    Flag("sft-steps", int, 0, "updates of the simulator before the policy's first", toy=250),
    Flag("sft-lr", float, 5e-3, "falls linearly to 0"),
    "output",
    Flag("out", str, "", "directory of the run (runs/<date-time>)"),
    Flag("resume", bool, False, "go on with the run in --out"),
    Flag("save-every", int, 10, "steps between saves; Ctrl-C saves too"),
    Flag("show-every", int, 20, "steps between coloured trajectories"),
]


def parse_arguments(argv: list[str] | None = None) -> dict[str, object]:
    """Only the flags that were given, with their values."""
    p = models.OneLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = p
    for f in FLAGS:
        if isinstance(f, str):
            group = p.add_argument_group(f)
        elif f.kind is bool:
            group.add_argument(f"--{f.name}", action="store_true", default=argparse.SUPPRESS, help=f.help)
        else:
            kind = {"choices": f.kind} if isinstance(f.kind, tuple) else {"type": f.kind, "metavar": "X"}
            small = "".join(f", {k} {v}" for k, v in (("toy", f.toy), ("cpu", f.cpu)) if v is not None)
            text = f.help if f.default == "" else f"{f.help} [{f.default}{small}]"
            group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **kind)
    return {k.replace("_", "-"): v for k, v in vars(p.parse_args(argv)).items()}


def settle(given: dict[str, object]) -> argparse.Namespace:
    """Every flag with its value: what was given, else its default. Raises ValueError for nonsense."""
    device, dtype = models.machine(given.get("device"), given.get("dtype"))
    in_toy = given.get("policy", "tiny") == "tiny" and not given.get("data")
    column = "toy" if in_toy else "cpu" if device == "cpu" else "default"
    a = argparse.Namespace(toy=in_toy, going_on=False)
    for f in FLAGS:
        if isinstance(f, Flag):
            default = getattr(f, column)
            setattr(a, f.name.replace("-", "_"), given.get(f.name, f.default if default is None else default))
    a.device, a.dtype, a.sim = device, dtype, a.sim or a.policy
    a.data = a.data or ("toy" if in_toy else "nq,hotpotqa")
    if "sft-steps" not in given and (is_address(a.sim) or a.sim_adapter):
        a.sft_steps = 0  # that simulator has been fine-tuned already
    check(a)
    return a


def check(a: argparse.Namespace) -> None:
    """Raise ValueError for values that cannot work, before anything is loaded or written."""
    if a.group < 2:
        raise ValueError("--group 1 has no siblings to be compared with: use 2 or more")
    least = dict.fromkeys(("seed", "turns", "seats", "micro_tokens", "eval_questions", "sft_steps"), 0)
    for f in FLAGS:
        if isinstance(f, Flag) and f.kind in (int, float):
            value, low = getattr(a, f.name.replace("-", "_")), least.get(f.name.replace("-", "_"), 1)
            if f.kind is int and value < low:
                raise ValueError(f"--{f.name} must be at least {low}, not {value}")
            if f.kind is float and not 0 <= value < math.inf:
                raise ValueError(f"--{f.name} must be a number from 0 on, not {value}")
    for name in ("noise_start", "noise_end"):
        if not 0 <= getattr(a, name) <= 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is a probability, within 0..1, not {getattr(a, name)}"
            )
    if a.seat_tokens < a.episode_tokens:
        raise ValueError(
            f"--seat-tokens {a.seat_tokens} cannot hold an episode of {a.episode_tokens}: raise it"
        )
    if a.prompt_tokens + 2 * min(a.turn_tokens, 64) > a.episode_tokens:
        raise ValueError("--episode-tokens leaves no room behind a prompt of --prompt-tokens: raise it")
    if a.toy and (a.eval_data or a.eval_search):
        raise ValueError("the toy world brings its own held-out questions: --eval-data needs --data")
    if a.sim_adapter and a.sft_steps:
        raise ValueError("--sim-adapter is fine-tuned already: leave --sft-steps out")
    if is_address(a.sim) and (a.sim_adapter or a.sft_steps):
        raise ValueError(
            "--sim-adapter and --sft-steps cannot be sent to a server: let --sim serve that simulator"
        )
    if a.sft_steps and not a.toy:
        raise ValueError("--sft-steps is for the toy world: use simulator.py sft, then --sim-adapter")
    if bool(a.eval_data) != bool(a.eval_search):
        raise ValueError(
            "--eval-data and --eval-search go together: questions, and the engine that answers them"
        )
    if a.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but torch sees no GPU: install a CUDA build of torch, or use --device cpu"
        )


# ------------------------------------------------------------------------------------------------ the setting


@dataclass
class Setting:
    """What the loop needs to know of the world: made once, from the flags."""

    bodies: dict[int, tuple[Model, Tokenizer]]
    questions: list[Question]
    held: list[Question]  # scored before and after
    engine_of_held: Search | None
    words: Words
    limits: Limits
    simulator: Simulator
    engine: Engine

    @property
    def body(self) -> Model:
        return self.bodies[POLICY][0]

    @property
    def tok(self) -> Tokenizer:
        return self.bodies[POLICY][1]


def load_setting(a: argparse.Namespace) -> Setting:
    """What is cheap first (files, the plan), then bodies; two roles of one checkpoint share one body."""
    limits = Limits(a.prompt_tokens, a.episode_tokens, a.turn_tokens, a.observation_tokens, a.turns)
    homes = {POLICY: models.resolve(a.policy)}
    server = Chat(a.sim) if is_address(a.sim) else None
    if server is None:
        homes[SIMULATOR] = models.resolve(a.sim)
    questions, held, engine_of_held = questions_and_engine(a)
    words = load_policy_words(a.policy_prompt) if a.policy_prompt else toy.WORDS if a.toy else WORDS
    sim_words = load_sim_words(a)
    dtype = models.DTYPES[a.dtype]
    toks = {home: Tokenizer.load(home) for home in set(homes.values())}
    check_prompts(questions + held, toks[homes[POLICY]], words, limits.prompt)
    print(plan_memory(a, list(dict.fromkeys(homes.values()))), flush=True)
    loaded = {home: (models.load(home, dtype, a.device), tok) for home, tok in toks.items()}
    bodies = {role: loaded[home] for role, home in homes.items()}
    body = bodies[POLICY][0]
    if a.adapter:
        models.load_adapter(body, POLICY, a.adapter)
    else:
        body.add_role(POLICY, a.rank, a.alpha, a.seed)
    if a.sim_adapter:
        models.load_adapter(bodies[SIMULATOR][0], SIMULATOR, a.sim_adapter)
    elif a.sft_steps:
        bodies[SIMULATOR][0].add_role(SIMULATOR, a.rank, a.alpha, a.seed)
    engine = Engine(bodies, a.seats, a.seat_tokens, prefill=a.micro_tokens)
    tok = bodies.get(SIMULATOR, (None, None))[1]
    simulator = Simulator(tok, sim_words, shared=a.shared_coins, limit=a.sim_tokens, server=server)
    return Setting(bodies, questions, held, engine_of_held, words, limits, simulator, engine)


def plan_memory(a: argparse.Namespace, homes: list[Path]) -> str:
    """Settle the flags that memory decides; the budget as text. Raises ValueError where nothing fits.

    A run that goes on keeps what was settled at its start, whatever is free today.
    """
    shapes = [plan.shape(str(home)) for home in homes]
    memory = a.memory * 2**30 or free_memory(a.device)
    rank, sim_rank = (rank_of(a, adapter) for adapter in (a.adapter, a.sim_adapter))
    settings = plan.Settings(
        a.seats, a.seat_tokens, a.micro_tokens, a.recompute or None, rank,
        sim_rank if a.sim_adapter or a.sft_steps else 0, models.DTYPES[a.dtype], a.device != "cpu",
    )  # fmt: skip
    if a.going_on:
        return f"as planned at the start: {settings}"
    useful = a.questions * a.group * (1 if is_address(a.sim) else 2)  # all may wait for documents at once
    settings, budget = plan.fit(shapes, memory, settings, useful)
    a.seats, a.micro_tokens, a.recompute = settings.seats, settings.micro_tokens, bool(settings.recompute)
    return f"plan for {memory / 2**30:.1f} GiB: {settings}\n{plan.table(budget)}"


def rank_of(a: argparse.Namespace, adapter: str) -> int:
    """The rank of an adapter on disk, or of the one that is to be made."""
    file = Path(adapter) / "adapter_config.json"
    return models.read_json(file, "a PEFT adapter directory", r=int)["r"] if adapter else a.rank


def free_memory(device: str) -> float:
    """Bytes to plan for: what a GPU has free; half of it on a CPU, where other programs live too."""
    return torch.cuda.mem_get_info()[0] if device != "cpu" else 0.5 * models.memory(free=True)


def check_prompts(questions: list[Question], tok: Tokenizer, words: Words, limit: int) -> None:
    """Raise ValueError for a question whose prompt is too long: at the start, not when it is drawn."""
    frame = len(prompt(Question("", ()), tok, words))
    for q in questions:
        if frame + len(q.text.encode()) + 1 > limit and (n := len(prompt(q, tok, words))) > limit:
            raise ValueError(
                f"the prompt of {q.text[:60]!r} has {n} tokens, over {limit}: raise --prompt-tokens"
            )


def questions_and_engine(a: argparse.Namespace) -> tuple[list[Question], list[Question], Search | None]:
    """Training questions, held-out questions, and the real engine for the latter."""
    if a.toy:
        world, other = toy.World(2 * a.seed), toy.World(2 * a.seed + 1)  # facts of one are false in the other
        return world.questions(1000), other.questions(a.eval_questions), other.lookup
    questions = [q for name in a.data.split(",") for q in load_questions(name, train=True)]
    if not a.eval_data:
        return questions, [], None
    held = [q for name in a.eval_data.split(",") for q in load_questions(name)]
    held = random.Random(0).sample(held, min(a.eval_questions, len(held)))
    return questions, held, open_search(a.eval_search)


def load_sim_words(a: argparse.Namespace) -> SimWords:
    if a.toy and not a.sim_prompt:
        return toy.SIM_WORDS
    return simulators.words_for(a.sim_adapter, a.sim_prompt)


# --------------------------------------------------------------------------------------------- the five verbs


def ask(s: Setting, a: argparse.Namespace, step: int) -> list[tuple[int, Question]]:
    """The step's questions with their numbers: all of them once before any comes again, in a seeded order.

    A question that comes twice in one step has another number, else its groups would be copies of each other.
    """
    n, out, drawn = len(s.questions), [], Counter()
    draws = range(step * a.questions, (step + 1) * a.questions)
    orders = {
        epoch: random.Random(f"{a.seed} {epoch}").sample(range(n), n) for epoch in {i // n for i in draws}
    }
    for i in draws:
        number = orders[i // n][i % n]
        out.append((number + n * drawn[number], s.questions[number]))
        drawn[number] += 1
    return out


def act(s: Setting, a: argparse.Namespace, step: int, asked: list[tuple[int, Question]]) -> list[Trajectory]:
    """`group` episodes a question against the simulator at this step's noise; siblings in a row."""
    noise = simulators.p_noise(step, max(1, a.steps - 1), a.noise_start, a.noise_end, a.noise_shape)
    search = replace(s.simulator, p_noise=noise)
    if a.toy:
        search = toy.shuffled(search)
    episodes = [
        episode(question, search, s.tok, s.limits, s.words, 1.0, (a.seed, step, number, sibling))
        for number, question in asked
        for sibling in range(a.group)
    ]
    with progress(f"step {step + 1}", len(episodes)) as bar:
        return s.engine.run(episodes, lambda done, of, stats: bar.update(done - bar.n))


def progress(label: str, total: int) -> tqdm:
    """A bar for what takes long, gone when it is done, and silent where nobody watches."""
    return tqdm(total=total, desc=label, unit=" episodes", leave=False, disable=None)


def judge(trajectories: list[Trajectory], a: argparse.Namespace) -> torch.Tensor:
    """Rewards (Q, G): the metric itself, of the sampled answer against the golden ones."""
    score = f1 if a.reward == "f1" else exact_match
    return torch.tensor([score(t.answer, t.question.answers) for t in trajectories]).view(-1, a.group)


def learn(
    s: Setting,
    a: argparse.Namespace,
    step: int,
    trajectories: list[Trajectory],
    rewards: torch.Tensor,
    optimizer: torch.optim.Optimizer,
) -> dict[str, float]:
    """`updates` optimiser steps on the groups that teach something. Returns mean figures."""
    if a.shuffle_rewards:
        rewards = grpo.shuffle_siblings(rewards, hash((a.seed, step)))
    adv = grpo.advantages(rewards, a.algorithm)
    kept = grpo.informative(rewards).nonzero()[:, 0].tolist()
    optimizer.param_groups[0]["lr"] = a.lr * (1 - step / a.steps)
    objective = grpo.Objective(a.clip, a.kl, a.entropy, a.grad_clip)
    updates = []
    for part in range(a.updates):
        rows = [q * a.group + g for q in kept[part :: a.updates] for g in range(a.group)]
        batches = grpo.make_batches(
            [trajectories[r] for r in rows], adv.flatten()[rows].tolist(), a.micro_tokens, a.device
        )
        if batches:
            updates.append(grpo.learn(s.body, batches, optimizer, objective, a.recompute))
    means = {k: sum(u[k] for u in updates) / len(updates) for k in updates[0]} if updates else {}
    return means | {"skipped_groups": len(rewards) - len(kept)}


def figures_of(trajectories: list[Trajectory], rewards: torch.Tensor, count: int) -> dict:
    """What the step's episodes were like; count: documents that a search shall give."""
    summary = judge_of.summarise(trajectories)
    written = [pair for t in trajectories for pair in t.searches]
    noisy = sum(bool(documents.noisy) for _, documents in written)
    return {
        "reward": rewards.mean().item(),
        "em": summary["em"],
        "f1": summary["f1"],
        "searches": summary["searches"],
        "length": sum(len(t.ids) for t in trajectories) / len(trajectories),
        "sampled": sum(sum(t.mask) for t in trajectories) / len(trajectories),
        "invalid": sum(t.invalid for t in trajectories) / len(trajectories),
        "ends": summary["ends"],
        "noise": noisy / max(1, len(written)),
        "simulator": audit_figures(written, count),  # its documents: answer, repeats, distinct, words, formed
    }


def add_audit(whole: dict, step: dict) -> None:
    """Weigh a step's audit into the whole run's: {quality: {"n", means}}, n searches each."""
    for quality, part in step.items():
        old = whole.setdefault(quality, {"n": 0})
        n, more = old["n"], part["n"]
        for name in part.keys() - {"n"}:
            old[name] = (n * old.get(name, 0.0) + more * part[name]) / max(1, n + more)
        old["n"] = n + more


def tell(a: argparse.Namespace, s: Setting, step: int, row: dict, trajectories: list[Trajectory]) -> None:
    """One line a step on the terminal and in log.jsonl; now and then a trajectory in colour."""
    ends = " ".join(f"{k} {v}" for k, v in row["ends"].items())
    left = row["seconds_left"]
    print(
        f"step {step + 1:3d}/{a.steps}  reward {row['reward']:.3f}  em {row['em']:.3f}  "
        f"searches {row['searches']:.2f}  length {row['length']:.0f}  noise {row['noise']:.2f}  "
        f"kl {row.get('kl', 0):.4f}  ratio {row.get('ratio', 1):.3f}  gap {row.get('gap', 0):.1e}  "
        f"grad {row.get('grad_norm', 0):.2f}  "
        f"act {row['seconds_act']:.1f}s  learn {row['seconds_learn']:.1f}s  "
        f"{row['tokens_per_second']:,.0f} tok/s  left {left / 60:.1f}m  [{ends}]",
        flush=True,
    )
    with open(Path(a.out) / "log.jsonl", "a") as f:
        f.write(json.dumps({"step": step + 1, **row}) + "\n")
    if step == 0 or (step + 1) % a.show_every == 0:
        best = max(trajectories, key=lambda t: (len(t.searches), t.answer is not None))
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print("\n" + show(best, s.tok, colour) + f"\n  -> golden: {best.question.answers}\n")


# ------------------------------------------------------------------------------------------- before and after


NAMES = {"": "sampled", "_greedy": "greedy", "_noise": "sampled, engine noise .3"}


def measure(s: Setting, a: argparse.Namespace) -> dict[str, dict]:
    """Held-out questions through the real engine: sampled, greedy, and in the toy world with engine noise."""
    ways = {"": (s.engine_of_held, 1.0), "_greedy": (s.engine_of_held, 0.0)}
    if a.toy:
        ways["_noise"] = (partial(s.engine_of_held, noise=0.3), 1.0)
    out = {}
    for suffix, (search, temperature) in ways.items():
        address = (a.seed, 1_000_000)  # no step is called that
        with progress(f"held-out, {NAMES[suffix]}", len(s.held)) as bar:
            tell = partial(judge_of.show_progress, bar)
            summary, trajectories = judge_of.evaluate(
                s.engine, s.tok, s.held, search, s.limits, s.words, temperature, address, tell
            )
        out[suffix] = {k: summary[k] for k in ("f1", "em", "cover_em", "searches", "n", "by_hop")}
        if a.toy:
            out[suffix]["skips"] = toy.skipping(trajectories)  # does it live off the simulator's leak?
    return out


def table_of(**times: dict[str, dict]) -> str:
    """The table of `measure` before, or before and after: table_of(before=..., after=...)."""
    rows = {}
    for suffix in times["before"]:
        for when, measured in times.items():
            part = measured[suffix]
            hops = {f"f1 {h} hop": v["f1"] for h, v in part["by_hop"].items()}
            rows[f"{NAMES[suffix]}, {when}"] = {k: v for k, v in part.items() if k != "by_hop"} | hops
    return judge_of.table(rows)


def prepare(s: Setting, a: argparse.Namespace) -> dict:
    """What comes before the first step: held-out questions, in the toy world also the simulator's tuning."""
    facts: dict = {"before": {}, "simulator": {}}
    if s.held and a.eval_questions:
        facts["before"] = measure(s, a)
        print(table_of(before=facts["before"]), flush=True)
    if a.sft_steps:
        tune_simulator(s, a)
        home = Path(a.out) / "simulator"
        models.save_adapter(s.bodies[SIMULATOR][0], SIMULATOR, home, a.sim)
        simulators.save_words(s.simulator.words, home / simulators.WORDS_FILE)
    preview(s)
    if a.toy and not is_address(a.sim):
        facts["simulator"] = toy.audit(partial(write, s), seed=a.seed)
        print("simulator: ", *(f"{k} {v:.3f} " for k, v in facts["simulator"].items()), flush=True)
    return facts


def finish(s: Setting, a: argparse.Namespace, facts: dict, began: float) -> None:
    """What comes after the last step: the held-out questions again, result.json and the table."""
    after = measure(s, a) if facts["before"] else {}
    result: dict = {f"before{k}": v for k, v in facts["before"].items()}
    result |= {f"after{k}": v for k, v in after.items()}
    simulator = facts["simulator"]
    if not a.toy:  # no leak can be measured where nobody knows the facts; the others are the steps' own
        hits = {f"{quality}_hit": simulator.get(quality, {}).get("answer") for quality in ("useful", "noisy")}
        simulator = hits | {"leak": None} | simulator
    result |= {"simulator": simulator, "seconds": time.monotonic() - began}
    (Path(a.out) / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    if after:
        print("\n" + table_of(before=facts["before"], after=after))
    print(f"{result['seconds']:.0f} s; everything is in {a.out}")


def write(s: Setting, queries: list[Query], noisy: bool) -> list[str]:
    """What the simulator writes for queries, all useful or all noisy."""
    simulator = replace(s.simulator, p_noise=float(noisy))
    return [documents.text for documents in s.engine.run(simulator(query) for query in queries)]


def preview(s: Setting) -> None:
    """Print what the simulator writes, useful and noisy, when the first question itself is the query."""
    query = Query(s.questions[0].text, s.questions[0])
    useful, noisy = (write(s, [query], quality)[0] for quality in (False, True))
    print(f"the simulator's documents for {query.text!r} (golden: {query.question.answers[0]})")
    width = shutil.get_terminal_size().columns
    print(simulators.side_by_side(f"USEFUL\n{useful}", f"NOISY\n{noisy}", width) + "\n", flush=True)


def tune_simulator(s: Setting, a: argparse.Namespace) -> None:
    """The toy world's lightweight fine-tuning of the simulator: makes it obey its two orders."""
    sim, tok = s.bodies[SIMULATOR]
    rows = toy.rows(80 * a.sft_steps, a.seed)  # more than the steps will see
    run = simulators.sft(
        sim, tok, s.simulator.words, rows, a.sft_steps, a.sft_lr, every=a.sft_steps, seed=a.seed
    )
    for p in run:
        if p.step % 25 == 0 or p.held is not None:
            print(p, flush=True)


# ------------------------------------------------------------------------------------------- saving, resuming


def open_run(given: dict[str, object]) -> tuple[argparse.Namespace, bool]:
    """Settle the flags against the directory of the run. Returns them, and whether a run goes on."""
    if "resume" not in given:
        a = settle(given)
        a.out = a.out or time.strftime("runs/%Y-%m-%d_%H-%M-%S")
        if Path(a.out).exists() and (not Path(a.out).is_dir() or any(Path(a.out).iterdir())):
            raise ValueError(
                f"--out {a.out} already holds something: choose another, or add --resume to go on with it"
            )
        return a, False
    if "out" not in given:
        raise ValueError("--resume needs the --out of the run to go on with")
    file = Path(given["out"]) / "args.json"
    old = models.read_json(file, "the directory of a run", given=dict, settled=dict)
    free = ("out", "resume", "save-every", "show-every", "seats", "micro-tokens", "recompute", "memory")
    unlike = [k for k, v in given.items() if k not in free and v != old["settled"].get(k.replace("-", "_"))]
    if unlike:
        was = ", ".join(f"--{k} {old['settled'].get(k.replace('-', '_'))}" for k in unlike)
        raise ValueError(f"--resume with other arguments: the run in {given['out']} was begun with {was}")
    planned = {k: old["settled"][k.replace("-", "_")] for k in ("seats", "micro-tokens", "recompute")}
    a = settle(old["given"] | planned | given)
    a.going_on = True
    return a, True


def save_state(a: argparse.Namespace, s: Setting, optimizer: torch.optim.Optimizer, facts: dict) -> None:
    """All that a run needs to go on: adapters, the optimiser's moments, some figures. Whole or not at all."""
    tensors = {"policy": s.body.adapter(POLICY).detach()}
    state = optimizer.state.get(s.body.adapter(POLICY), {})
    tensors |= {f"adam.{k}": v for k, v in state.items()}
    if SIMULATOR in s.bodies and SIMULATOR in s.bodies[SIMULATOR][0].roles:
        tensors["simulator"] = s.bodies[SIMULATOR][0].adapter(SIMULATOR).detach()
    tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
    part = Path(a.out) / "state.part"
    save_file(tensors, part, metadata={"facts": json.dumps(facts)})
    os.replace(part, Path(a.out) / "state.safetensors")
    models.save_adapter(s.body, POLICY, Path(a.out) / "policy", a.policy)


def load_state(a: argparse.Namespace, s: Setting, optimizer: torch.optim.Optimizer) -> dict:
    """Undo `save_state`; returns its figures. Without a state the run had not got through its first save."""
    path = Path(a.out) / "state.safetensors"
    if not path.exists():
        return {}
    with safe_open(path, framework="pt", device=a.device) as f:
        facts, names = json.loads(f.metadata()["facts"]), set(f.keys())
        s.body.adapter(POLICY).data.copy_(f.get_tensor("policy"))
        if "simulator" in names:
            s.bodies[SIMULATOR][0].adapter(SIMULATOR).data.copy_(f.get_tensor("simulator"))
        moments = {k.removeprefix("adam."): f.get_tensor(k) for k in names if k.startswith("adam.")}
    if moments:
        optimizer.state[s.body.adapter(POLICY)] = moments | {"step": moments["step"].cpu()}
    log = Path(a.out) / "log.jsonl"
    kept = log.read_text().splitlines()[: facts["step"]] if log.exists() else []
    log.write_text("".join(line + "\n" for line in kept))  # steps after the last save are taken again
    return facts


class Pause:
    """Ctrl-C lets the step end, saves, and stops; a second one stops at once."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr)


# -------------------------------------------------------------------------------------------------- the story


def main(argv: list[str] | None = None) -> None:
    """The whole run. Each verb is a function above, in the order in which it is called."""
    given = parse_arguments(argv)
    a, resumed = open_run(given)
    if a.toy:
        torch.set_num_threads(1)  # matrices this small gain nothing from a second thread, and wait for it
    s = load_setting(a)
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    if not resumed:
        (out / "args.json").write_text(json.dumps({"given": given, "settled": vars(a)}, indent=1) + "\n")
    print(*(f"--{k.replace('_', '-')} {v}" for k, v in vars(a).items() if v not in ("", False)), flush=True)
    optimizer = torch.optim.AdamW([s.body.adapter(POLICY)], lr=a.lr, weight_decay=a.weight_decay)
    facts = load_state(a, s, optimizer) if resumed else {}
    began = time.monotonic() - facts.get("seconds", 0.0)

    if not facts:
        facts = prepare(s, a) | {"step": 0, "seconds": time.monotonic() - began}
        save_state(a, s, optimizer, facts)

    pause = Pause()
    for step in range(facts["step"], a.steps):
        t0 = time.monotonic()
        asked = ask(s, a, step)
        try:
            trajectories = act(s, a, step, asked)
        except OSError as e:  # a server out of reach: nothing of this step is kept
            save_state(a, s, optimizer, facts)
            raise OSError(
                f"{e} Step {step + 1} is lost, no more: go on with --out {a.out} --resume"
            ) from None
        t1 = time.monotonic()
        rewards = judge(trajectories, a)
        figures = learn(s, a, step, trajectories, rewards, optimizer)
        t2 = time.monotonic()
        row = figures_of(trajectories, rewards, s.simulator.words.count) | figures
        row |= {"seconds_act": t1 - t0, "seconds_learn": t2 - t1}
        row |= {"tokens_per_second": s.engine.stats.decoded / (t1 - t0)}
        row |= {"seconds_left": (t2 - t0) * (a.steps - step - 1)}
        if a.toy:
            row["skips"] = toy.skipping(trajectories)
        tell(a, s, step, row, trajectories)
        facts |= {"step": step + 1, "seconds": time.monotonic() - began}
        if not a.toy:
            add_audit(facts["simulator"], row["simulator"])
        if pause.asked or (step + 1) % a.save_every == 0 or step + 1 == a.steps:
            save_state(a, s, optimizer, facts)
        if pause.asked:
            print(f"saved; go on with: python train.py --out {a.out} --resume")
            sys.exit(130)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    finish(s, a, facts, began)


if __name__ == "__main__":
    models.command_line(main)
