"""A policy learns to search, and nobody searches.

    python train.py                          a tiny body in a toy world, on a laptop, in minutes
    python train.py --sim 3b --policy 3b     Qwen2.5-3B-Instruct as policy, simulator and reference on one GPU
    python train.py --policy DIR --sim DIR --data questions.jsonl --out runs/mine [--resume]

One step: ask questions, act (episodes against the simulator), judge (F1 of the answers), learn (GRPO on the
policy's adapter), tell (a line, a log, now and then a trajectory). `train` is that loop: read it first.

Not a framework: there are no callbacks and no configuration files; fork the loop.
"""

import cli  # noqa: F401, I001 (first: it says that torch is being loaded)
import argparse
import random
import shutil
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch

import compat
import eval as judge_of
import grpo
import simulator as simulators
from cli import disk, flags, ranks, screen
from cli.disk import Rows
from cli.pause import Pause, saving_on_failure
from cli.setting import Setting, find_bodies, load
from cli.track import tracker
from evaluation.health import RULES, alarm, health
from evaluation.kept import Kept
from evaluation.live import shown
from model import CRITIC, POLICY, SIMULATOR
from prepare.sft import sft
from questions import cover_em, exact_match, f1
from recipes import ALONE, Objective, advantages, informative, shuffle_siblings
from rollout import Query, Question, Search, Trajectory, episode
from simulator import audit_figures, p_noise
from tasks import kind


def train(a: argparse.Namespace, s: Setting, world: "World") -> None:
    """The whole run. Each verb is a function below, in the order in which it is called."""
    learning = [s.body.roles[role] for role in (POLICY, CRITIC) if role in s.body.roles]
    groups = [{"params": adapter.parameters} for adapter in learning]
    optimizer = torch.optim.AdamW(groups, lr=a.lr, weight_decay=a.weight_decay)
    facts = restore(a, s, optimizer)  # {} at the start of a run
    began = time.monotonic() - facts.get("seconds", 0.0)
    log = Rows(Path(a.out) / "log.jsonl", resume=True)
    kept = Kept(a.out, a.steps, s.tok)
    track = tracker("" if ranks.rank() else a.track, a.out, vars(a), facts.get("step", 0))

    if not facts:
        facts = prepare(a, s, world, kept) | {"step": 0, "updates": 0, "seconds": time.monotonic() - began}
        save(a, s, optimizer, facts)
    log.keep(facts["step"])  # steps after the last save are taken again
    kept.rows.keep(facts["step"] + 1)
    log.hold(*RULES, "skipped_updates")  # thousands of whole rows would fill the memory
    kept.rows.hold("tokens")

    line = screen.bar("training", a.steps, "steps", facts["step"])
    pause = Pause(partial(save, a, s, optimizer, facts), partial(whole, s, optimizer, facts))
    with pause.on_signals(), saving_on_failure(a.out, facts, pause), line:
        for step in range(facts["step"], a.steps):
            t0 = time.monotonic()
            asked = ask(a, world.questions, step)
            trajectories = act(a, s, step, asked)
            t1, decoded = time.monotonic(), sum(ranks.everyone(s.engine.stats.decoded))
            rewards = judge(a, trajectories)
            taught, credit = resample(a, s, world, step, trajectories, rewards)
            adv = compare(a, step, taught, credit)
            figures = learn(a, s, step, taught, credit, adv, optimizer)
            t2 = time.monotonic()
            row = figures_of(trajectories, rewards, s.simulator.words.count if s.simulator else 0)
            row |= figures | health(trajectories, rewards, s.tok)
            row |= {"seconds_act": t1 - t0, "seconds_learn": t2 - t1}
            row |= {"tokens_per_second": decoded / (t1 - t0)}
            row |= {"seconds_left": (t2 - t0) * (a.steps - step - 1)} | s.task.figures(trajectories)
            row |= glance(a, s, world, step, facts)
            tell(a, s, step, row, trajectories, log)
            check_steps(log)
            keep(a, s, step, trajectories, rewards, dict(zip(map(id, taught), adv.flatten().tolist())), kept)
            track(step + 1, row)
            screen.move(line, step + 1, f"reward {row['reward']:.2f}, searches {row['searches']:.2f}")
            add_audit(facts["documents"], row["simulator"])
            facts |= {"step": step + 1, "updates": updates_of(s, optimizer)}
            facts |= {"seconds": time.monotonic() - began}
            pause.asked = any(ranks.everyone(pause.asked))
            if pause.asked or (step + 1) % a.save_every == 0 or step + 1 == a.steps:
                pause.save()
            if pause.asked:
                screen.say(f"saved; go on with: python train.py --out {a.out} --resume")
                ranks.everyone(None)  # when one ends, torchrun ends all: not before the first has saved
                sys.exit(130)
    finish(a, s, world, facts, began, kept)


