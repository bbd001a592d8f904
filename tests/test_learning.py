"""Runs that learn, through `train.main`: rewards differ, groups are kept, the adapter moves.

The shipped toy body, given as a real checkpoint would be, with files of questions and words: a run takes a
second or two. What a run tells is compared with what is computed here a second time, from what went in and
out of `train.judge`, `grpo.learn` and the engine.
"""

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import grpo
import recipes
import train
from engine import Engine
from model import POLICY
from rollout import Question, Trajectory, Turn
from toy.words import SIM_WORDS, WORDS
from toy.world import World

STEPS, QUESTIONS, GROUP, SEED, LR = 4, 4, 6, 4, 1e-2
FLAGS = {
    **{"policy": "tiny", "steps": STEPS, "questions": QUESTIONS, "group": GROUP, "seed": SEED, "lr": LR},
    **{"noise-start": 0, "noise-end": 1, "noise-shape": "linear"},
    **{"clip-low": 0.3, "clip-high": 0.3, "kl": 0.02, "entropy": 0.003, "grad-clip": 0.05},
    **{"turns": 2, "prompt-tokens": 32, "episode-tokens": 128, "turn-tokens": 20, "observation-tokens": 32},
    **{"sim-tokens": 24, "seat-tokens": 160, "seats": 16, "micro-tokens": 300, "memory": 1},
    **{"save-every": 2, "show-every": 9, "eval-questions": 3, "eval-search": "none"},
}


# What these tests know of the program's inside: five names, and what goes through them.


class PowerCut(BaseException):
    """An end that gives a run no time to save."""


@dataclass
class Seen:
    """What a run did, step by step."""

    out: object
    turns: list[list[Turn]] = field(default_factory=list)  # a list a run of the engine
    judged: list[tuple[list[Trajectory], torch.Tensor]] = field(default_factory=list)
    updates: list[SimpleNamespace] = field(default_factory=list)

    @property
    def log(self):
        return [json.loads(line) for line in (self.out / "log.jsonl").read_text().splitlines()]

    @property
    def state(self):
        return load_file(self.out / "state.safetensors")


def spied(seen: Seen, until: int = STEPS):
    """Patches under which a run tells `seen` what it does, and dies when it judges a step after `until`."""
    patch, run, judge, learn = pytest.MonkeyPatch(), Engine.run, train.judge, grpo.learn

    def follow(episode, turns):
        value = None
        while True:
            try:
                wish = episode.send(value)
            except StopIteration as end:
                return end.value
            turns += [wish] if isinstance(wish, Turn) else []
            value = yield wish

    def spy_run(engine, episodes, *more):
        seen.turns.append([])
        return run(engine, [follow(e, seen.turns[-1]) for e in episodes], *more)

    def spy_judge(a, trajectories):
        if len(seen.judged) == until:
            raise PowerCut
        seen.judged.append((trajectories, judge(a, trajectories)))
        return seen.judged[-1][1]

    def spy_learn(body, batches, optimizer, objective, *more):
        before = body.adapter(POLICY).detach().clone()
        lr = optimizer.param_groups[0]["lr"]
        figures = learn(body, batches, optimizer, objective, *more)
        moved = (body.adapter(POLICY).detach() - before).abs().max().item()
        step = len(seen.judged) - 1
        seen.updates.append(
            SimpleNamespace(
                step=step, batches=batches, o=objective, lr=lr, figures=figures, moved=moved, body=body,
                policy=body.adapter(POLICY).detach().clone(),
            )
        )  # fmt: skip
        return figures

    patch.setattr(Engine, "run", spy_run)
    patch.setattr(train, "judge", spy_judge)
    patch.setattr(grpo, "learn", spy_learn)
    return patch


