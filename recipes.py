"""Algorithms: every one is a row of `RECIPES`, four choices made of small pure functions.

    advantage      from the rewards (Q, G) of G siblings a question
    ratio          the loss of each token from its log-probs now and when sampled: the ratio and its clip
    normaliser     the weights of tokens in the sum
    KL             its estimator, and whether it stands in the loss, in the reward, or nowhere

Tensors are flat: the N sampled tokens of a micro-batch, trajectory after trajectory; `segment` (N,) says
whose a token is. Whatever runs over time runs over the sampled tokens of one trajectory: a document between
two turns changes no advantage. To try another one, write a function and name it in its table.

Not a trainer: grpo.py applies these to a model.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Every column is a flag that overrides it; see ADVANTAGES, RATIOS, `token_weights` and KL. resample: rounds
# in which groups without a difference are replaced. No KL where the papers have none.
PARTS = "advantage ratio clip_low clip_high normaliser kl_in kl_estimator resample".split()  # noqa: SIM905
# fmt: off
RECIPES = {
    "reinforce":   ("reward",   "ppo",   0.2,  0.2,  "token",    "loss",   "k3", 0),  # the paper's
    "reinforce++": ("whitened", "ppo",   0.2,  0.2,  "token",    "reward", "k1", 0),  # 2501.03262
    "ppo":         ("gae",      "ppo",   0.2,  0.2,  "token",    "reward", "k1", 0),  # 1707.06347
    "rloo":        ("rloo",     "ppo",   0.2,  0.2,  "token",    "loss",   "k3", 0),  # 2402.14740
    "grpo":        ("grpo",     "ppo",   0.2,  0.2,  "token",    "loss",   "k3", 0),  # 2402.03300
    "maxrl":       ("maxrl",    "ppo",   0.2,  0.2,  "token",    "none",   "k3", 0),
    "dr_grpo":     ("centred",  "ppo",   0.2,  0.2,  "constant", "none",   "k3", 0),  # 2503.20783
    "dapo":        ("grpo",     "ppo",   0.2,  0.28, "token",    "none",   "k3", 3),  # 2503.14476
    "gspo":        ("grpo",     "gspo",  3e-4, 4e-4, "sequence", "none",   "k3", 0),  # 2507.18071
    "gmpo":        ("grpo",     "gmpo",  0.4,  0.4,  "sequence", "none",   "k3", 0),  # 2507.20673
    "sapo":        ("grpo",     "sapo",  0.2,  0.2,  "sequence", "none",   "k3", 0),  # 2511.20347
    "cispo":       ("grpo",     "cispo", 1.0,  4.0,  "token",    "none",   "k3", 0),  # 2506.13585
}
# fmt: on


@dataclass(frozen=True)
class Objective:
    """The choices and coefficients of the loss; the defaults are `grpo`."""

    advantage: str = "grpo"
    ratio: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_in: str = "loss"  # loss | reward | none
    kl_estimator: str = "k3"
    kl: float = 1e-3  # beta
    entropy: float = 0.0  # c
    guard: float = 0.0  # coefficient of `guard`
    gamma: float = 1.0
    lam: float = 1.0
    grad_clip: float = 1.0  # largest norm of the gradient


# ------------------------------------------------------------------------------------------------- advantages


def centred(r: Tensor) -> Tensor:
    return r - r.mean(1, keepdim=True)


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {  # rewards (Q, G) of G siblings a question -> (Q, G)
    "reward": lambda r: r,
    "whitened": lambda r: r,  # over the tokens of the update: see grpo.py, `assess`
    "gae": lambda r: r,  # less the critic's values, and whitened: there as well
    "centred": centred,
    "rloo": lambda r: centred(r) * (r.size(1) / (r.size(1) - 1)),  # r - mean of the *other* siblings
    "grpo": lambda r: centred(r) / (r.std(1, keepdim=True) + 1e-6),
    "maxrl": lambda r: centred(r) / (r.mean(1, keepdim=True) + 1e-6),
}
ALONE = ("reward", "whitened", "gae")  # without a comparison of siblings: groups of equal rewards teach too
WHITENED = ("whitened", "gae")


def advantages(
    rewards: Tensor, kind: str = "grpo", strata: Tensor | None = None, share: float = 0.0
) -> Tensor:
    """rewards (Q, G) -> advantages (Q, G), one a trajectory.

    strata (Q, G), of the same shape: siblings of one stratum, as of so many searches, are compared with each
    other (arXiv 2510.06214), and that counts `share`, the whole group the rest. Raises ValueError for a group
    of 1 that is to be compared, and for an unknown kind.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"unknown advantage {kind!r}: choose {', '.join(ADVANTAGES)}")
    if rewards.size(1) < 2 and kind not in ALONE:
        raise ValueError("a group of 1 has no siblings to be compared with: use a group of 2 or more")
    adv = ADVANTAGES[kind](rewards)
    if not share:
        return adv
    within = torch.zeros_like(adv)
    for q, row in enumerate(strata):
        for mine in (row == s for s in row.unique()):
            if mine.sum() > 1:
                within[q, mine] = ADVANTAGES[kind](rewards[q : q + 1, mine])[0]
    return share * within + (1 - share) * adv


def shuffle_siblings(rewards: Tensor, seed: int) -> Tensor:
    """A control: permute rewards (Q, G) within each group, so that nothing can be learnt from them."""
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(rewards.shape, generator=g).argsort(1)
    return rewards.gather(1, order)


