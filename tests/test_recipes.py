"""Every recipe against plain loops in float64, written from the formulas; and what holds in all of them."""

import math
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import grpo
import recipes
from cli import flags
from grpo import Batch, make_batches, token_logps
from model import CRITIC, POLICY, REFERENCE, Config, Model
from recipes import ADVANTAGES, ALONE, KL, PARTS, RATIOS, RECIPES, Objective
from rollout import Question, Trajectory

SHAPE = Config("qwen2", vocab=61, d=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, context=96)
REWARDS = [[1.0, 0.0, 0.25, 0.5], [0.0, 0.0, 1.0, 0.0], [0.7, 0.7, 0.7, 0.7]]
OPTIONS = {"kl": 0.3, "entropy": 0.02, "guard": 0.1, "gamma": 0.97, "lam": 0.9}


def settled(name, **more):
    """The objective of a recipe, and its normaliser."""
    row = dict(zip(PARTS, RECIPES[name]))
    row.pop("resample")
    normaliser = row.pop("normaliser")
    return Objective(**row, **more), normaliser


def body(moved=0.1):
    """A random body, a policy that has left it, a critic with an opinion."""
    model, g = Model(SHAPE).init(0, std=0.3), torch.Generator().manual_seed(1)
    for role in (POLICY, CRITIC):
        model.add_role(role, rank=4, alpha=8)
        model.adapter(role).data += torch.randn(model.adapter(role).shape, generator=g) * moved
    model.roles[CRITIC].value.data += torch.randn(SHAPE.d, generator=g) * 0.1
    return model


def episodes(n=12, group=4, documents=lambda i: 3 * (i % 3), old=-4.0):
    """n trajectories of different lengths: prompt, a turn, documents, a turn."""
    g, out = torch.Generator().manual_seed(5), []
    for i in range(n):
        t = Trajectory(Question(f"q{i // group}", ("a",)) if i % group == 0 else out[-1].question)
        for length, mine in ((4, 0), (2 + i % 4, 1), (documents(i), 0), (1 + i % 3, 1)):
            ids = torch.randint(0, 61, (length,), generator=g).tolist()
            noise = (torch.rand(length, generator=g) - 0.5).tolist()
            t.add(ids, [old + x for x in noise] if mine else None)
        out.append(t)
    return out


def gradient(model, ts, adv, name, tokens=10**6, **more):
    o, normaliser = settled(name, **more)
    for role in (POLICY, CRITIC):
        for p in model.roles[role].parameters:
            p.grad = None
    optimizer = torch.optim.SGD([p for r in (POLICY, CRITIC) for p in model.roles[r].parameters], lr=0.0)
    batches = make_batches(ts, adv, tokens, "cpu", normaliser, 40)
    told = grpo.learn(model, batches, optimizer, replace(o, grad_clip=1e9), False)
    grads = [p.grad for r in (POLICY, CRITIC) for p in model.roles[r].parameters if p.grad is not None]
    return torch.cat([g.flatten() for g in grads]), told, len(batches)


# --------------------------------------------------------------------------- an independent implementation


def advantages_by_loops(rewards, kind):
    out = []
    for group in rewards:
        G, mean = len(group), sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (G - 1))
        for r in group:
            others = (sum(group) - r) / (G - 1)
            raw = {"reward": r, "whitened": r, "gae": r, "centred": r - mean, "rloo": r - others}
            raw |= {"grpo": (r - mean) / (std + 1e-6), "maxrl": (r - mean) / (mean + 1e-6)}
            out.append(raw[kind])
    return out


def kl_by_loops(kind, logp, ref):
    d = logp - ref
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]


