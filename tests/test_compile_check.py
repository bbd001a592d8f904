"""Ahead-of-time compilation: the quick part as a gate, and planted spills, lack of memory, a broken kernel.

In subprocesses, since this process may be interpreting.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in {"TRITON_INTERPRET", "KERNELS"}}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def test_quick(tmp_path):
    """A change of a block size that spills on an H100 or an A100 would be found when somebody rents one.

    Without the toy's shapes, which take as long to compile and have never spilled: `--quick` has them too.
    """
    out, which = tmp_path / "reports.json", ("--targets", "sm_90", "sm_80", "--models", "Qwen2.5-3B")
    done = python("-m", "kernels.tools.compile_check", *which, "--json", str(out))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    reports = json.loads(out.read_text())
    assert {r["target"] for r in reports} == {"sm_90", "sm_80"}
    assert all(r["registers"] and r["counts"]["instructions"] for r in reports)
    for file in ("attention", "linear_logp"):
        mine = [r for r in reports if r["file"] == file and r["target"] == "sm_90"]
        assert any(r["counts"]["wgmma"] for r in mine if r["model"] != "toy")


PLANTED = """
import torch, triton, triton.language as tl
from kernels.tools.compile_check import Catch
from kernels.launch import TARGETS

@triton.jit
def spilling(p_x, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(p_x + i)
    y = tl.load(p_x + N + i)
    s = tl.sum(x * y, 0)
    tl.store(p_x + i, x * s + y)

@triton.jit
def greedy(p_x, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(p_x + i[:, None] * N + i[None, :]), tl.load(p_x + i[None, :] * N + i[:, None])
    tl.store(p_x + i[:, None] * N + i[None, :], tl.dot(a, b).to(tl.bfloat16))

@triton.jit
def crowded(p_x, n, N: tl.constexpr):
    i, j, k = tl.arange(0, 128), tl.arange(0, N), tl.arange(0, 64)
    z = tl.zeros((128, N), tl.float32)
    for start in range(0, n, 64):
        a = tl.load(p_x + i[:, None] * n + start + k[None, :])
        z = tl.dot(a, tl.load(p_x + j[None, :] * n + start + k[:, None]), z)
    tl.store(p_x + i[:, None] * N + j[None, :], z.to(tl.bfloat16))

@triton.jit
def broken(p_x, N: tl.constexpr):
    tl.store(p_x + tl.arange(0, N), tl.arange(0, 2 * N))

x = torch.empty(1 << 16, device="meta")
with Catch(TARGETS["sm_86"]) as c:
    spilling[(1,)](x, N=16384, num_warps=1)
    greedy[(1,)](x.bfloat16(), N=256, num_warps=8)
    broken[(1,)](x, N=64)
    broken[(1,)](x, N=64)
with Catch(TARGETS["sm_90"]) as d:
    crowded[(1,)](x.bfloat16(), 256, N=256, num_warps=4, num_stages=3)
for r in c.reports + d.reports:
    print(r.kernel, "|", "; ".join(r.problems()))
"""


def test_planted_problems_are_found(tmp_path):
    """A gate that never closes is no gate: spills, too much shared memory, what does not compile."""
    script = tmp_path / "planted.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + PLANTED)
    done = python(str(script))
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert "spills" in found["spilling"]
    assert "of shared memory, 101376 are there" in found["greedy"]
    assert found["broken"]
    assert "wgmma one by one" in found["crowded"]


def test_it_does_not_interpret():
    """Under TRITON_INTERPRET=1 nothing would be compiled, and all would be well."""
    code = "from kernels.tools.compile_check import Catch, TARGETS; Catch(TARGETS['sm_90'])"
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "cannot run with TRITON_INTERPRET=1" in done.stderr