def informative(rewards: Tensor) -> Tensor:
    """(Q, G) -> (Q,) True where siblings differ: other groups have no gradient and are skipped."""
    return rewards.max(1).values > rewards.min(1).values


# -------------------------------------------------------------------------------------------------- over time


def to_go(x: Tensor, segment: Tensor, decay: float = 1.0) -> Tensor:
    """sum_{s >= t} decay^(s - t) x_s of each token (N,), within its trajectory; in log2 steps of doubling."""
    k, longest = 1, int(segment.bincount().max())
    while k < longest:
        later = torch.where(segment[k:] == segment[:-k], decay**k * x[k:], 0.0)
        x, k = x + F.pad(later, (0, k)), 2 * k
    return x


def gae(r: Tensor, value: Tensor, segment: Tensor, gamma: float = 1.0, lam: float = 1.0) -> Tensor:
    """Generalised advantages (N,) from the rewards and values of tokens (arXiv 1506.02438, eq. 16). With
    gamma = lam = 1 the sum telescopes to the rewards to go minus the value."""
    after = F.pad(torch.where(segment[1:] == segment[:-1], value[1:], 0.0), (0, 1))
    return to_go(r + gamma * after - value, segment, gamma * lam)


# ------------------------------------------------------------------------------------------------ normalisers


def token_weights(kind: str, n: list[int], asked: Sequence, longest: int = 1) -> list[float]:
    """The weight of each token of every trajectory of an update. n: its sampled tokens; asked: its question.

    token     alike for all tokens of the update
    sequence  alike for all trajectories, whatever their lengths
    prompt    alike for all questions
    constant  a token's share of the `longest` trajectory possible
    """
    total, of = sum(n), Counter()
    for question, length in zip(asked, n):
        of[question] += length
    kinds = {
        "token": lambda length, question: total,
        "sequence": lambda length, question: len(n) * length,
        "prompt": lambda length, question: len(of) * of[question],
        "constant": lambda length, question: len(n) * longest,
    }
    return [1 / kinds[kind](*one) for one in zip(n, asked)]


# ------------------------------------------------------------------------------------------ ratios, clips, KL


def means(x: Tensor, segment: Tensor) -> Tensor:
    """The mean of x (N,) over each token's trajectory (N,)."""
    n = segment.bincount()
    return (x.new_zeros(len(n)).index_add(0, segment, x) / n)[segment]


def surrogate(logp: Tensor, old: Tensor, adv: Tensor, low: float, high: float) -> Tensor:
    """The clipped policy loss of each token (N,) (arXiv 1707.06347, eq. 7, negated)."""
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * adv, ratio.clamp(1 - low, 1 + high) * adv)


def ppo(logp, old, adv, segment, low, high):
    return surrogate(logp, old, adv, low, high)


def dual(logp, old, adv, segment, low, high):
    """PPO whose loss has a bound where A < 0, as the ratio has none there (arXiv 1912.09729, c = 3)."""
    each = surrogate(logp, old, adv, low, high)
    return torch.where(adv < 0, torch.minimum(each, -3 * adv), each)


def gspo(logp, old, adv, segment, low, high):
    """PPO with the ratio of the sequence, per token: its value is shared, the gradient each token's own."""
    now = logp.detach()
    return surrogate(means(now - old, segment) + logp - now, torch.zeros_like(old), adv, low, high)


def gmpo(logp, old, adv, segment, low, high):
    """The geometric mean of a sequence's ratios, each clipped (in logs) only where it would gain."""
    d, sign = logp - old, adv.sign()
    d = sign * torch.minimum(sign * d, sign * d.clamp(-low, high))
    return -means(adv, segment) * means(d, segment).exp()


def cispo(logp, old, adv, segment, low, high):
    """REINFORCE whose clipped ratio is a constant weight: no token loses its gradient."""
    return -(logp.detach() - old).exp().clamp(1 - low, 1 + high) * adv * logp


def sapo(logp, old, adv, segment, low, high):
    """A sigmoid in place of the clip, a little steeper where A <= 0. Has no bounds."""
    tau = torch.full_like(adv, 1.05).masked_fill(adv > 0, 1.0)
    return -adv * 4 / tau * (tau * ((logp - old).exp() - 1)).sigmoid()


RATIOS = {f.__name__: f for f in (ppo, dual, gspo, gmpo, cispo, sapo)}  # losses of tokens (N,)


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """KL(policy || reference) of each token (N,), estimated on the policy's samples: unbiased, never
    negative."""
    d = ref - logp
    return d.exp() - d - 1


# http://joschu.net/blog/kl-approx.html. In the loss k1 has no gradient on average, and k2 has the KL's.
KL = {"k1": lambda logp, ref: logp - ref, "k2": lambda logp, ref: (logp - ref).square() / 2, "k3": k3}


def guard(logp: Tensor, old: Tensor, adv: Tensor, segment: Tensor) -> Tensor:
    """Nats that tokens (N,) lost, in trajectories with A >= 0 that became less likely as a whole (LLDS, arXiv
    2512.04220). Zero in the first update of a rollout: it needs --updates > 1."""
    lost = old - logp
    return lost.relu() * ((means(adv, segment) >= 0) & (means(lost.detach(), segment) > 0))


def value_loss(value: Tensor, before: Tensor, target: Tensor, clip: float = 0.5) -> Tensor:
    """The critic's clipped loss of each token (N,): the greater of two errors, so that values move little."""
    near = before + (value - before).clamp(-clip, clip)
    return torch.maximum((value - target).square(), (near - target).square()) / 2