def token_advantages_by_loops(episodes, scores, o):
    """episodes: for each its sampled tokens, as dicts with old, ref, value. Adds "adv" and "target"."""
    for tokens, score in zip(episodes, scores):
        rewards = [0.0] * len(tokens)
        rewards[-1] += score
        if o.kl_in == "reward":
            for t, token in enumerate(tokens):
                rewards[t] -= o.kl * kl_by_loops(o.kl_estimator, token["old"], token["ref"])
        running = 0.0
        for t in reversed(range(len(tokens))):
            if o.advantage == "gae":
                after = tokens[t + 1]["value"] if t + 1 < len(tokens) else 0.0
                delta = rewards[t] + o.gamma * after - tokens[t]["value"]
                running = delta + o.gamma * o.lam * running
                tokens[t]["target"] = running + tokens[t]["value"]
            else:
                running = rewards[t] + o.gamma * running
            tokens[t]["adv"] = running
    if o.advantage in ("gae", "whitened"):
        every = [token["adv"] for tokens in episodes for token in tokens]
        mean = sum(every) / len(every)
        var = sum((a - mean) ** 2 for a in every) / (len(every) - 1)
        for tokens in episodes:
            for token in tokens:
                token["adv"] = (token["adv"] - mean) / math.sqrt(var + 1e-8)


def clamp(x, low, high):
    return min(max(x, low), high)


def ratio_by_loops(kind, tokens, low, high):
    """The values of the losses of one trajectory's tokens."""
    logs = [token["logp"] - token["old"] for token in tokens]
    out = []
    for d, token in zip(logs, tokens):
        A, ratio = token["adv"], math.exp(d)
        if kind == "gspo":
            ratio = math.exp(sum(logs) / len(logs))
        if kind in ("ppo", "gspo", "dual"):
            each = -min(ratio * A, clamp(ratio, 1 - low, 1 + high) * A)
            each = min(each, -3 * A) if kind == "dual" and A < 0 else each
        elif kind == "cispo":
            each = -clamp(ratio, 1 - low, 1 + high) * A * token["logp"]
        elif kind == "sapo":
            tau = 1.0 if A > 0 else 1.05
            each = -A * 4 / tau / (1 + math.exp(-tau * (ratio - 1)))
        elif kind == "gmpo":
            total = 0.0
            for other, x in zip(tokens, logs):
                total += min(x, high) if other["adv"] > 0 else max(x, -low) if other["adv"] < 0 else 0.0
            mean = sum(other["adv"] for other in tokens) / len(tokens)
            each = -mean * math.exp(total / len(tokens))
        out.append(each)
    return out