# ------------------------------------------------------------------------------------------------- the verbs


def ask(a: argparse.Namespace, questions: list[Question], step: int) -> list[tuple[int, Question]]:
    """The step's questions with their numbers: all of them once before any comes again, in a seeded order.

    A question that comes twice in one step gets another number, else its groups would be copies.
    """
    n, out, drawn = len(questions), [], Counter()
    draws = range(step * a.questions, (step + 1) * a.questions)
    orders = {
        epoch: random.Random(f"{a.seed} {epoch}").sample(range(n), n) for epoch in {i // n for i in draws}
    }
    for i in draws:
        number = orders[i // n][i % n]
        out.append((number + n * drawn[number], questions[number]))
        drawn[number] += 1
    return out


def act(a: argparse.Namespace, s: Setting, step: int, asked: list[tuple[int, Question]]) -> list[Trajectory]:
    """`group` episodes a question against the simulator at this step's noise; siblings in a row."""
    noise = p_noise(step, max(1, a.steps - 1), a.noise_start, a.noise_end, a.noise_shape)
    search, defects = None, compat.chosen(a.compat)
    if s.simulator:
        search = replace(s.simulator, p_noise=noise)
        search = s.task.shown(compat.leaking(search) if "leak" in defects else search)
    elif a.sim == flags.REAL:
        search = s.task.practice(noise)
    if search and "pairing" in defects:
        search = compat.mispaired(search, asked, a.group)
    episodes = [
        episode(question, search, s.tok, s.limits, s.words, 1.0, (a.seed, step, number, sibling))
        for number, question in asked[ranks.part()]
        for sibling in range(a.group)
    ]
    with screen.bar(f"step {step + 1}", len(episodes), delay=2) as bar:
        warp = (compat.nucleus,) if "top-p" in defects else ()
        mine = s.engine.run(episodes, lambda done, of, stats: screen.move(bar, done), *warp)
    trajectories = ranks.gathered(mine, a.group)
    for t in trajectories if "example" in defects else ():
        t.answer = compat.example(t, s.tok) if t.answer is None else t.answer
    return trajectories


def judge(a: argparse.Namespace, trajectories: list[Trajectory]) -> torch.Tensor:
    """Rewards (Q, G): the metric itself, of the sampled answer against the golden ones."""
    score = {"f1": f1, "em": exact_match, "cover-em": cover_em}[a.reward]
    return torch.tensor([score(t.answer, t.question.answers) for t in trajectories]).view(-1, a.group)


def resample(
    a: argparse.Namespace,
    s: Setting,
    world: "World",
    step: int,
    trajectories: list[Trajectory],
    rewards: torch.Tensor,
) -> tuple[list[Trajectory], torch.Tensor]:
    """DAPO's dynamic sampling (arXiv 2503.14476): groups without a difference give way to those of other
    questions, in at most `a.resample` rounds. The step's figures stay those of its first episodes."""
    trajectories, rewards, G = list(trajectories), rewards.clone(), a.group
    for again in range(1, a.resample + 1):
        flat = (~informative(rewards)).nonzero()[:, 0].tolist()
        if not flat:
            break
        far = again * a.questions * len(world.questions)  # numbers, and so randomness, of their own
        others = ask(a, world.questions, step + again * a.steps)[: len(flat)]
        fresh = act(a, s, step, [(number + far, question) for number, question in others])
        rewards[flat] = judge(a, fresh)
        for i, q in enumerate(flat):
            trajectories[q * G : (q + 1) * G] = fresh[i * G : (i + 1) * G]
    return trajectories, rewards


def compare(
    a: argparse.Namespace, step: int, trajectories: list[Trajectory], rewards: torch.Tensor
) -> torch.Tensor:
    """The advantages (Q, G) of episodes among their siblings, whose rewards a control shuffles."""
    credit = shuffle_siblings(rewards, hash((a.seed, step))) if a.shuffle_rewards else rewards
    searches = torch.tensor([len(t.searches) for t in trajectories]).view_as(rewards)
    return advantages(credit, a.advantage, searches, a.strata)


def learn(
    a: argparse.Namespace,
    s: Setting,
    step: int,
    trajectories: list[Trajectory],
    rewards: torch.Tensor,
    adv: torch.Tensor,
    optimizer: torch.optim.Optimizer,
) -> dict[str, float]:
    """`updates` optimiser steps on the groups that teach something. Returns mean figures."""
    if not rewards.isfinite().all():
        return {"skipped_groups": len(rewards), "skipped_updates": a.updates}
    teaching = informative(rewards) if a.advantage not in ALONE else torch.ones(len(rewards))
    kept = teaching.nonzero()[:, 0].tolist()
    for group, lr in zip(optimizer.param_groups, (a.lr, a.critic_lr)):
        group["lr"] = lr * (1 - step / a.steps)
    objective = Objective(**{f.name: getattr(a, f.name) for f in fields(Objective)})
    defects = compat.chosen(a.compat)
    if "kl-sign" in defects and a.kl_in == "loss":
        objective = replace(objective, kl=-objective.kl)
    if defects & compat.RETOLD:
        trajectories = [compat.retold(t, s.tok, defects) for t in trajectories]
    longest = min(a.episode_tokens, (a.turns + 1) * a.turn_tokens)
    updates = []
    for part in range(min(a.updates, len(kept))):
        rows = [q * a.group + g for q in kept[part :: a.updates] for g in range(a.group)]
        taught = [trajectories[r] for r in rows]
        batches = grpo.make_batches(
            taught, adv.flatten()[rows].tolist(), a.micro_tokens, a.device, a.normaliser, longest,
            ranks.part(),
        )  # fmt: skip
        if any(1 in t.mask for t in taught):  # in all processes alike
            cache = s.engine.pools[POLICY].cache
            lent = cache.lent if a.lend else nullcontext
            figures = grpo.learn(s.body, batches, optimizer, objective, a.recompute, lent)
            updates.append(figures | ({"lent_mib": cache.borrowed / 2**20} if a.lend else {}))
    means = {k: sum(u[k] for u in updates) / len(updates) for k in updates[0]} if updates else {}
    return means | {"skipped_groups": len(rewards) - len(kept)}


def tell(
    a: argparse.Namespace, s: Setting, step: int, row: dict, trajectories: list[Trajectory], log: Rows
) -> None:
    """A row of log.jsonl, and a line where no bar shows the same; now and then an episode in two colours."""
    log.add({"step": step + 1, **row})
    rows = list(log.rows.values())
    if (worse := alarm(rows)) and not alarm(rows[:-1]):
        screen.say(f"WARNING: the run may be collapsing: {worse}; see --guard, --strata, --kl, --lr")
    full = step == 0 or (step + 1) % a.show_every == 0
    ends = " ".join(f"{k} {v}" for k, v in row["ends"].items())
    if full or not sys.stdout.isatty():
        screen.say(
            f"step {step + 1:3d}/{a.steps}  reward {row['reward']:.3f}  em {row['em']:.3f}  "
            f"searches {row['searches']:.2f}  length {row['length']:.0f}  noise {row['noise']:.2f}  "
            f"kl {row.get('kl', 0):.4f}  ratio {row.get('ratio', 1):.3f}  gap {row.get('gap', 0):.1e}  "
            f"grad {row.get('grad_norm', 0):.2f}  "
            f"act {row['seconds_act']:.1f}s  learn {row['seconds_learn']:.1f}s  "
            f"{row['tokens_per_second']:,.0f} tok/s  left {row['seconds_left'] / 60:.1f}m  [{ends}]"
        )
    if full:
        best = max(trajectories, key=lambda t: (len(t.searches), t.answer is not None))
        screen.say(f"\n{shown(best, s.tok, screen.coloured())}\n  -> golden: {best.question.answers}\n")


def check_steps(log: Rows) -> None:
    """Raise ValueError where the last three steps were skipped, as no step will ever be better then."""
    last = list(log.rows.values())[-3:]
    if len(last) == 3 and all(row.get("skipped_updates") for row in last):
        raise ValueError(f"three steps in a row were skipped, {grpo.NOT_FINITE}")


def keep(
    a: argparse.Namespace, s: Setting, step: int, trajectories: list[Trajectory], rewards: torch.Tensor,
    adv: dict[int, float], kept: Kept,
) -> None:  # fmt: skip
    """Some of the step's episodes for look.py. adv: id of an episode -> its advantage, 0 for those that gave
    way in `resample`; ratios: a token's probability now, over that when sampled."""
    if ranks.rank():
        return
    few = kept.few(step + 1, trajectories, a.group)
    few.sort(key=lambda i: len(trajectories[i].ids))  # the order in which they stand in the batches
    chosen, more = [trajectories[i] for i in few], {}
    batches = grpo.make_batches(chosen, [0.0] * len(few), a.micro_tokens, a.device)
    with torch.no_grad():
        ratios = [(grpo.token_logps(s.body, b, POLICY)[0] - b.old).exp().tolist() for b in batches]
    ratio = chain.from_iterable(ratios)
    for i, t in zip(few, chosen):
        reward, mine = rewards.flatten()[i].item(), round(adv.get(id(t), 0.0), 3)
        more[i] = {"reward": reward, "advantage": mine, "ratios": list(islice(ratio, sum(t.mask)))}
    kept.add(step + 1, trajectories, [judge_of.answered(t) for t in trajectories], a.group, more=more)


# ------------------------------------------------------------------------------------------------ the figures


def figures_of(trajectories: list[Trajectory], rewards: torch.Tensor, count: int) -> dict:
    """What the step's episodes were like; count: documents that a search is to return."""
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
    """Add a step's `audit_figures` to the whole run's, weighed by searches: {quality: {"n", means}}."""
    for quality, part in step.items():
        old = whole.setdefault(quality, {"n": 0})
        n, more = old["n"], part["n"]
        for name in part.keys() - {"n"}:
            old[name] = (n * old.get(name, 0.0) + more * part[name]) / max(1, n + more)
        old["n"] = n + more


# ------------------------------------------------------------------------------------------- before and after


@dataclass(frozen=True)
class World:
    """What is asked: questions to train on, held-out ones, and the real search that answers the latter."""

    questions: list[Question]
    held: list[Question]
    search: Search | None


def measure(a: argparse.Namespace, s: Setting, world: World, kept: Kept, step: int) -> dict[str, dict]:
    """Held-out questions through the real engine, in each of the task's ways. step: its number in `kept`."""
    out, held, first = {}, {}, []
    for suffix, (label, search, temperature) in s.task.ways(world.search).items():
        summary, trajectories = answer(a, s, world.held, search, temperature, label)
        figures = ("f1", "em", "cover_em", "searches", "found", "n", "by_hop")
        out[suffix] = {k: summary[k] for k in figures}
        out[suffix] |= s.task.figures(trajectories)
        held[label] = [judge_of.answered(t) for t in trajectories]
        first = first or trajectories
    kept.add(step, first, next(iter(held.values()), []), held=held)
    return out


def answer(
    a: argparse.Namespace, s: Setting, held: list[Question], search: Search, temperature: float, label: str
) -> tuple[dict, list[Trajectory]]:
    """Held-out questions, answered -> their summary, and the episodes."""
    address = (a.seed, 1_000_000)  # a step that no run reaches
    runs = judge_of.episodes(s.tok, held, search, s.limits, s.words, temperature, address)
    with screen.bar(f"held-out, {label}", len(held[ranks.part()])) as bar:
        return judge_of.evaluate(s.engine, runs, partial(judge_of.show_progress, bar))


def glance(a: argparse.Namespace, s: Setting, world: World, step: int, facts: dict) -> dict[str, float]:
    """Every `eval_every` steps: the first `eval_few` held-out questions, answered greedily -> figures for the
    step's row. That policy is kept in OUT/policies/STEP, and in OUT/best if none has scored as well."""
    if not (a.eval_every and world.held) or (step + 1) % a.eval_every:
        return {}
    summary, trajectories = answer(a, s, world.held[: a.eval_few], world.search, 0.0, f"step {step + 1}")
    searching = judge_of.summarise([t for t in trajectories if t.searches])
    queries = [query.text.split() for t in trajectories for query, _ in t.searches]
    figures = {f"held_{k}": summary[k] for k in ("f1", "em", "searches")}
    figures["held_query_words"] = sum(map(len, queries)) / max(1, len(queries))
    if searching["found"] is not None:
        figures["held_found"] = searching["found"]  # by those that searched
    if a.keep:
        s.keep(POLICY, Path(a.out, "policies", str(step + 1)))
        for old in range(step + 1 - a.keep * a.eval_every, 0, -a.eval_every):
            shutil.rmtree(Path(a.out, "policies", str(old)), ignore_errors=True)
    if summary["f1"] > facts.get("best", -1.0):
        facts["best"] = summary["f1"]
        s.keep(POLICY, Path(a.out, "best"))
    return figures


def table_of(s: Setting, world: World, **times: dict[str, dict]) -> str:
    """The table of `measure` before, or before and after: table_of(s, world, before=..., after=...)."""
    rows = {}
    for suffix, (label, *_) in s.task.ways(world.search).items():
        for when, measured in times.items():
            part = measured[suffix]
            hops = {f"f1 {h} hop": v["f1"] for h, v in part["by_hop"].items()}
            rows[f"{label}, {when}"] = {k: v for k, v in part.items() if k != "by_hop"} | hops
    return screen.table(rows)


def prepare(a: argparse.Namespace, s: Setting, world: World, kept: Kept) -> dict:
    """What comes before the first step: held-out questions, and a task's simulator tuned and audited."""
    facts: dict = {"before": {}, "documents": {}, "simulator": {}}
    kept.rows.keep(0)
    if world.held:
        facts["before"] = measure(a, s, world, kept, 0)
        print(table_of(s, world, before=facts["before"]), flush=True)
    if a.sft_steps:
        if not ranks.rank():
            tune_simulator(a, s)
        tuned = s.bodies[SIMULATOR][0].adapter(SIMULATOR).data
        tuned.copy_(ranks.told(lambda: tuned.cpu()))
        s.keep(SIMULATOR, Path(a.out, "simulator"))
    if s.simulator and not a.no_audit:
        preview(s, world.questions[0])
        with screen.waiting("auditing the simulator"):
            facts["simulator"] = {} if s.simulator.server else s.task.audit(partial(write, s))
    if facts["simulator"]:
        print("simulator: ", *(f"{k} {v:.3f} " for k, v in facts["simulator"].items()), flush=True)
    return facts


def finish(a: argparse.Namespace, s: Setting, world: World, facts: dict, began: float, kept: Kept) -> None:
    """What comes after the last step: the held-out questions again, result.json and the table."""
    s.keep(POLICY, Path(a.out, "policy"))
    after = measure(a, s, world, kept, a.steps + 1) if facts["before"] else {}
    result: dict = {f"before{k}": v for k, v in facts["before"].items()}
    result |= {f"after{k}": v for k, v in after.items()}
    # The documents of all steps; where a task knows more of its simulator, that.
    documents = facts["documents"]
    hits = {f"{quality}_hit": documents.get(quality, {}).get("answer") for quality in simulators.QUALITIES}
    result["simulator"] = documents | hits | {"leak": None} | facts["simulator"]
    result["seconds"] = time.monotonic() - began
    disk.write_json(Path(a.out) / "result.json", result)
    if after:
        print("\n" + table_of(s, world, before=facts["before"], after=after))
    print(f"{result['seconds']:.0f} s; everything is in {a.out}; see it with: python look.py {a.out}")


def write(s: Setting, queries: list[Query], noisy: bool) -> list[str]:
    """What the simulator writes for queries, all useful or all noisy."""
    return [documents.text for documents in simulators.write(s.engine, s.simulator, queries, noisy)]


def preview(s: Setting, question: Question) -> None:
    """Print what the simulator writes, useful and noisy, when a question is the query (without its mark,
    as policies search)."""
    query = Query(question.text.rstrip("? "), question)
    with screen.waiting("the simulator writes an example"):
        useful, noisy = (write(s, [query], order)[0] for order in (False, True))
    print(f"the simulator's documents for {query.text!r} (golden: {question.answers[0]!r})")
    print(screen.side_by_side(f"USEFUL\n{useful}", f"NOISY\n{noisy}") + "\n", flush=True)


def tune_simulator(a: argparse.Namespace, s: Setting) -> None:
    """The lightweight fine-tuning of a task's own simulator: makes it obey its two orders."""
    body, tok = s.bodies[SIMULATOR]
    rows = s.task.rows(80 * a.sft_steps)  # more than the steps will see
    rows = random.Random(a.seed).sample(rows, len(rows))
    held = min(64, len(rows) // 10)
    exam, rows = rows[:held], rows[held:]
    tuning = sft(
        body, tok, s.simulator.words, rows, a.sft_steps, a.sft_lr, every=a.sft_steps, seed=a.seed, exam=exam
    )
    for p in screen.bar("fine-tuning the simulator", a.sft_steps, "steps", over=tuning):
        if p.step % 25 == 0 or p.held is not None:
            screen.say(str(p))


# ------------------------------------------------------------------------------------------- saving, resuming


def save(a: argparse.Namespace, s: Setting, optimizer: torch.optim.Optimizer, facts: dict) -> None:
    """All that a run needs to go on, whole or not at all; the adapter for others and the rows first, so that
    they are never behind the state."""
    s.keep(POLICY, Path(a.out, "policy"))
    for file in Path(a.out).glob("*.jsonl"):
        disk.synchronise(file)
    tensors = {"policy": s.body.adapter(POLICY)} | disk.pack_optimizer(optimizer)
    if SIMULATOR in s.bodies and SIMULATOR in s.bodies[SIMULATOR][0].roles:
        tensors["simulator"] = s.bodies[SIMULATOR][0].adapter(SIMULATOR)
    if critic := s.body.roles.get(CRITIC):
        tensors |= {"critic": critic.theta, "value": critic.value}
    disk.save_state(Path(a.out) / "state.safetensors", tensors, facts)


FACTS = {"step": int, "updates": int, "seconds": float, "before": dict, "documents": dict, "simulator": dict}


def restore(a: argparse.Namespace, s: Setting, optimizer: torch.optim.Optimizer) -> dict:
    """Undo `save`; returns its facts. {} where no state was saved yet: the run begins anew."""
    path = Path(a.out) / "state.safetensors"
    read = partial(disk.load_state, path, "a training", **FACTS)
    tensors, facts = ranks.told(lambda: read() if path.exists() else ({}, {}))
    if not facts:
        return {}
    with disk.readable(path):
        if not 0 <= facts["step"] <= a.steps:
            raise ValueError(f"{path} has taken {facts['step']} steps of {a.steps}: it is not of this run")
        disk.fill(s.body.adapter(POLICY), tensors["policy"])
        if "simulator" in tensors:
            disk.fill(s.bodies[SIMULATOR][0].adapter(SIMULATOR), tensors["simulator"])
        if critic := s.body.roles.get(CRITIC):
            disk.fill(critic.theta, tensors["critic"])
            disk.fill(critic.value, tensors["value"])
        disk.unpack_optimizer(optimizer, tensors)
    return facts


def whole(s: Setting, optimizer: torch.optim.Optimizer, facts: dict) -> bool:
    """Whether the adapter is that of the last whole step, and works: one that overflows, after a step that
    was too large, must not replace the last good state."""
    if updates_of(s, optimizer) != facts["updates"]:
        return False
    with torch.no_grad():
        return bool(
            s.body(torch.zeros(1, 8, dtype=torch.long, device=s.body.device), POLICY).isfinite().all()
        )


def updates_of(s: Setting, optimizer: torch.optim.Optimizer) -> int:
    """Steps that the optimiser has taken."""
    return int(optimizer.state.get(s.body.adapter(POLICY), {}).get("step", 0))


# What a run that goes on may do otherwise than it was begun: it changes neither data nor algorithm, but for
# the rates, which whoever resumes a diverging run wants to lower.
MAY_CHANGE = {
    *("lr", "critic-lr", "dtype", "device", "seats", "micro-tokens", "recompute", "memory"),
    *("save-every", "show-every", "track"),
}


def resumed(given: dict[str, object]) -> tuple[argparse.Namespace, dict]:
    """The flags of the run in --out, with what may change of them, and its args.json. Raises ValueError."""
    if "out" not in given:
        raise ValueError("--resume needs the --out of the run to go on with")
    file = Path(given["out"]) / "args.json"
    kept = disk.read_json(file, "the directory of a run", settled=dict)
    old = {k.replace("_", "-"): v for k, v in kept["settled"].items()}
    for f in flags.flags_of("train"):
        if f.name not in old:
            raise ValueError(f"the run in {given['out']} was begun by a version that had no --{f.name}")
    new = {k: v for k, v in given.items() if k not in ("out", "resume") and v != old[k]}
    if unlike := [k for k in new if k not in MAY_CHANGE]:
        was = ", ".join(f"--{k} {old[k]}" for k in unlike)
        raise ValueError(f"--resume with other arguments: the run in {given['out']} was begun with {was}")
    a = argparse.Namespace(**{"pages": 0, "lend": False} | kept["settled"])
    for name, value in new.items():
        setattr(a, name.replace("-", "_"), value)
    if "memory" in new:
        a.planned, a.pages, a.lend = False, 0, False
        a.seats, a.micro_tokens = new.get("seats", 0), new.get("micro-tokens", 0)
        a.recompute = new.get("recompute", False)
    with disk.readable(file):
        flags.check(a)
    if new:
        line = " ".join(f"--{k} {old[k]} -> {now}" for k, now in new.items())
        print("changed:", screen.harmless(line), flush=True)
        kept.setdefault("changes", []).append({k: [old[k], now] for k, now in new.items()})
    return a, kept


def same_inputs(old: dict, new: dict, out: str) -> None:
    """Raise ValueError where a run would go on with other questions or words than it was begun with."""
    other = [what for what in new if old.get(what, new[what]) != new[what]]
    if other:
        raise ValueError(f"the {' and the '.join(other)} are not those that the run in {out} was begun with")


def main(argv: list[str] | None = None) -> None:
    """Settle the flags, claim the directory, load the setting, train."""
    given = flags.given_to("train", __doc__, argv)
    resume = "resume" in given
    if resume:
        a, kept = ranks.told(lambda: resumed(given))
        flags.machine(a.device, a.dtype)  # has each process a GPU?
        a.out = given["out"]
    else:
        a, kept = flags.settle("train", given), {}
        a.out = ranks.told(lambda: a.out or disk.free_name("runs"))
    with disk.claimed(Path(a.out), resume):
        homes = find_bodies(a)  # first: a mistyped name shows at once
        task = kind(a.task)(a)
        with screen.waiting("reading questions"):
            world = World(*task.to_train())
        s = load(a, task, world.questions + world.held, homes)
        inputs = {"questions": world.questions, "held-out questions": world.held}
        inputs |= {"policy's words": s.words, "simulator's words": s.simulator and s.simulator.words}
        inputs |= {"bodies": sorted({disk.contents(home) for home in homes.values()})}
        inputs |= {"adapters": [disk.contents(Path(x)) for x in (a.adapter, a.sim_adapter) if x]}
        inputs = {what: disk.fingerprint(value) for what, value in inputs.items()}
        same_inputs(kept.get("inputs") or ranks.told(lambda: inputs), inputs, a.out)
        kept = {"given": given, **kept, "settled": vars(a), "inputs": inputs}
        disk.write_json(Path(a.out) / "args.json", kept)
        shown = {k.replace("_", "-"): v for k, v in vars(a).items() if v not in ("", None) and v is not False}
        quiet = ("command", "task", "planned", "pages", "lend")
        line = " ".join(f"--{k} {v}" for k, v in shown.items() if k not in quiet)
        print(screen.harmless(line), flush=True)
        train(a, s, world)


if __name__ == "__main__":
    screen.run(main)
