"""The gradient's direction and its invariances, on a small random network."""

import pytest
import torch

import grpo
import recipes
from grpo import make_batches, token_logps
from model import POLICY, REFERENCE, Config, Model
from recipes import Objective, advantages
from rollout import Question, Trajectory

SHAPE = Config("qwen2", vocab=61, d=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, context=64)
QUESTION = Question("q", ("a",))
PLAIN = Objective(kl=0.0)


def body(moved=0.1):
    model = Model(SHAPE).init(0, std=0.3)
    model.add_role(POLICY, rank=4, alpha=8)
    g = torch.Generator().manual_seed(1)
    model.adapter(POLICY).data += torch.randn(model.adapter(POLICY).shape, generator=g) * moved
    return model


def trajectory(seed, given=5, sampled=4, documents=6, more=3):
    """prompt, sampled, documents, sampled: with the log-probs of sampling left at zero until `refresh`."""
    g = torch.Generator().manual_seed(seed)
    t = Trajectory(QUESTION)
    for n, mine in ((given, False), (sampled, True), (documents, False), (more, True)):
        ids = torch.randint(0, 61, (n,), generator=g).tolist()
        t.add(ids, [0.0] * n if mine else None)
    return t


def refresh(model, t):
    """Give a trajectory the log-probs that the policy has for it now, as sampling would."""
    (batch,) = make_batches([t], [0.0], 10**6)
    with torch.no_grad():
        values = iter(token_logps(model, batch, POLICY)[0].tolist())
    t.logps = [next(values) if m else 0.0 for m in t.mask]
    return t


def total(model, t, role=POLICY):
    (batch,) = make_batches([t], [0.0], 10**6)
    with torch.no_grad():
        return token_logps(model, batch, role)[0].sum().item()


def update(model, trajectories, adv, o, lr=0.02, tokens=10**6):
    return grpo.learn(
        model, make_batches(trajectories, adv, tokens), torch.optim.SGD([model.adapter(POLICY)], lr), o
    )


@pytest.mark.parametrize("adv", [1.0, -1.0])
def test_the_advantage_moves_the_log_prob_its_way(adv):
    """A wrong sign anywhere would teach the policy its worst episodes."""
    model = body()
    t = refresh(model, trajectory(0))
    before = total(model, t)
    update(model, [t], [adv], PLAIN)
    assert (total(model, t) - before) * adv > 0.01


def test_kl_alone_pulls_to_the_reference():
    """Defect 2: the KL term had the wrong sign, so the policy was paid for leaving its reference."""
    model = body()
    ts = [refresh(model, trajectory(i)) for i in range(4)]
    kls = []
    for _ in range(12):
        kls.append(update(model, ts, [0.0] * 4, Objective(kl=1.0), lr=0.05)["kl"])
    assert kls[-1] < 0.7 * kls[0] and kls[0] > 0


def test_an_entropy_bonus_raises_entropy():
    """With its sign turned it would do the opposite of what its flag promises: narrow the policy."""
    model = body()
    ts = [refresh(model, trajectory(i)) for i in range(4)]
    o = Objective(kl=0.0, entropy=1.0)
    entropies = [update(model, ts, [0.0] * 4, o, lr=0.05)["entropy"] for _ in range(8)]
    assert entropies[-1] > entropies[0] + 0.05


def test_no_update_remembers_the_last_one():
    """Gradients that are never zeroed add up: every update would be the sum of all before it."""
    model = body()
    t = refresh(model, trajectory(0))
    norms = [update(model, [t], [1.0], PLAIN, lr=0.0)["grad_norm"] for _ in range(3)]
    assert norms[0] > 0 and norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_a_gradient_is_clipped_and_told_unclipped():
    """One strange step must not throw the adapter away; the figure must show how strange it was."""
    for most in (0.01, 100.0):
        model = body()
        t, before = refresh(model, trajectory(0)), model.adapter(POLICY).detach().clone()
        norm = update(model, [t], [1.0], Objective(kl=0.0, grad_clip=most), lr=1.0)["grad_norm"]
        moved = (model.adapter(POLICY).detach() - before).norm().item()
        assert 0.01 < norm < 100 and moved == pytest.approx(min(norm, most), rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bad):
    """One NaN in the adapter, and every step after it trains nothing, in silence."""
    model = body()
    t, before = refresh(model, trajectory(0)), model.adapter(POLICY).detach().clone()
    assert update(model, [t], [bad], PLAIN)["skipped_updates"] == 1
    assert torch.equal(model.adapter(POLICY).detach(), before)
    assert update(model, [t], [1.0], PLAIN)["skipped_updates"] == 0
    assert not torch.equal(model.adapter(POLICY).detach(), before)


