"""Learning: from rewards to one scalar whose gradient we follow.

Group-relative policy optimisation (arXiv 2402.03300): G episodes of one question are judged against each
other, so no critic is needed. The old log-probs are those of sampling, so there is no second forward pass for
them; the reference is the same body without its adapter, and is asked only where the KL coefficient is not
zero.

What this is not: a trainer. It knows neither search nor simulator nor any text; trajectories come in as ids,
a mask of what was sampled, and the log-probs of sampling.

    L = sum_i w_i ( -min(r_i A_i, clip(r_i, 1 - e, 1 + e) A_i) + beta (exp(d_i) - d_i - 1) - c H_i ),    sum_i
    w_i = 1 r_i = exp(logp_i - old_i),   d_i = ref_i - logp_i,   i over the sampled tokens of the whole step
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import linear_logp
from model import POLICY, REFERENCE, Model
from rollout import Trajectory


@dataclass(frozen=True)
class Objective:
    """The coefficients of the loss."""

    clip: float = 0.2
    kl: float = 1e-3  # beta, of the k3 estimator
    entropy: float = 0.0  # c
    grad_clip: float = 1.0  # largest norm of the gradient


@dataclass(frozen=True)
class Batch:
    """Right-padded trajectories. N = mask.sum(): after `token_logps` all is flat, with no shift and no
    mask."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool, True = sampled by the policy
    lengths: Tensor  # (B,)
    old: Tensor  # (N,) log-probs when sampled
    adv: Tensor  # (N,)
    w: Tensor  # (N,) weights; they sum to 1 over all batches of an update


def advantages(rewards: Tensor, kind: str = "grpo") -> Tensor:
    """rewards (Q, G) of G siblings a question -> advantages (Q, G).

    grpo: (r - mean) / (std + 1e-6) within the group. rloo: r - mean of the *other* siblings, an unbiased
    baseline (arXiv 2402.14740). Both are zero where all siblings have the same reward.
    """
    if rewards.size(1) < 2:
        raise ValueError("a group of 1 has no siblings to be compared with: use a group of 2 or more")
    centred = rewards - rewards.mean(1, keepdim=True)
    if kind == "rloo":
        return centred * (rewards.size(1) / (rewards.size(1) - 1))
    if kind == "grpo":
        return centred / (rewards.std(1, keepdim=True) + 1e-6)
    raise ValueError(f"unknown algorithm {kind!r}: use grpo or rloo")


def shuffle_siblings(rewards: Tensor, seed: int) -> Tensor:
    """A control: permute rewards (Q, G) within each group, so that nothing can be learnt from them."""
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(rewards.shape, generator=g).argsort(1)
    return rewards.gather(1, order)


def informative(rewards: Tensor) -> Tensor:
    """(Q, G) -> (Q,) True where siblings differ: other groups have no gradient and are skipped."""
    return rewards.max(1).values > rewards.min(1).values


def make_batches(
    trajectories: Sequence[Trajectory], adv: Sequence[float], tokens: int, device: torch.device | str = "cpu"
) -> list[Batch]:
    """Cut one update's trajectories into micro-batches of at most `tokens` padded tokens, sorted by length.

    Every sampled token of the update weighs the same, 1 / their number, whatever micro-batch it falls into.
    """
    pairs = sorted((p for p in zip(trajectories, adv) if sum(p[0].mask)), key=lambda p: len(p[0].ids))
    total = sum(sum(t.mask) for t, _ in pairs)
    groups: list[list] = []
    for pair in pairs:
        if groups and (len(groups[-1]) + 1) * len(pair[0].ids) <= tokens:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return [_batch(group, total, device) for group in groups]


def _batch(group: list[tuple[Trajectory, float]], total: int, device) -> Batch:
    T = max(len(t.ids) for t, _ in group)
    ids = torch.tensor([t.ids + [0] * (T - len(t.ids)) for t, _ in group])
    mask = torch.tensor([t.mask + [0] * (T - len(t.mask)) for t, _ in group]).bool()
    old = torch.tensor([logp for t, _ in group for logp, m in zip(t.logps, t.mask) if m])
    adv = torch.tensor([a for t, a in group for _ in range(sum(t.mask))], dtype=torch.float32)
    lengths = torch.tensor([len(t.ids) for t, _ in group])
    parts = (ids, mask, lengths, old, adv, torch.full_like(adv, 1 / total))
    return Batch(*(x.to(device) for x in parts))


def token_logps(model: Model, batch: Batch, role: int, recompute: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (N,) of the batch's sampled tokens, in nats. The only shift in the
    repository."""
    h = model(batch.ids, role, batch.lengths, recompute=recompute)[:, :-1][batch.mask[:, 1:]]  # (N, d)
    return linear_logp(h, model.head, batch.ids[:, 1:][batch.mask[:, 1:]])


def surrogate(logp: Tensor, old: Tensor, adv: Tensor, clip: float) -> Tensor:
    """The clipped policy loss of each token (N,) (arXiv 1707.06347, eq. 7, negated)."""
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """KL(policy || reference) of each token (N,), estimated on the policy's samples: unbiased, never
    negative."""
    d = ref - logp
    return d.exp() - d - 1


def loss(logp: Tensor, entropy: Tensor, ref: Tensor | None, batch: Batch, o: Objective) -> Tensor:
    """The scalar of the file's head, one micro-batch's share of it."""
    each = surrogate(logp, batch.old, batch.adv, o.clip)
    if ref is not None:
        each = each + o.kl * k3(logp, ref)
    if o.entropy:
        each = each - o.entropy * entropy
    return (batch.w * each).sum()


def learn(
    model: Model,
    batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    o: Objective,
    recompute: bool = False,
) -> dict[str, float]:
    """One update of the policy's adapter from all micro-batches of a step. Returns the step's health figures.

    kl, entropy: nats a token. ratio: its mean. clipped: share of tokens. gap: mean |training - sampling
    log-prob|.
    """
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, float] = {}
    for batch in batches:
        ref = None
        if o.kl:
            with torch.no_grad():
                ref = token_logps(model, batch, REFERENCE)[0]
        logp, entropy = token_logps(model, batch, POLICY, recompute)
        value = loss(logp, entropy, ref, batch, o)
        value.backward()
        for name, x in figures(logp.detach(), entropy.detach(), ref, batch, o).items():
            sums[name] = sums.get(name, 0.0) + (batch.w * x).sum().item()
        sums["loss"] = sums.get("loss", 0.0) + value.item()
    norm = torch.nn.utils.clip_grad_norm_([model.adapter(POLICY)], o.grad_clip)
    if not torch.isfinite(norm):
        raise ValueError("the gradient is not finite: lower --lr, or use --dtype bf16 or fp32")
    optimizer.step()
    padded = sum(b.ids.numel() for b in batches)
    waste = 1 - sum(int(b.lengths.sum()) for b in batches) / padded
    return sums | {
        "grad_norm": norm.item(),
        "padding": waste,
        "trained_tokens": sum(b.w.numel() for b in batches),
    }


def figures(
    logp: Tensor, entropy: Tensor, ref: Tensor | None, batch: Batch, o: Objective
) -> dict[str, Tensor]:
    """Health figures of each token (N,)."""
    ratio = (logp - batch.old).exp()
    return {
        "kl": k3(logp, ref) if ref is not None else torch.zeros_like(logp),
        "entropy": entropy,
        "ratio": ratio,
        "clipped": ((ratio - 1).abs() > o.clip).float(),
        "gap": (logp - batch.old).abs(),
    }