def weights_by_loops(kind, lengths, group, longest):
    total, out = sum(lengths), []
    for i, n in enumerate(lengths):
        asked = lengths[i // group * group : (i // group + 1) * group]
        weight = {
            "token": 1 / total,
            "sequence": 1 / len(lengths) / n,
            "constant": 1 / len(lengths) / longest,
        }
        weight["prompt"] = 1 / (len(lengths) // group) / sum(asked)
        out.append(weight[kind])
    return out


def flat(episodes, key):
    return torch.tensor([t[key] for tokens in episodes for t in tokens], dtype=torch.float64)


def drawn(seed, off=0.3):
    """Sampled tokens of 12 episodes with log-probs and values, all drawn: no model is needed."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(1, generator=g).item()  # noqa: E731
    out = []
    for i in range(12):
        tokens = [{"old": -3 * draw(), "value": draw(), "entropy": draw()} for _ in range(1 + (5 * i) % 7)]
        for token in tokens:
            token["logp"] = token["old"] + off * (draw() - 0.5)
            token["ref"] = token["old"] + draw() - 0.5
        out.append(tokens)
    return out


@pytest.mark.parametrize("more", [{}, OPTIONS], ids=["usual", "options"])
@pytest.mark.parametrize("off", [0.0, 1.5])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_formula(name, off, more):
    """A wrong sign, a mean over the wrong axis, a clip on the wrong side: each trains, and trains worse."""
    o, normaliser = settled(name, **more)
    episodes = drawn(3, off)
    scores = advantages_by_loops(REWARDS, o.advantage)
    got = recipes.advantages(torch.tensor(REWARDS, dtype=torch.float64), o.advantage).flatten()
    assert torch.allclose(got, torch.tensor(scores, dtype=torch.float64), atol=1e-9)

    lengths = [len(tokens) for tokens in episodes]
    segment = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    w = recipes.token_weights(normaliser, lengths, [i // 4 for i in range(12)], 40)
    assert w == pytest.approx(weights_by_loops(normaliser, lengths, 4, 40))
    w = torch.tensor(w, dtype=torch.float64)[segment]
    batch = Batch(None, None, None, flat(episodes, "old"), got[segment], w, segment, flat(episodes, "ref"))
    batch = replace(batch, value=flat(episodes, "value")) if o.advantage == "gae" else batch
    (batch,) = [grpo.credit(batch, o)]
    (batch,) = grpo.whiten([batch]) if o.advantage in recipes.WHITENED else [batch]
    token_advantages_by_loops(episodes, scores, o)
    assert torch.allclose(batch.adv, flat(episodes, "adv"), atol=1e-9)

    want, logp = 0.0, flat(episodes, "logp").requires_grad_()
    for i, tokens in enumerate(episodes):
        fell = sum(token["logp"] - token["old"] for token in tokens) < 0
        good = sum(token["adv"] for token in tokens) >= 0
        losses = ratio_by_loops(o.ratio, tokens, o.clip_low, o.clip_high)
        for token, each in zip(tokens, losses):
            if o.kl_in == "loss":
                each += o.kl * kl_by_loops(o.kl_estimator, token["logp"], token["ref"])
            each -= o.entropy * token["entropy"]
            each += o.guard * max(0.0, token["old"] - token["logp"]) * (fell and good)
            want += weights_by_loops(normaliser, lengths, 4, 40)[i] * each
    loss = grpo.loss(logp, flat(episodes, "entropy"), batch, o)
    assert loss.item() == pytest.approx(want, rel=1e-9)
    if o.advantage == "gae":
        target, value, errors = flat(episodes, "target"), flat(episodes, "logp"), []
        assert torch.allclose(batch.target, target, atol=1e-9)
        for v, before, R in zip(value.tolist(), flat(episodes, "value").tolist(), target.tolist()):
            near = clamp(v, before - 0.5, before + 0.5)
            errors.append(0.5 * max((v - R) ** 2, (near - R) ** 2))
        assert recipes.value_loss(value, batch.value, target).tolist() == pytest.approx(errors)


THEIRS = {
    "grpo": "dapo",
    "rloo": "dapo",
    "dapo": "dapo",
    "gspo": "grpo",
    "dr_grpo": "dr_grpo",
    "sapo": "sapo",
}


@pytest.mark.parametrize("name", [*THEIRS, "cispo"])
def test_a_recipe_is_what_trl_computes(name):
    """Loss and gradient, with documents between two turns, by TRL's own code. Our `grpo` weighs tokens alike,
    as their `dapo` does; their CISPO has no lower bound, and ours is at 0."""
    what = "needs trl (requirements-bench.txt)"
    theirs = pytest.importorskip("trl.trainer.grpo_trainer", reason=what, exc_type=ImportError).GRPOTrainer
    o, normaliser = settled(name, kl=0.3)
    episodes, adv = drawn(7, 1.5), torch.tensor(advantages_by_loops(REWARDS, o.advantage))
    n = [len(tokens) for tokens in episodes]
    segment = torch.tensor([i for i, length in enumerate(n) for _ in range(length)])
    w = torch.tensor(recipes.token_weights(normaliser, n, [i // 4 for i in range(12)], 40))[segment]
    logp, old, ref = (flat(episodes, key).float() for key in ("logp", "old", "ref"))
    ours = logp.clone().requires_grad_()
    used = ref if o.kl_in == "loss" else None
    loss = grpo.loss(ours, ours * 0, Batch(None, None, None, old, adv[segment], w, segment, used), o)
    loss.backward()

    at = torch.tensor([j if j < 2 else j + 3 for length in n for j in range(length)])  # 3 tokens of documents
    mask = torch.zeros(12, 12).index_put((segment, at), torch.ones(len(at)))
    laid = lambda x: torch.randn(12, 12).index_put((segment, at), x)  # noqa: E731
    mine = logp.clone().requires_grad_()
    trainer = MagicMock(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=o.kl if used is not None else 0.0,
        importance_sampling_level="sequence" if name == "gspo" else "token", use_vllm=False,
        loss_type=THEIRS.get(name, name), epsilon_low=o.clip_low, max_completion_length=40,
        epsilon_high=1 + o.clip_high if name == "cispo" else o.clip_high, aux_loss_enabled=False,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies.return_value = (laid(mine), torch.zeros(12, 12), None)
    trainer.accelerator.num_processes = 1
    trainer.args = MagicMock(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer.args.configure_mock(sapo_temperature_pos=1.0, sapo_temperature_neg=1.05)
    trainer.accelerator.reduce.side_effect = lambda x, reduction: x
    trainer.accelerator.gather.side_effect = lambda x: x
    told = {"prompt_ids": torch.zeros(12, 1), "prompt_mask": torch.ones(12, 1), "tool_mask": mask}
    told |= {"completion_ids": torch.zeros(12, 12), "completion_mask": torch.ones(12, 12)}
    told |= {"advantages": adv, "old_per_token_logps": laid(old), "ref_per_token_logps": laid(ref)}
    want = theirs._compute_loss(trainer, None, told | {"num_items_in_batch": mask.sum()})
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-6)
    assert torch.allclose(ours.grad, mine.grad, atol=1e-6, rtol=1e-4) and mine.grad.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["token", "sequence", "prompt", "constant"])
def test_a_normaliser_is_its_formula(kind):
    """What weighs alike decides whom the policy learns from: tokens, trajectories, questions."""
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    got = recipes.token_weights(kind, lengths, "aaaabbbb", 10)
    assert got == pytest.approx(weights_by_loops(kind, lengths, 4, 10))


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_ratio_has_the_gradient_of_its_formula(ratio):
    """gspo and cispo stop a part of the gradient: their values say nothing about it. By finite differences of
    what they are to follow: the sequence's ratio spread over its tokens, and a constant weight."""
    episodes, low, high = drawn(4, 0.5), 0.2, 0.3
    segment = torch.tensor([i for i, tokens in enumerate(episodes) for _ in tokens])
    adv = torch.randn(len(segment), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logp, old = flat(episodes, "logp").requires_grad_(), flat(episodes, "old")
    RATIOS[ratio](logp, old, adv, segment, low, high).sum().backward()

    def value(at, kind):
        tokens = [{"logp": x, "old": y, "adv": a} for x, y, a in zip(at, old.tolist(), adv.tolist())]
        rows = [[t for t, s in zip(tokens, segment.tolist()) if s == i] for i in range(12)]
        return sum(sum(ratio_by_loops(kind, row, low, high)) for row in rows)

    for i in range(len(logp)):
        if ratio == "cispo":
            want = -clamp((logp[i] - old[i]).exp().item(), 1 - low, 1 + high) * adv[i].item()
        elif ratio == "gspo":
            mine = segment == segment[i]
            seq = math.exp((logp - old)[mine].mean().item())
            inside = seq < 1 + high if adv[i] > 0 else seq > 1 - low
            want = -adv[i].item() * seq * inside
        else:
            up, down = logp.detach().clone(), logp.detach().clone()
            up[i], down[i] = up[i] + 1e-6, down[i] - 1e-6
            want = (value(up.tolist(), ratio) - value(down.tolist(), ratio)) / 2e-6
        assert logp.grad[i].item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("estimator", KL)
def test_estimators_of_the_kl(estimator):
    """All are 0 where policy and reference agree; k1 and k3 have the exact KL as their mean."""
    p, q = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    exact, mean = (p.exp() * (p - q)).sum(), (p.exp() * KL[estimator](p, q)).sum()
    assert not KL[estimator](p, p).any() and (estimator == "k2" or torch.allclose(mean, exact))
    p.requires_grad_()  # the gradient of a sample of k2 is the KL's: sum p dlogp (logp - ref)
    KL["k2"](p, q).sum().backward()
    assert torch.allclose(p.grad, (p - q).detach())


def test_general_and_telescoped_advantages_agree():
    """With gamma = lambda = 1 GAE is the rewards to go minus the value; the general sum must not drift from
    it over a long trajectory, nor run from one into the next."""
    g = torch.Generator().manual_seed(0)
    segment = torch.tensor([0] * 700 + [1] + [2] * 65)
    r, v = torch.randn(2, len(segment), generator=g)
    togo = torch.cat([x.flip(0).cumsum(0).flip(0) for x in r.split([700, 1, 65])])
    assert torch.allclose(recipes.gae(r, v, segment), togo - v, atol=1e-3)
    assert torch.allclose(recipes.to_go(r, segment), togo, atol=1e-4)
    slow = [0.0] * len(r)
    for t in reversed(range(len(r))):
        last = t + 1 == len(r) or segment[t + 1] != segment[t]
        after, then = (0.0, 0.0) if last else (v[t + 1].item(), slow[t + 1])
        slow[t] = r[t].item() + 0.99 * after - v[t].item() + 0.99 * 0.95 * then
    assert torch.allclose(recipes.gae(r, v, segment, 0.99, 0.95), torch.tensor(slow), atol=1e-4)


# ------------------------------------------------------------------------------- what holds in all of them


@pytest.mark.parametrize("name", RECIPES)
def test_a_positive_advantage_raises_a_log_prob(name):
    """A sign that is wrong in one recipe of twelve is found by whoever chooses that one."""
    model, o = body(), settled(name, kl=0.0)[0]
    ts = episodes(2, 2)
    for t in ts:  # as sampled from this policy
        (batch,) = make_batches([t], [0.0], 10**6)
        with torch.no_grad():
            values = iter(token_logps(model, batch, POLICY)[0].tolist())
        t.logps = [next(values) if m else 0.0 for m in t.mask]
    likely = [sum(t.logps) for t in ts]
    batches = make_batches(ts, [1.0, -1.0], 10**6, "cpu", settled(name)[1], 40)
    model.roles[CRITIC].value.data.zero_()
    grpo.learn(model, batches, torch.optim.SGD([model.adapter(POLICY)], 0.02), replace(o, grad_clip=0.5))
    for t, before, sign in zip(ts, likely, (1, -1)):
        (batch,) = make_batches([t], [0.0], 10**6)
        with torch.no_grad():
            assert (token_logps(model, batch, POLICY)[0].sum().item() - before) * sign > 1e-3


@pytest.mark.parametrize("name", [*RECIPES, "prompt"])
def test_any_split_into_micro_batches_gives_the_same_gradient(name):
    """Means and whitening over a micro-batch instead of the update would make its size a hyperparameter: for
    sequences, questions and the critic as well."""
    model, ts, adv = body(), episodes(), [x for row in REWARDS for x in row]
    more = {"kl": 0.3, "entropy": 0.02, "guard": 0.5, "gamma": 0.9, "lam": 0.8}
    kind = "grpo" if name == "prompt" else name
    want, told, one = gradient(model, ts, adv, kind, **more)
    assert one == 1 and want.abs().max() > 1e-4
    for tokens in (1, 30, 60):
        got, also, many = gradient(model, ts, adv, kind, tokens, **more)
        assert many > 1 and torch.allclose(got, want, atol=1e-5 + 1e-4 * want.abs().max().item())
        also["padding"] = told["padding"]
        assert also == pytest.approx(told, rel=1e-3, abs=1e-5)
    weights = [b.w for b in make_batches(ts, adv, 40, "cpu", "prompt" if name == "prompt" else "sequence")]
    assert torch.cat(weights).sum().item() == pytest.approx(1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_document_changes_no_advantage_and_no_return(name, monkeypatch):
    """Defect 8: GAE and whitening ran over documents; other trainers zeroed the return at them, or let it
    decay. Here whatever runs over time must not see them: a table of tokens' figures stands for the model."""
    table = torch.rand(61, 3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        grpo, "token_logps", lambda m, b, role, *_: (-table[b.ids[b.mask], int(role == REFERENCE)], None)
    )
    monkeypatch.setattr(grpo, "values", lambda m, b, *_: table[b.ids[b.mask], 2])
    o, normaliser = settled(name, **OPTIONS)
    seen = []
    for documents in (0, 7):
        ts, adv = episodes(documents=lambda i, n=documents: 0), [x for row in REWARDS for x in row]
        for t in ts if documents else ():
            at = max(i for i in range(1, len(t.ids)) if t.mask[i]) - 1
            t.ids[at:at], t.mask[at:at], t.logps[at:at] = [9] * documents, [0] * documents, [0.0] * documents
        batches = make_batches(ts, adv, 50, "cpu", normaliser, 40)
        mine = {}
        for b in grpo.assess(SimpleNamespace(roles={}), batches, o):
            for row in range(len(b.ids)):
                of = b.segment == row
                key = tuple(b.ids[row][b.mask[row]].tolist())
                parts = [b.adv, b.w] + ([b.target] if b.target is not None else [])
                mine[key] = torch.stack([x[of] for x in parts])
        seen.append(mine)
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) == 12
    for key, want in seen[0].items():
        assert torch.allclose(seen[1][key], want, atol=1e-5)


def test_siblings_of_one_stratum_are_compared_with_each_other():
    """Episodes that searched once and episodes that searched thrice are not rivals (arXiv 2510.06214); one
    that is alone in its stratum has nobody to be compared with there."""
    r = torch.tensor([[1.0, 0.0, 0.5, 0.1, 0.9]])
    strata = torch.tensor([[1, 1, 2, 2, 3]])
    for kind in ADVANTAGES.keys() - set(ALONE):
        first, second = (ADVANTAGES[kind](r[:, at]) for at in (slice(0, 2), slice(2, 4)))
        want = torch.cat((first, second, torch.zeros(1, 1)), 1)
        assert torch.allclose(recipes.advantages(r, kind, strata, 1.0), want)
        half = (want + ADVANTAGES[kind](r)) / 2
        assert torch.allclose(recipes.advantages(r, kind, strata, 0.5), half)


def test_flags_override_one_part_of_a_recipe():
    """A recipe is a starting point: whoever changes one part keeps the others."""
    for name, row in RECIPES.items():
        a = flags.settle("train", {"algorithm": name})
        assert tuple(getattr(a, part) for part in PARTS) == row
    bounds = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "gmpo": (0.4, 0.4), "cispo": (1, 4)}  # the papers'
    assert all(RECIPES[name][2:4] == bounds.get(name, (0.2, 0.2)) for name in RECIPES)
    a = flags.settle("train", {"algorithm": "dapo", "clip-high": 0.5, "resample": 0, "kl-in": "loss"})
    assert (a.clip_low, a.clip_high, a.resample, a.kl_in, a.advantage) == (0.2, 0.5, 0, "loss", "grpo")
    for wrong, words in [
        ({"guard": 0.1}, "--updates 2"),
        ({"strata": 0.5, "algorithm": "ppo"}, "makes none"),
        ({"group": 1}, "no siblings"),
    ]:
        with pytest.raises(ValueError, match=words):
            flags.settle("train", wrong)
    assert flags.settle("train", {"group": 1, "algorithm": "reinforce"}).group == 1