def test_k3_is_a_kl():
    """The estimator must be zero at equality, positive elsewhere, and unbiased: its mean is the exact KL."""
    p, q = torch.randn(7).log_softmax(0), torch.randn(7).log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    assert torch.allclose((p.exp() * recipes.k3(p, q)).sum(), exact, atol=1e-6)
    assert (recipes.k3(p, q) >= 0).all() and recipes.k3(p, p).abs().max() == 0


def gradient(model, ts, adv, tokens):
    o = Objective(kl=0.1, entropy=0.01)
    model.adapter(POLICY).grad = None
    batches = make_batches(ts, adv, tokens)
    for b in grpo.assess(model, batches, o):
        logp, entropy = token_logps(model, b, POLICY)
        grpo.loss(logp, entropy, b, o).backward()
    assert abs(sum(b.w.sum().item() for b in batches) - 1) < 1e-5
    return model.adapter(POLICY).grad.clone(), len(batches)


def test_any_split_into_micro_batches_gives_the_same_gradient():
    """Defect 12: the second mini-batch of a step was scaled by a quarter; padding must not weigh either."""
    model = body()
    ts = [refresh(model, trajectory(i, sampled=2 + 3 * i, documents=5 * (i % 3))) for i in range(6)]
    adv = [1.0, -0.5, 0.3, -1.2, 0.0, 2.0]
    want, one = gradient(model, ts, adv, 10**6)
    assert one == 1
    for tokens in (1, 40, 90):
        got, many = gradient(model, ts, adv, tokens)
        assert many > 1 and torch.allclose(got, want, atol=1e-5)
    got, _ = gradient(model, ts[::-1], adv[::-1], 60)
    assert torch.allclose(got, want, atol=1e-5)


def test_document_tokens_have_no_part_in_the_loss():
    """Defect 8: document tokens in the loss teach the policy to write documents; only sampled tokens
    count."""
    model = body()
    t = refresh(model, trajectory(0))
    (batch,) = make_batches([t], [1.0], 10**6)
    assert batch.old.numel() == batch.adv.numel() == batch.w.numel() == sum(t.mask) == 7
    logp, _ = token_logps(model, batch, POLICY)
    with torch.no_grad():
        full = model.logits(model(batch.ids, POLICY)).log_softmax(-1)[0]
    want = [full[i - 1, t.ids[i]] for i in range(len(t.ids)) if t.mask[i]]
    assert torch.allclose(logp, torch.stack(want), atol=1e-5)


def test_the_last_sampled_token_is_trained_even_if_it_equals_padding():
    """Defects 5 and 6: end-of-turn tokens vanished from the mask because they equal the pad id."""
    t = trajectory(0)
    t.ids[-1] = 0
    long = trajectory(1, documents=30)
    (batch,) = make_batches([t, long], [1.0, 1.0], 10**6)
    row = int((batch.lengths == len(t.ids)).nonzero())
    assert batch.mask[row, len(t.ids) - 1] and not batch.mask[row, len(t.ids) :].any()
    assert batch.w.numel() == sum(t.mask) + sum(long.mask)


def test_clipping_stops_the_gradient_only_in_the_rewarded_direction():
    """A ratio already past the clip must not be pushed further, but must be let back."""
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0])
    recipes.surrogate(logp, torch.zeros(4), adv, 0.2, 0.2).sum().backward()
    assert (logp.grad != 0).tolist() == [False, True, True, False]


