"""Is a run about to collapse? Four figures of a step's episodes, and one line of warning.

Search agents trained by RL degenerate long before their score falls: thoughts repeat themselves, answers are
no longer given, correct episodes lose likelihood (arXiv 2512.04220), and groups no longer differ. Not a
remedy: `--guard`, `--strata`, a lower `--lr` or a higher `--kl` are.
"""

import re
from collections.abc import Sequence

from torch import Tensor

from recipes import informative
from rollout import Trajectory

WINDOW = 5  # steps that are averaged
THOUGHT = re.compile(r"<think>(.*?)(?:</think>|<search>|<answer>|$)", re.DOTALL)


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Share of the n-grams of words that came before in the same text (0 where there are none)."""
    grams = [list(zip(*(text.split()[i:] for i in range(n)))) for text in texts]
    total = sum(map(len, grams))
    return 1 - sum(len(set(g)) for g in grams) / total if total else 0.0


def thoughts(t: Trajectory, tok) -> str:
    """What the policy wrote inside think tags, all turns together."""
    said = [tok.decode(ids) for sampled, ids in t.stretches() if sampled]
    return " ".join(thought for text in said for thought in THOUGHT.findall(text))


def health(trajectories: list[Trajectory], rewards: Tensor, tok) -> dict[str, float | None]:
    """rewards (Q, G). Shares of episodes without an answer, of repeated 3-grams in thoughts, of groups
    without a difference; mean log-prob of a sampled token in episodes of reward 1 (None: there were none)."""
    right = [t for t, r in zip(trajectories, rewards.flatten().tolist()) if r >= 1 and any(t.mask)]
    return {
        "unanswered": sum(t.answer is None for t in trajectories) / len(trajectories),
        "repetition": repetition([thoughts(t, tok) for t in trajectories]),
        "flat": 1 - informative(rewards).float().mean().item(),
        "logp_correct": sum(sum(t.logps) / sum(t.mask) for t in right) / len(right) if right else None,
    }


# By how much the mean of the last steps may be worse than the run's best: (sign, margin, what).
RULES = {
    "unanswered": (1, 0.3, "share of episodes without an answer"),
    "repetition": (1, 0.2, "share of repeated 3-grams in thoughts"),
    "logp_correct": (-1, 0.5, "log-prob a token of correct episodes"),
    "reward": (-1, 0.5, "reward"),  # times the best
}


def alarm(rows: Sequence[dict]) -> str:
    """What went wrong, from a log's rows: "" where nothing did, or the run is younger than two windows."""
    for name, (sign, margin, what) in RULES.items() if len(rows) >= 2 * WINDOW else ():
        windows = [
            [r[name] for r in rows[i : i + WINDOW] if r.get(name) is not None]
            for i in range(len(rows) - WINDOW + 1)
        ]
        means = [sum(window) / len(window) for window in windows if window]
        best = min((sign * mean for mean in means), default=0.0) * sign
        if windows[-1] and sign * (means[-1] - best) > margin * (abs(best) if name == "reward" else 1):
            return f"{what} {best:.2f} -> {means[-1]:.2f}"
    return ""
