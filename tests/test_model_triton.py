"""The whole network on the kernels, interpreted, against the whole network on the references.

Each kernel has its own test; this one is for the seams: strides of packed views, the seat cache, roles in one
batch, gradients that pass through all of them. Both runs are processes of their own (`python
tests/test_model_triton.py OUT`), told apart by KERNELS alone.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


class Bytes:
    """A tokenizer of one token a byte; token 0 ends a turn."""

    eos, vocab_size, has_template = frozenset({0}), 112, False

    def token_bytes(self, i):
        return bytes([i])

    def decode(self, ids):
        return bytes(ids).decode()


def body(family: str, dtype: torch.dtype):
    """A random network of two layers whose policy and simulator both differ from the base."""
    from model import POLICY, SIMULATOR, Config, Model

    c = Config(family, d=48, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=72, vocab=112, context=128)
    torch.manual_seed(0)
    m = Model(c).init(0, std=0.15)
    for p in m.parameters():
        p.data = p.data.to(dtype)
    for role in (POLICY, SIMULATOR):
        m.add_role(role, rank=4, alpha=8.0, seed=role)
        m.adapter(role).data += 0.05 * torch.randn(m.adapter(role).shape)
    return m


def train(m) -> dict[str, torch.Tensor]:
    """One update of the policy, with the reference's log-probs, from right-padded rows of unlike length."""
    from grpo import Batch, loss, token_logps
    from model import POLICY, REFERENCE
    from recipes import Objective

    ids, lengths = torch.randint(1, 112, (3, 19)), torch.tensor([19, 1, 10])
    mask = (torch.rand(3, 19) < 0.6) & (torch.arange(19) < lengths[:, None]) & (torch.arange(19) > 0)
    n = int(mask.sum())
    flat = torch.full((n,), -4.0), torch.randn(n), torch.full((n,), 1 / n), mask.nonzero()[:, 0]
    b = Batch(ids, mask, lengths, *flat)
    with torch.no_grad():
        ref, _ = token_logps(m, b, REFERENCE)
    logp, entropy = token_logps(m, b, POLICY, recompute=True)
    value = loss(logp, entropy, replace(b, ref=ref), Objective(kl=0.1, entropy=0.01))
    value.backward()
    return {
        "reference": ref,
        "policy": logp.detach(),
        "entropy": entropy.detach(),
        "gradient": m.adapter(POLICY).grad,
    }


def decode(m) -> dict[str, torch.Tensor]:
    """Turns of both roles that have adapters in one batch, sampled, then extended by what they are told."""
    from engine import Engine
    from model import POLICY, SIMULATOR
    from rollout import Turn

    def talk(role, i):
        first = yield Turn(list(range(20, 23 + i)), role, 3, 1.0, (), (i, 0))
        then = yield Turn([30 + i] * (1 + i), role, 2, 0.0 if i else 1.0, (), (i, 1))
        return first.ids + then.ids, first.logps + then.logps

    engine = Engine({POLICY: (m, Bytes()), SIMULATOR: (m, Bytes())}, 4, 32)
    said = engine.run([talk(role, i) for i, role in enumerate((POLICY, SIMULATOR, POLICY))])
    assert all(bool(x.joined) == (os.environ["KERNELS"] == "triton") for x in m.linears())
    ids, logps = (torch.tensor([x for one in said for x in one[i]]) for i in range(2))
    return {"ids": ids, "logps": logps}


def main(out: str) -> None:
    """Train a network with biases and one with norms of heads, decode with the first; all into a file."""
    results = {}
    for family, dtype in (("qwen2", torch.float32), ("qwen3", torch.bfloat16)):
        m = body(family, dtype)
        done = train(m) | (decode(m) if family == "qwen2" else {})
        results |= {f"{family} {name}": x for name, x in done.items()}
    torch.save(results, out)


def run(tmp_path: Path, kernels: str) -> dict[str, torch.Tensor]:
    """What a process with this choice of kernels computes."""
    env = {k: v for k, v in os.environ.items() if k not in {"TRITON_INTERPRET", "KERNELS"}}
    env |= {"KERNELS": kernels, "PYTHONPATH": str(ROOT)}
    if kernels == "triton":
        env["TRITON_INTERPRET"] = "1"
    out = tmp_path / f"{kernels}.pt"
    command = [sys.executable, __file__, str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out)


def test_the_model_on_kernels_equals_the_model_on_references(tmp_path):
    """A kernel may be right and still be called with another's strides, a stale length or a wrong scale."""
    pytest.importorskip("triton")
    from kernels.tools.measure import relative_rms

    mine, theirs = run(tmp_path, "triton"), run(tmp_path, "torch")
    assert torch.equal(mine.pop("qwen2 ids"), theirs.pop("qwen2 ids"))
    errors = {name: relative_rms(mine[name], theirs[name]) for name in theirs}
    for name, error in errors.items():
        assert error <= (1e-5 if "qwen2" in name else 3e-2), errors


if __name__ == "__main__":
    main(sys.argv[1])
