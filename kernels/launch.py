"""What a kernel file needs to launch: Triton if it is installed, the target GPU, kernel or reference, checks.

Not a framework: a kernel file is an ordinary module that imports these few names.

    from .launch import Target, check, choose, target, tl, triton

    @triton.jit                                  # without Triton: leaves the function as it is
    def _kernel(p_x, n, BLOCK: tl.constexpr): ...

    def config(d: int, t: Target) -> dict: ...   # block sizes, num_warps, num_stages: a plain function
    def thing_torch(x): ...                      # the reference: any device, any floating type, autograd
    def thing_triton(x): ...                     # checks its arguments; launches with config(d, target())
    thing = choose(thing_torch, thing_triton)    # what kernels/__init__.py exports

    def cases(m: Model, device): ...             # yields measure.Case: for compile_check and the benchmark

With TRITON_INTERPRET=1 kernels run on CPU tensors: Triton's interpreter, repaired by tools/interpreter.py.

Names in all kernel files: p_ a pointer, s_ a stride in elements, n_ a count, i_ indices, m_ a mask; plain
names for blocks of values; capitals for compile-time constants.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from importlib.util import find_spec
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

HAVE_TRITON = find_spec("triton") is not None
INTERPRET = HAVE_TRITON and os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "yes", "y"}
FORCED = os.environ.get("KERNELS", "")

if HAVE_TRITON:
    import triton
    import triton.language as tl
else:  # macOS, Windows: enough of a stand-in to define the kernels, which are then never launched
    triton, tl = SimpleNamespace(jit=lambda f: f), SimpleNamespace(constexpr=None)

if INTERPRET:
    from .tools import interpreter

    interpreter.install()


class Target(NamedTuple):
    """The properties of a GPU that configurations depend on. `shared`: bytes of shared memory per block."""

    name: str
    processors: int
    shared: int

    @property
    def hip(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def arch(self) -> int:
        """80 for sm_80; 0 for AMD, so that `arch >= 90` asks for an NVIDIA feature."""
        return 0 if self.hip else int(self.name.removeprefix("sm_"))


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", 108, 166912),  # A100
        Target("sm_86", 82, 101376),  # RTX 3090, A10
        Target("sm_89", 128, 101376),  # RTX 4090, L4
        Target("sm_90", 132, 232448),  # H100
        Target("sm_100", 148, 232448),  # B200
        Target("sm_120", 170, 101376),  # RTX 5090
        Target("gfx942", 304, 65536),  # MI300X
    )
}
_pretended: ContextVar[Target | None] = ContextVar("pretended", default=None)


@cache
def _present() -> Target:
    if not torch.cuda.is_available():
        return TARGETS["sm_90"]
    p = torch.cuda.get_device_properties(0)
    name = p.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
    shared = 65536 if torch.version.hip else p.shared_memory_per_block_optin
    return Target(name, p.multi_processor_count, shared)


def target() -> Target:
    """The GPU that `pretend` names, else the one here, else (under the interpreter) an H100."""
    return _pretended.get() or _present()


@contextmanager
def pretend(t: Target) -> Iterator[None]:
    """Inside, configurations are chosen for `t`: to compile or interpret for a GPU that is not here."""
    token = _pretended.set(t)
    try:
        yield
    finally:
        _pretended.reset(token)


def cdiv(n: int, size: int) -> int:
    """n / size, rounded up. (Triton's own takes 5 to 13 microseconds a call on the host since 3.6.)"""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def check(ok: bool, complaint: str) -> None:
    """ValueError(complaint) unless ok."""
    if not ok:
        raise ValueError(complaint)


def check_fit(ok: bool, **tensors: Tensor | None) -> None:
    """ValueError with the shapes and types of the tensors unless ok."""
    if not ok:
        given = (f"{name} {tuple(x.shape)} {x.dtype}" for name, x in tensors.items() if x is not None)
        raise ValueError(", ".join(given).replace("torch.", "") + " do not fit")


def choose(reference: Callable, kernel: Callable) -> Callable:
    """The public function: the kernel if the tensors are on a GPU, else the reference; KERNELS overrides."""
    check(FORCED in {"", "torch", "triton"}, f"KERNELS={FORCED}: must be torch or triton, or not set")
    check(FORCED != "triton" or HAVE_TRITON, "KERNELS=triton needs the package: pip install triton")
    if FORCED or not HAVE_TRITON:
        return kernel if FORCED == "triton" else reference

    @wraps(reference)
    def chosen(x, *args, **kwargs):
        return (kernel if x.is_cuda else reference)(x, *args, **kwargs)

    return chosen


def compiled(x: Tensor) -> bool:
    """Whether Triton kernels run on x's device as machine code, so that a CUDA graph can hold them."""
    return x.is_cuda and HAVE_TRITON and FORCED != "torch" and not INTERPRET