def run(out, *flags, until=STEPS):
    """`train.main`, spied on. A run that dies at `until` is what a power cut leaves."""
    seen = Seen(out)
    patch = spied(seen, until)
    with ExitStack() as stack:
        stack.callback(patch.undo)
        if until < STEPS:
            stack.enter_context(pytest.raises(PowerCut))
        train.main([str(x) for x in ("--out", out, *flags)])
    return seen


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Toy questions as files, with more golden answers than the true one: a quarter of all guesses are right,
    a quarter half right. So rewards differ in nearly every group, on any machine, and F1 is not EM. Of every
    fourth question no answer is right: its group is skipped."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("learning")

    def write(name, world, n):
        words = sorted({q.answers[0] for q in World(world).questions(500)})
        others = [*words[::4], *(f"{word} or so" for word in words[1::4])]
        rows = [
            {"question": q.text, "golden_answers": [*q.answers, *others] if i % 4 else ["?!"], "hops": q.hops}
            for i, q in enumerate(World(world).questions(n))
        ]
        (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return home / name

    words = {k: v for k, v in asdict(WORDS).items() if v is not None}
    (home / "policy.json").write_text(json.dumps(words))
    (home / "sim.json").write_text(json.dumps(asdict(SIM_WORDS)))
    files = {"policy-prompt": home / "policy.json", "sim-prompt": home / "sim.json"}
    files |= {"data": write("train.jsonl", 0, 30), "eval-data": write("held.jsonl", 1, 5)}
    return [x for name, value in (FLAGS | files).items() for x in (f"--{name}", value)]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run from its first step to its last."""
    return run(tmp_path_factory.mktemp("runs") / "whole", *flags)


OTHER = [
    "--reward",
    "em",
    "--shuffle-rewards",
    "--updates",
    "2",
    "--algorithm",
    "rloo",
    "--eval-questions",
    "0",
]


@pytest.fixture(scope="module")
def control(flags, tmp_path_factory):
    """A run in which everything that the first one leaves at its default is something else."""
    return run(tmp_path_factory.mktemp("runs") / "control", *flags, *OTHER)


def test_a_run_learns(whole):
    """With equal rewards no group is kept, nothing is learnt, and two untouched adapters agree: so every test
    of a whole run once did. An engine with a stale adapter shows in the gap from the second step on."""
    assert len(whole.updates) == len(whole.log) == STEPS and all(u.moved > 0 for u in whole.updates)
    for row, update in zip(whole.log, whole.updates):
        assert 0 <= row["skipped_groups"] < QUESTIONS and row["trained_tokens"] > 0
        assert row["gap"] < 1e-5 and abs(row["ratio"] - 1) < 1e-5 and row["grad_norm"] > 0
        assert {k: row[k] for k in update.figures} == pytest.approx(update.figures)
    assert max(len(u.batches) for u in whole.updates) > 1
    assert sum(row["skipped_groups"] for row in whole.log) > 0
    assert whole.log[0]["kl"] == 0 and all(row["kl"] > 1e-5 for row in whole.log[1:])
    assert whole.state["policy"].abs().max() > 0


def trained(update):
    """ids of a trained row -> its advantage; the weights of all its tokens."""
    rows, weights = [], []
    for b in update.batches:
        weights += b.w.tolist()
        adv = iter(b.adv.tolist())
        old = iter(b.old.tolist())
        for ids, mask, n in zip(b.ids, b.mask, b.lengths):
            count = int(mask.sum())
            each, logps = {next(adv) for _ in range(count)}, [next(old) for _ in range(count)]
            assert len(each) == 1
            rows.append((tuple(ids[:n].tolist()), each.pop(), logps))
    return rows, weights


def test_every_episode_is_trained_with_its_own_advantage(whole):
    """Advantages that go to a neighbour, or from a group that was skipped to the next, teach noise: the loss
    falls as well, and nothing shows. All tokens of an update weigh the same."""
    for (trajectories, rewards), update in zip(whole.judged, whole.updates):
        centred = rewards - rewards.mean(1, keepdim=True)
        adv = (centred / (rewards.std(1, keepdim=True) + 1e-6)).flatten().tolist()
        kept = [i for i in range(len(trajectories)) if len(set(rewards[i // GROUP].tolist())) > 1]
        want = sorted(
            (
                tuple(trajectories[i].ids),
                adv[i],
                [p for p, m in zip(trajectories[i].logps, trajectories[i].mask) if m],
            )
            for i in kept
        )
        rows, weights = trained(update)
        assert len(rows) == len(want) > 0
        for got, one in zip(sorted(rows), want):
            assert got[0] == one[0] and got[1] == pytest.approx(one[1], abs=1e-4)
            assert got[2] == pytest.approx(one[2], abs=1e-6)
        assert weights == pytest.approx([1 / len(weights)] * len(weights))


def test_a_kept_episode_has_its_own_figures(whole):
    """A page whose ratios or advantages are a neighbour's shows a policy that learnt something else."""
    kept = [json.loads(line) for line in (whole.out / "episodes.jsonl").read_text().splitlines()]
    for (trajectories, rewards), update, row in zip(whole.judged, whole.updates, kept[1:]):
        update.body.adapter(POLICY).data.copy_(update.policy)
        adv = recipes.advantages(rewards).flatten().tolist()
        shown = [one for group in row["groups"] for one in group["episodes"]]
        assert len(shown) == len(trajectories)
        for i, (t, one) in enumerate(zip(trajectories, shown)):
            (batch,) = grpo.make_batches([t], [0.0], 300)
            with torch.no_grad():
                ratios = (grpo.token_logps(update.body, batch, POLICY)[0] - batch.old).exp().tolist()
            assert one["ratios"] == pytest.approx(ratios, abs=1e-3)
            assert one["reward"] == rewards.flatten()[i] and one["advantage"] == pytest.approx(
                adv[i], abs=1e-3
            )
        assert any(abs(r - 1) > 0.01 for one in shown for r in one["ratios"])


def test_the_flags_reach_the_loss(whole):
    """A coefficient that is printed at the start and used nowhere makes every ablation equal."""
    for step, u in enumerate(whole.updates):
        assert u.o == recipes.Objective(clip_low=0.3, clip_high=0.3, kl=0.02, entropy=0.003, grad_clip=0.05)
        assert u.step == step and u.lr == pytest.approx(LR * (1 - step / STEPS))
    assert max(row["grad_norm"] for row in whole.log) > 0.05  # the clip had something to do


def test_the_curriculum_rises_from_its_start_to_its_end(whole):
    """A curriculum that never rises trains against an engine that is never wrong; one that ends a step late
    never reaches its end."""
    assert all(row["searches"] > 0 for row in whole.log)
    noise = [row["noise"] for row in whole.log]
    assert noise[0] == 0 and noise[-1] == 1 and 0 < sum(noise[1:-1]) < STEPS - 2


def test_the_reward_is_the_metric_that_was_asked_for(whole, control):
    """F1 gives credit to half an answer, EM does not: trained on one and told of the other, a run lies."""
    for seen, name in ((whole, "f1"), (control, "em")):
        for row, (trajectories, rewards) in zip(seen.log, seen.judged):
            assert [t.question.text for t in trajectories[::GROUP]] == [
                t.question.text for t in trajectories[GROUP - 1 :: GROUP]
            ]
            assert rewards.shape == (QUESTIONS, GROUP)
            assert row["reward"] == pytest.approx(row[name], abs=1e-6)
    assert any(0 < r < 1 for _, rewards in whole.judged for r in rewards.flatten().tolist())
    assert any(row["f1"] > row["em"] > 0 for row in control.log)


def test_training_samples_the_policy_as_it_is(whole):
    """At another temperature the log-probs of sampling are not the policy's. Every turn has an address of its
    own (seed, step, question, sibling, call, ...), or two episodes would be copies of each other."""
    steps = whole.turns[-STEPS - 2 : -2]  # the last two are those of the evaluation after training
    for step, turns in enumerate(steps):
        mine = [t for t in turns if t.role == POLICY]
        assert {t.temperature for t in mine} == {1.0}
        assert {t.address[:2] for t in turns} == {(SEED, step)}
        assert len({t.address for t in turns}) == len(turns) > QUESTIONS * GROUP
        assert len({t.address[2] for t in mine}) == QUESTIONS and {t.address[3] for t in mine} == set(
            range(GROUP)
        )
    numbers = [n for turns in steps for n in {t.address[2] for t in turns}]
    assert (
        len(set(numbers)) == len(numbers) == STEPS * QUESTIONS < 30
    )  # none comes again before all were asked


def test_evaluation_is_sampled_and_greedy_at_the_same_addresses_before_and_after(whole):
    """Held-out questions at one address, or at other ones after training, would be compared by luck."""
    before, after = ([r for r in part if r] for part in (whole.turns[:2], whole.turns[-2:]))
    assert len(before) == len(after) == 2
    first = [{t.address for t in turns if t.address[4] == 0} for turns in (*before, *after)]
    assert all(len(addresses) == 3 and addresses == first[0] for addresses in first)
    assert first[0] == {(SEED, 1_000_000, i, 0, *t) for i in range(3) for t in {a[4:] for a in first[0]}}
    assert [{t.temperature for t in turns} for turns in (*before, *after)] == [{1.0}, {0.0}] * 2
    result = json.loads((whole.out / "result.json").read_text())
    assert all(result[k]["n"] == 3 for k in ("before", "before_greedy", "after", "after_greedy"))


def test_the_control_shuffles_rewards_among_siblings(control):
    """A control that learns from true rewards is none. Each group's advantages are the true ones, on other
    siblings; rloo's are those against the mean of the others."""
    moved = 0
    for step, (trajectories, rewards) in enumerate(control.judged):
        rows = [row for u in control.updates if u.step == step for row in trained(u)[0]]
        left = {}
        for ids, adv, _ in rows:
            left.setdefault(ids, []).append(adv)
        kept = 0
        for q, group in enumerate(rewards):
            if len(set(group.tolist())) == 1:
                continue
            kept += 1
            want = ((group - group.mean()) * GROUP / (GROUP - 1)).tolist()
            got = [left[tuple(t.ids)].pop() for t in trajectories[q * GROUP : (q + 1) * GROUP]]
            assert sorted(got) == pytest.approx(sorted(want), abs=1e-5)
            moved += got != pytest.approx(want, abs=1e-5)
        assert len(rows) == kept * GROUP and not any(left.values())
    assert moved > 0


def test_updates_share_the_groups_of_a_step(control):
    """Two updates a rollout are two halves of it, once each: the second sees a ratio that is no longer 1."""
    for step, row in enumerate(control.log):
        mine = [u for u in control.updates if u.step == step]
        kept = QUESTIONS - row["skipped_groups"]
        assert [len(trained(u)[0]) for u in mine] == [n * GROUP for n in (kept - kept // 2, kept // 2) if n]
        for name in mine[0].figures if mine else ():
            assert row[name] == pytest.approx(sum(u.figures[name] for u in mine) / len(mine))
    assert max(u.figures["gap"] for u in control.updates) > 1e-4


def test_a_run_that_was_cut_goes_on_to_the_last_bit(whole, flags, tmp_path):
    """Without the adapter, or without the optimiser's moments, a run that goes on is another run. It dies in
    its last step, two steps after its save; updates come before the save and after it."""
    first = run(tmp_path, *flags, until=STEPS - 1)
    saved = first.state
    assert sum(u.step < 2 for u in first.updates) > 0
    moments = [v for k, v in saved.items() if k != "policy" and v.shape == saved["policy"].shape]
    assert len(moments) == 2 and all(m.abs().max() > 0 for m in moments)
    rest = run(tmp_path, "--resume")
    assert len(rest.judged) == 2 and len(rest.updates) > 0
    assert whole.state.keys() == rest.state.keys()
    assert all(torch.equal(v, rest.state[k]) for k, v in whole.state.items())
    assert not torch.equal(saved["policy"], rest.state["policy"])
    assert [timeless(row) for row in rest.log] == [timeless(row) for row in whole.log]
    name = "policy/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole.out / name).read_bytes()


def timeless(row):
    """A line of the log without what depends on the clock."""
    return {k: v for k, v in row.items() if "second" not in k}


def test_the_judge_scores_each_episode_against_its_own_question():
    """One row a question, one column a sibling, in the order in which they were asked."""
    peru, italy = Question("capital of Peru?", ("Lima", "Ciudad")), Question("of Italy?", ("Rome",))
    said = [
        (peru, "Lima, Peru"),
        (peru, "lima"),
        (italy, None),
        (italy, "Lima"),
        (peru, "x"),
        (italy, "Rome"),
    ]
    trajectories = [Trajectory(q, answer=answer) for q, answer in said]
    f1, em = (train.judge(SimpleNamespace(reward=r, group=2), trajectories) for r in ("f1", "em"))
    assert torch.allclose(f1, torch.tensor([[2 / 3, 1.0], [0.0, 0.0], [0.0, 1.0]]))
    assert em.tolist() == [[0.0, 1.0], [0.0, 0.0], [0.0, 1.0]]
