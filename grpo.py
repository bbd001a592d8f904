"""Learning: from rewards to one scalar whose gradient we follow.

What an algorithm is stands in recipes.py, as pure functions; here they meet a model. The old log-probs are
those of sampling, so there is no second forward pass for them; the reference is the same body with the
adapter that the policy started from, or none, and PPO's critic the same body with another one and a vector.

Not a trainer: it knows neither search nor simulator nor any text. Trajectories come in as ids, a mask of what
was sampled, and the log-probs of sampling.

    L = sum_i w_i ( ratio(logp_i, old_i, A_i) + beta KL_i - c H_i )      i over the sampled tokens of the step
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import ranks
from kernels import linear_logp
from model import CRITIC, POLICY, REFERENCE, START, Model
from recipes import KL, RATIOS, WHITENED, Objective, gae, guard, k3, means, to_go, token_weights, value_loss
from rollout import Trajectory

NOT_FINITE = "as their gradients were not finite: lower --lr, or use --dtype bf16 or fp32"


@dataclass(frozen=True)
class Batch:
    """Right-padded trajectories. N = mask.sum(): after `token_logps` all is flat, with no shift and no
    mask. The last three are filled in by `assess`."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool, True = sampled by the policy
    lengths: Tensor  # (B,)
    old: Tensor  # (N,) log-probs when sampled
    adv: Tensor  # (N,)
    w: Tensor  # (N,) weights; by `token` they sum to 1 over all batches of an update
    segment: Tensor  # (N,) the row of each token's trajectory
    ref: Tensor | None = None  # (N,) log-probs of the reference
    value: Tensor | None = None  # (N,) the critic's, before the update
    target: Tensor | None = None  # (N,) what it should have said


def credit(b: Batch, o: Objective) -> Batch:
    """The advantage of each trajectory, which is its reward at the last token, becomes that of its tokens."""
    last = F.pad(b.segment[1:] != b.segment[:-1], (0, 1), value=True)
    r = torch.where(last, b.adv, 0.0)
    if b.ref is not None and o.kl_in == "reward":
        r = r - o.kl * KL[o.kl_estimator](b.old, b.ref)
    if b.value is None:
        return replace(b, adv=to_go(r, b.segment, o.gamma))
    adv = gae(r, b.value, b.segment, o.gamma, o.lam)
    return replace(b, adv=adv, target=adv + b.value)


def whiten(batches: list[Batch]) -> list[Batch]:
    """Advantages of mean 0 and standard deviation 1 over all sampled tokens of the update."""
    adv = torch.cat([adv for part in ranks.everyone([b.adv.cpu() for b in batches]) for adv in part])
    return [replace(b, adv=(b.adv - adv.mean()) / (adv.var() + 1e-8).sqrt()) for b in batches]


def cut(lengths: Sequence[int], tokens: int) -> Iterator[slice]:
    """Rows, sorted by length, in micro-batches of at most `tokens` tokens with their padding, or of one row.
    A row that would pad the shorter ones by more than a sixteenth of that begins the next one."""
    first = held = 0
    for i, n in enumerate(lengths):
        rows = i - first
        if rows and ((rows + 1) * n > tokens or rows * n - held > tokens / 16):
            yield slice(first, i)
            first, held = i, 0
        held += n
    if lengths:
        yield slice(first, len(lengths))


def make_batches(
    trajectories: Sequence[Trajectory],
    adv: Sequence[float],
    tokens: int,
    device: torch.device | str = "cpu",
    normaliser: str = "token",
    longest: int = 1,
    part: slice = slice(None),
) -> list[Batch]:
    """Cut one update's trajectories into micro-batches (see `cut`).

    A token weighs the same whatever micro-batch it falls into; `token_weights` says how much. part: take
    only these of the sorted trajectories, weighed as in the whole update.
    """
    pairs = sorted((p for p in zip(trajectories, adv) if sum(p[0].mask)), key=lambda p: len(p[0].ids))
    n = [sum(t.mask) for t, _ in pairs]
    w = token_weights(normaliser, n, [t.question for t, _ in pairs], longest)
    rows = [(*pair, each) for pair, each in zip(pairs, w)][part]
    return [_batch(rows[some], device) for some in cut([len(t.ids) for t, *_ in rows], tokens)]


def _batch(group: list[tuple[Trajectory, float, float]], device) -> Batch:
    trajectories, adv, w = zip(*group)
    T = max(len(t.ids) for t in trajectories)
    ids = torch.tensor([t.ids + [0] * (T - len(t.ids)) for t in trajectories])
    mask = torch.tensor([t.mask + [0] * (T - len(t.mask)) for t in trajectories]).bool()
    lengths = torch.tensor([len(t.ids) for t in trajectories])
    old = torch.tensor([logp for t in trajectories for logp, m in zip(t.logps, t.mask) if m])
    segment = mask.nonzero()[:, 0]
    flat = (torch.tensor(x, dtype=torch.float32)[segment] for x in (adv, w))
    return Batch(*(x.to(device) for x in (ids, mask, lengths, old, *flat, segment)))