def test_advantages_have_a_baseline():
    """Defect 8: REINFORCE without a baseline pushes up every episode whose reward is positive."""
    r = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.2, 0.4, 0.6, 0.8]])
    for kind in ("grpo", "rloo"):
        a = advantages(r, kind)
        assert a.sum(1).abs().max() < 1e-5 and a[1].abs().max() < 1e-5
    assert torch.allclose(advantages(r, "rloo")[0], torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))
    assert torch.allclose(advantages(r)[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-4)
    assert recipes.informative(r).tolist() == [True, False, True]
    assert torch.equal(advantages(torch.tensor([[0.0, 1e-6]])).sign(), torch.tensor([[-1.0, 1.0]]))
    with pytest.raises(ValueError, match="group of 1"):
        advantages(r[:, :1])
    with pytest.raises(ValueError, match="unknown advantage"):
        advantages(r, "magic")


def test_shuffled_rewards_stay_in_their_group():
    """The control would be no control if it moved reward between questions, or left it in place; and a run
    that goes on must shuffle as it would have."""
    r = torch.arange(80.0).view(10, 8)
    s = recipes.shuffle_siblings(r, 3)
    assert torch.equal(s.sort(1).values, r) and not torch.equal(s, r)
    again, other = (recipes.shuffle_siblings(r, seed) for seed in (3, 4))
    assert torch.equal(s, again) and not torch.equal(s, other)
    assert not torch.equal(s[0] - r[0], s[1] - r[1])  # each group in an order of its own


def test_on_policy_figures():
    """Right after sampling the ratio is 1 and the gap 0; anything else is a bug between rollout and
    training."""
    model = body()
    t = refresh(model, trajectory(0))
    got = update(model, [t], [1.0], Objective())
    assert abs(got["ratio"] - 1) < 1e-5 and got["gap"] < 1e-5 and got["clipped"] == 0
    assert got["trained_tokens"] == 7 and got["grad_norm"] > 0 and got["kl"] > 0


def test_figures_are_of_the_whole_update():
    """A figure of the last micro-batch alone, or a sum in place of a mean, hides a run that goes wrong: they
    are the same by any split, and the loss is what the others make it."""
    o, adv = Objective(kl=0.5, entropy=0.1), [1.0, -0.5, 0.25]
    lengths, told = [12 + 4 + 3, 13 + 4 + 3, 20 + 4 + 3], []
    for tokens in (10**6, 2 * 20, 1):
        model = body()
        ts = [refresh(model, trajectory(i, documents=n - 12)) for i, n in enumerate(lengths)]
        assert [len(t.ids) for t in ts] == lengths
        told.append(update(model, ts, adv, o, tokens=tokens))
    paddings = [1 - sum(lengths) / n for n in (3 * 27, 2 * 20 + 27, sum(lengths))]
    assert [got.pop("padding") for got in told] == pytest.approx(paddings)
    for got in told:
        assert got == pytest.approx(told[0], rel=1e-3, abs=1e-6) and got["trained_tokens"] == 21
        assert got["loss"] == pytest.approx(-sum(adv) / 3 + 0.5 * got["kl"] - 0.1 * got["entropy"], rel=1e-3)
        assert got["kl"] > 0.01 and got["entropy"] > 0.1


@pytest.mark.parametrize("recompute", [True, False])
def test_activations_are_computed_again_where_that_is_asked_for(recompute):
    """A plan that counts on it would run out of memory without; nobody else should pay a third more time. The
    reference keeps none in any case."""
    model, seen = body(), []
    t = refresh(model, trajectory(0))
    hook = lambda model, args, more: seen.append((args[1], bool(more.get("recompute"))))  # noqa: E731
    model.register_forward_pre_hook(hook, with_kwargs=True)
    optimizer = torch.optim.SGD([model.adapter(POLICY)], 0.1)
    grpo.learn(model, make_batches([t], [1.0], 10**6), optimizer, Objective(), *[True] * recompute)
    assert seen == [(REFERENCE, False), (POLICY, recompute)]


def test_figures_off_policy():
    """How far the policy has left its samples: the mean ratio, the mean gap, the share beyond the clip."""
    moved = torch.tensor([1.3, 0.7, 1.1, 1.0]).log()
    (batch,) = make_batches([trajectory(0, sampled=1)], [1.0], 10**6)
    got = {k: v.tolist() for k, v in grpo.figures(batch.old + moved, moved, batch, PLAIN).items()}
    assert got["ratio"] == pytest.approx([1.3, 0.7, 1.1, 1.0])
    assert got["clipped"] == [1, 1, 0, 0] and got["kl"] == [0, 0, 0, 0]
    assert not grpo.figures(batch.old, moved, batch, Objective(clip_low=0.0, clip_high=0.0))["clipped"].any()
    assert got["gap"] == pytest.approx(moved.abs().tolist()) and got["entropy"] == moved.tolist()
