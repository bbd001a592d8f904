"""Packed matrices on a CPU: the products, and which type is packed on which CPU."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels.packed_linear import MANY, can_pack, fast_type, pack, packed_linear

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
INTEL, AMX = {"cpu_name": "Intel(R) Xeon(R)"}, {"cpu_name": "Intel(R) Xeon(R)", "amx_bf16": True}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 37])
def test_products_equal_the_plain_ones(rows, bias, dtype):
    """A bias that is lost, or a layout read with the wrong sizes, in odd shapes."""
    if not can_pack(dtype):
        pytest.skip(f"this CPU or build of torch does not pack {dtype}")
    torch.manual_seed(0)
    x, W, b = torch.randn(rows, 1, 45), torch.randn(67, 45) / 45**0.5, torch.randn(67) if bias else None
    x, W, b = (t if t is None else t.to(dtype) for t in (x, W, b))
    y, want = packed_linear(x, W, pack(W, b, dtype)), F.linear(x, W, b)
    assert y.dtype == dtype
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize(
    "cpu, can, few, many",
    [
        ({}, {FP32, BF16}, BF16, BF16),
        (INTEL, {FP32, BF16}, BF16, FP32),  # arithmetic in bf16 is slow there, reading is not
        (AMX, {FP32, BF16}, BF16, BF16),
        ({}, {FP32}, FP32, FP32),  # x86 without AVX-512, older Arm
        (INTEL, {FP32}, FP32, FP32),
        (INTEL, {BF16}, BF16, None),
        ({}, {}, None, None),
    ],
)
def test_the_type_of_the_copies(monkeypatch, cpu, can, few, many):
    """A type that the CPU does not take is a traceback in the first product; a slow one halves the speed."""
    file = importlib.import_module("kernels.packed_linear")  # the package has a function of that name
    monkeypatch.setattr(file, "can_pack", lambda dtype: dtype in can)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    assert fast_type(BF16, MANY - 1) == few and fast_type(BF16, MANY) == many
    assert fast_type(FP32, 1) == fast_type(FP32, MANY) == (FP32 if FP32 in can else None)
    assert fast_type(FP16, 1) is fast_type(torch.float64, 1) is None


OLD = """
import torch, kernels, model
model.packs = lambda size: True
body = model.Model(model.Config("qwen2", 96, 32, 1, 2, 1, 16, 48)).init(0).bfloat16()
body.pack(1)
with torch.inference_mode():
    h = body(torch.arange(6)[None], model.REFERENCE)
    print(h.dtype, body.logits(h).isfinite().all().item(), kernels.fast_type(torch.bfloat16, 1))
"""


def test_a_cpu_without_avx512():
    """oneDNN limited to AVX2 refuses bf16, as such an x86 CPU does: the body is packed in fp32 instead."""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", OLD], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("torch.bfloat16 True"), done.stdout
