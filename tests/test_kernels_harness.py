"""The interpreter that kernels are tested with tells the truth, and catches the bugs it is there for.

Each planted bug is one that the stock interpreter lets through. Beside that: the choice between kernel and
reference, and peace with the Hugging Face library that is also called `kernels`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter")

from kernels.launch import TARGETS, cdiv, next_power_of_2, pretend, target, tl, triton  # noqa: E402

ROOT = Path(__file__).parent.parent


@triton.jit
def _row_sums(p_x, p_y, d, OTHER: tl.constexpr, EXTRA: tl.constexpr, D: tl.constexpr):
    """y[row] = sum of x[row]. Planted: a load without `other=`, a mask too wide by EXTRA."""
    i = tl.arange(0, D)
    p, m = p_x + tl.program_id(0) * d + i, i < d + EXTRA
    x = tl.load(p, mask=m, other=0.0) if OTHER else tl.load(p, mask=m)
    tl.store(p_y + tl.program_id(0), tl.sum(x, 0))


@triton.jit
def _row_maxima(p_x, p_y, d, D: tl.constexpr):
    """Planted: masked lanes without `other=`, hidden in a maximum, which drops NaN on a GPU and in NumPy."""
    i = tl.arange(0, D)
    tl.store(p_y + tl.program_id(0), tl.max(tl.load(p_x + tl.program_id(0) * d + i, mask=i < d), 0))


@triton.jit
def _shift(p_x, n, BLOCK: tl.constexpr, TO: tl.constexpr):
    """x[i + TO] = x[i], in place. Planted, if TO != 0: a program writes what its neighbour reads."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + i, mask=i < n, other=0.0)
    tl.store(p_x + i + TO, x, mask=(i + TO >= 0) & (i + TO < n))