def hidden(model: Model, batch: Batch, role: int, recompute: bool = False) -> Tensor:
    """(N, d): the state before each sampled token."""
    before = F.pad(batch.mask[:, 1:], (0, 1))
    return model(batch.ids, role, batch.lengths, recompute=recompute, chosen=before)


def token_logps(model: Model, batch: Batch, role: int, recompute: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (N,) of the batch's sampled tokens, in nats."""
    h = hidden(model, batch, role, recompute)
    return linear_logp(h, model.head, batch.ids[:, 1:][batch.mask[:, 1:]])


def values(model: Model, batch: Batch, recompute: bool = False) -> Tensor:
    """What the critic expects (N,) before each sampled token."""
    return hidden(model, batch, CRITIC, recompute).float() @ model.roles[CRITIC].value


@torch.no_grad()
def assess(model: Model, batches: list[Batch], o: Objective) -> list[Batch]:
    """What forward passes without gradient tell (reference, values), and the advantages of tokens."""
    out, start = [], START if START in model.roles else REFERENCE
    for b in batches:
        if (unknown := b.old.isnan()).any():  # tokens that were not sampled; see compat.py
            b = replace(b, old=torch.where(unknown, token_logps(model, b, POLICY)[0], b.old))
        ref = token_logps(model, b, start)[0] if o.kl and o.kl_in != "none" else None
        value = values(model, b) if o.advantage == "gae" else None
        out.append(credit(replace(b, ref=ref, value=value), o))
    return whiten(out) if o.advantage in WHITENED else out


# --------------------------------------------------------------------------------------------------- the loss


def loss(logp: Tensor, entropy: Tensor, b: Batch, o: Objective) -> Tensor:
    """The scalar of the file's head, one micro-batch's share of it."""
    each = RATIOS[o.ratio](logp, b.old, b.adv, b.segment, o.clip_low, o.clip_high)
    if b.ref is not None and o.kl_in == "loss":
        each = each + o.kl * KL[o.kl_estimator](logp, b.ref)
    if o.entropy:
        each = each - o.entropy * entropy
    if o.guard:
        each = each + o.guard * guard(logp, b.old, b.adv, b.segment)
    return (b.w * each).sum()


def learn(
    model: Model,
    batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    o: Objective,
    recompute: bool = False,
    lent: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, float]:
    """One update of the policy's adapter from all micro-batches of a step, and of the critic where there is
    one; none where a gradient is not finite. Several processes bring their parts of the batches, and add up
    one gradient. lent(): where a forward pass keeps its activations. Returns the step's health figures.

    kl, entropy: nats a token. ratio: its mean. clipped: share of tokens. gap: mean |training - sampling
    log-prob|. skipped_updates: 1 where there was none.
    """
    optimizer.zero_grad(set_to_none=True)
    mine: dict[str, float] = Counter()
    share = 1 / sum(ranks.everyone(sum(b.w.numel() for b in batches)))
    for b in assess(model, batches, o):
        with lent():
            logp, entropy = token_logps(model, b, POLICY, recompute)
        total = loss(logp, entropy, b, o)
        total.backward()
        told = figures(logp.detach(), entropy.detach(), b, o)
        if b.value is not None:
            with lent():
                value = values(model, b, recompute)
            error = value_loss(value, b.value, b.target)
            (share * error).sum().backward()
            told["value_loss"] = error.detach()
        mine.update({name: (share * x).sum().item() for name, x in told.items()} | {"loss": total.item()})
        mine.update({"fed": b.ids.numel(), "padding": b.ids.numel() - int(b.lengths.sum())})
    sums: dict[str, float] = Counter()
    for part in ranks.everyone(mine):
        sums.update(part)
    trained = {"grad_norm": [model.adapter(POLICY)]}
    trained |= {"critic_norm": model.roles[CRITIC].parameters} if o.advantage == "gae" else {}
    for name, parameters in trained.items():
        for p in (p for p in parameters if p.grad is None):
            p.grad = torch.zeros_like(p)  # no batch fell to this process
        ranks.add_up(p.grad for p in parameters)
        sums[name] = torch.nn.utils.clip_grad_norm_(parameters, o.grad_clip).item()
    if sound := all(math.isfinite(sums[name]) for name in trained):
        optimizer.step()
    sums["padding"] /= sums.pop("fed")
    return dict(sums) | {"trained_tokens": round(1 / share), "skipped_updates": int(not sound)}


def figures(logp: Tensor, entropy: Tensor, b: Batch, o: Objective) -> dict[str, Tensor]:
    """Health figures of each token (N,)."""
    d = logp - b.old
    ratio = (means(d, b.segment) if o.ratio == "gspo" else d).exp()
    return {
        "kl": k3(logp, b.ref) if b.ref is not None else torch.zeros_like(logp),
        "entropy": entropy,
        "ratio": ratio,
        "clipped": ((ratio < 1 - o.clip_low) | (ratio > 1 + o.clip_high)).float(),
        "gap": d.abs(),
    }