@triton.jit
def _total(p_x, p_y, BLOCK: tl.constexpr):
    """Planted: programs add into one number without atomics."""
    x = tl.load(p_x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(p_y, tl.load(p_y) + tl.sum(x, 0))


@triton.jit
def _order(p_y, p_at):
    """Each program notes its number where the one before it stopped: legal only alone, so order shows."""
    tl.store(p_y + tl.program_id(0), tl.program_id(0) + tl.load(p_at))


@triton.jit
def _arithmetic(p_x, p_y, p_out, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(p_x + i), tl.load(p_y + i)
    tl.store(p_out + i, x * y)
    tl.store(p_out + N + i, x + y)
    tl.store(p_out + 2 * N + i, tl.where(x < y, x, -y))
    tl.store(p_out + 3 * N + i, (x.to(tl.float32) / 3).to(tl.bfloat16))


@triton.jit
def _dot(p_a, p_b, p_c, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    i, k = tl.arange(0, M), tl.arange(0, K)
    a = tl.load(p_a + i[:, None] * K + k[None, :])
    b = tl.load(p_b + k[:, None] * M + i[None, :])
    c = tl.dot(a, b, tl.zeros((M, M), tl.float32), input_precision=PRECISION)
    tl.store(p_c + i[:, None] * M + i[None, :], c)


def sums(d=5, other=True, extra=0):
    x, y = torch.randn(3, d), torch.empty(3)
    _row_sums[(3,)](x, y, d, OTHER=other, EXTRA=extra, D=8)
    return y, x.sum(1)


def test_the_right_kernel_passes():
    """Else the next tests would prove nothing."""
    torch.testing.assert_close(*sums())


def test_a_missing_other_is_caught():
    """On a GPU such lanes hold anything; the stock interpreter reads 0, and the sum looks right."""
    mine, truth = sums(other=False)
    assert mine.isnan().all() and truth.isfinite().all()
    y = torch.empty(3)
    _row_maxima[(3,)](torch.randn(3, 5), y, 5, D=8)
    assert y.isnan().all()


def test_a_mask_off_by_one_is_caught():
    """In the last row it reads beyond the tensor. The stock interpreter reads whatever is there."""
    with pytest.raises(Exception, match="load: 1 of 6 lanes outside"):
        sums(extra=1)
    view = torch.randn(4, 5)[:3]  # nor may it read beyond a view of a larger tensor
    with pytest.raises(Exception, match="outside"):
        _row_sums[(3,)](view, torch.empty(3), 5, OTHER=True, EXTRA=1, D=8)


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize("to", [1, -1, 4])
def test_a_race_between_programs_is_caught(order, to):
    """The result depends on who comes first; in the stock interpreter's one order it may well look right."""
    from kernels.tools import interpreter

    x = torch.arange(8.0)
    with interpreter.program_order(order):
        _shift[(2,)](x, 8, BLOCK=4, TO=0)
        with pytest.raises(Exception, match="race: two programs"):
            _shift[(2,)](x, 8, BLOCK=4, TO=to)
        with pytest.raises(Exception, match="race: two programs"):
            _total[(2,)](x, torch.zeros(1), BLOCK=4)


def test_launches_do_not_race_with_each_other():
    """A GPU runs one after the other: what the last one touched is forgotten, or right kernels fail."""
    x = torch.arange(8.0)
    _shift[(2,)](x, 8, BLOCK=4, TO=0)
    _shift[(1,)](x, 8, BLOCK=8, TO=0)
    assert torch.equal(x, torch.arange(8.0))


def test_two_lanes_of_a_store_at_one_address_are_caught():
    """Which of the two values stays is undefined on a GPU."""
    with pytest.raises(Exception, match="race: two lanes"):
        _collide[(1,)](torch.zeros(8), N=8)


@triton.jit
def _collide(p_x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(p_x + i // 2, i.to(tl.float32))


def test_bf16_rounds_to_the_nearest_even():
    """The stock interpreter multiplies bit patterns, and truncates where it casts."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 64).bfloat16()
    out = torch.empty(4, 64, dtype=torch.bfloat16)
    _arithmetic[(1,)](x, y, out, N=64)
    truth = torch.stack([x * y, x + y, torch.where(x < y, x, -y), (x.float() / 3).bfloat16()])
    assert torch.equal(out, truth)


def test_bf16_halves_go_to_even():
    """1 + 2^-8 lies between two bf16 numbers: the even one is 1; of 1 + 3 * 2^-8 it is 1 + 2^-6."""
    from kernels.tools.interpreter import narrow, widen

    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.4e38, float("inf"), float("nan"), -0.0])
    mine = torch.from_numpy(widen(narrow(x.numpy())))
    assert torch.equal(mine.nan_to_num(7), x.bfloat16().float().nan_to_num(7))
    assert mine[0] == 1 and mine[1] == 1 + 2**-6


def test_a_dot_in_tf32_is_seen():
    """Triton's default for fp32 keeps 10 bits: 1e-3, where the bound of the kernels is 1e-5."""
    a, b = torch.randn(16, 32), torch.randn(32, 16)
    out = {}
    for precision in ("ieee", "tf32"):
        out[precision] = torch.empty(16, 16)
        _dot[(1,)](a, b, out[precision], M=16, K=32, PRECISION=precision)
    torch.testing.assert_close(out["ieee"], a @ b)
    assert (out["tf32"] - a @ b).abs().max() > 1e-4


def test_a_dot_that_no_gpu_takes_is_refused():
    """K = 8 compiles for no tensor core."""
    a, b, c = torch.randn(16, 8), torch.randn(8, 16), torch.empty(16, 16)
    with pytest.raises(Exception, match="K = 8"):
        _dot[(1,)](a, b, c, M=16, K=8, PRECISION="ieee")


def test_programs_run_in_the_order_asked_for(monkeypatch):
    """Otherwise the three orders would be one."""
    from kernels.tools import interpreter

    seen = []
    step = interpreter.Builder.set_grid_idx
    monkeypatch.setattr(
        interpreter.Builder, "set_grid_idx", lambda b, *at: (step(b, *at), seen.append(b.program))
    )
    walks = {}
    for order in interpreter.ORDERS:
        seen.clear()
        with interpreter.program_order(order):
            _order[(6,)](torch.zeros(6), torch.zeros(1))
        walks[order] = list(seen)
    assert walks["forward"] == walks["reverse"][::-1] == sorted(walks["shuffled"])
    assert walks["shuffled"] not in (walks["forward"], walks["reverse"])
    with pytest.raises(ValueError):
        interpreter.program_order("backward").__enter__()


def test_a_pretended_target_chooses_the_configuration():
    """Ahead-of-time checks would otherwise compile the H100's blocks for every GPU."""
    assert target().name == "sm_90" and not target().hip
    with pretend(TARGETS["gfx942"]):
        assert target().hip and target().arch == 0
    assert target().arch == 90


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter from the repository's root, without TRITON_INTERPRET."""
    clean = {k: v for k, v in os.environ.items() if k not in {"TRITON_INTERPRET", "KERNELS"}}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean | env, capture_output=True, text=True
    )


CALL = "import torch, kernels; print(kernels.swiglu(torch.tensor([[1.0, 2.0]])).tolist())"


def test_sizes_are_rounded_as_triton_rounds_them():
    """A grid one too small leaves rows unwritten; a block that is no power of two does not compile."""
    for n in [*range(1, 300), 1023, 1024, 1025, 151936, 2**31 - 1, 2**31, 2**31 + 1]:
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert all(cdiv(n, size) == triton.cdiv(n, size) for size in (1, 7, 16, 128, 1024))
    assert cdiv(0, 16) == 0


def test_the_choice():
    """A CPU gets the reference; KERNELS overrides, and what cannot be is said in one line."""
    assert python(CALL).stdout.startswith("[[1.46")
    assert python(CALL, KERNELS="triton", TRITON_INTERPRET="1").stdout.startswith("[[1.46")
    assert "must be torch or triton" in python(CALL, KERNELS="cuda").stderr
    without = "import sys; sys.modules['triton'] = None\n" + CALL  # macOS, Windows
    assert python(without).stdout.startswith("[[1.46")
    assert "pip install triton" in python(without, KERNELS="triton").stderr


def test_the_benchmark_runs_to_its_end(tmp_path):
    """It would else fail on the day that somebody has a GPU, and its figures would be of wrong results."""
    from kernels.tools import measure

    out = tmp_path / "bench.json"
    done = python(f"from kernels.__main__ import main; exit(main(['--toy', '--json', {str(out)!r}]))")
    assert done.returncode == 0, done.stderr[-2000:]
    bench = json.loads(out.read_text())
    assert {r["kernel"] for r in bench["rows"]} == set(measure.FILES) and bench["torch"] == torch.__version__
    assert all(r["error"] <= 1e-5 for r in bench["rows"])


def test_without_a_gpu_it_lists():
    """`python -m kernels` alone must not interpret for minutes, nor fail."""
    done = python("from kernels.__main__ import main; exit(main([]))")
    assert done.returncode == 0 and "SwiGLU" in done.stdout and "No GPU" in done.stdout


USE = """
import torch, transformers, peft
config = transformers.Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=1)
model = transformers.AutoModelForCausalLM.from_config(config)
model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=2)
import kernels
print("ours" if hasattr(kernels, "linear_logp") else "theirs")
"""


@pytest.mark.parametrize("installed", [False, True])
def test_transformers_and_peft_run_from_the_root(tmp_path, installed):
    """They look for a library called `kernels`. Finding that version installed, but our package in its place,
    they would import from ours what it does not have: kernels-0.dist-info says that it is another.
    """
    utils = pytest.importorskip("transformers.utils.import_utils")
    pytest.importorskip("peft")
    if installed:  # as pip would leave it
        version = getattr(utils, "KERNELS_MIN_VERSION", "0.18.2")
        info, package = tmp_path / f"kernels-{version}.dist-info", tmp_path / "kernels"
        info.mkdir(), package.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
        (info / "RECORD").write_text("kernels/__init__.py,,\n")
        (package / "__init__.py").write_text(f"__version__ = '{version}'\n")
    done = python(USE, PYTHONPATH=str(tmp_path))
    assert done.stdout.strip().endswith("ours"), done.stderr[-2000:]
