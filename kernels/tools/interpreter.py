"""Triton's interpreter, repaired so that its results can be trusted: kernels on CPU tensors, for tests.

Not a simulator of a GPU: no timing, no warps, no registers (compile_check.py has those). launch.py installs
it when TRITON_INTERPRET=1. What the stock interpreter (3.6, 3.7) gets wrong, and what happens here instead:

* bf16. Stock: a bf16 is a uint16, and arithmetic is integer arithmetic on it; casts truncate.
  Here every operation widens to fp32 and rounds back to the nearest, ties to even.
* tf32. Stock: ignored. Here fp32 operands of a dot lose 13 bits unless it has input_precision="ieee".
* Lanes that a mask turns off and no `other=` fills. Stock: 0. Here NaN (huge, for integers): nothing may rely
  on them. tl.max and tl.min pass a NaN on, so that it cannot hide there.
* Addresses. Stock: anything goes, up to a crash. Here each must lie within some tensor argument.
* Races. Here an address that one program writes may be neither read nor written by another in the same
  launch, and the lanes of one store must differ. `program_order` also chooses the order of the programs.
* Dots over fewer than 16 columns. Stock: accepted. Here refused, as by a GPU. Atomics are refused too: their
  results would depend on the order of the programs.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as stock

ORDERS = ("forward", "reverse", "shuffled")
MANY = -1  # an address read by more than one program
TRUNCATE = stock._ir.ROUNDING_MODE.RTZ
BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}
Builder, Handle = stock.InterpreterBuilder, stock.TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) -> the same numbers in fp32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bit patterns (uint16), to the nearest, ties to even; any NaN becomes the quiet one."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    return np.where(np.isnan(x), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _tf32(x: np.ndarray) -> np.ndarray:
    return ((x.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


def _values(h: Handle) -> np.ndarray:
    return widen(h.data) if h.dtype.scalar == tl.bfloat16 else h.data


def _rounded(values: np.ndarray) -> Handle:
    return Handle(narrow(values), tl.bfloat16)


class Memory:
    """What one launch may touch, and which of its programs touched what."""

    def __init__(self) -> None:
        self.extents: list[tuple[int, int]] = []  # addresses from, to: one a tensor argument
        self.storages: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # base: writer, reader of each byte

    def add(self, tensor) -> None:
        if tensor.numel():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            start, storage = tensor.data_ptr(), tensor.untyped_storage()
            self.extents.append((start, start + (last + 1) * tensor.element_size()))
            bytes_of = (np.zeros(storage.nbytes(), np.int32) for _ in range(2))
            self.storages.setdefault(storage.data_ptr(), tuple(bytes_of))

    def touch(self, pointers: Handle, mask: Handle | np.ndarray, program: int, store: bool) -> Handle:
        """Note a load or store by a program (counted from 1), or refuse it. Returns the mask."""
        mask = mask if isinstance(mask, Handle) else Handle(mask, tl.int1)
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64).ravel()
        width = stock._get_np_dtype(pointers.get_element_ty()).itemsize
        inside = np.zeros(at.shape, bool)
        for low, high in self.extents:
            inside |= (at >= low) & (at + width <= high)
        if not inside.all():
            what = "store" if store else "load"
            raise IndexError(f"{what}: {(~inside).sum()} of {at.size} lanes outside every tensor argument")
        if store and np.unique(at).size != at.size:
            raise RuntimeError("race: two lanes of one store have the same address")
        for base, (writer, reader) in self.storages.items():
            here = at[(at >= base) & (at < base + writer.size)] - base
            w, r = writer[here], reader[here]
            if ((w != 0) & (w != program)).any() or (store and ((r != 0) & (r != program)).any()):
                raise RuntimeError("race: two programs share an address, and one of them writes it")
            if store:
                writer[here] = program
            else:
                reader[here] = np.where((r == 0) | (r == program), program, MANY)
        return mask


_memory = Memory()
_order = ["forward"]


@contextmanager
def program_order(order: str) -> Iterator[None]:
    """Programs of a launch run 'forward', 'reverse' or 'shuffled' inside. A right kernel cannot tell."""
    if order not in ORDERS:
        raise ValueError(f"program order {order}: must be one of {', '.join(ORDERS)}")
    _order.append(order)
    try:
        yield
    finally:
        _order.pop()


def _poison(dtype, shape) -> Handle:
    """What masked lanes hold: NaN, true, or a third of the largest integer."""
    kind = stock._get_np_dtype(dtype)
    if dtype.is_floating():
        value = 0x7FC0 if dtype == tl.bfloat16 else np.nan
    else:
        value = True if kind == np.bool_ else np.iinfo(kind).max // 3
    return Handle(np.full(shape, value, kind), dtype)


class Mended(Builder):
    """The methods that replace the stock builder's; `install` copies them over it."""

    def create_masked_load(self, pointers, mask, other, *rest, **named):
        mask = _memory.touch(pointers, mask, self.program, store=False)
        other = _poison(pointers.get_element_ty(), pointers.data.shape) if other is None else other
        return _was["create_masked_load"](self, pointers, mask, other, *rest, **named)

    def create_masked_store(self, pointers, value, mask, *rest, **named):
        mask = _memory.touch(pointers, mask, self.program, store=True)
        return _was["create_masked_store"](self, pointers, value, mask, *rest, **named)

    def create_atomic_rmw(self, *args):
        raise NotImplementedError("atomics: results would depend on the order of the programs")

    create_atomic_cas = create_atomic_rmw

    def set_grid_dim(self, *grid):
        _was["set_grid_dim"](self, *grid)
        self.walk = list(range(int(np.prod(grid))))[:: -1 if _order[-1] == "reverse" else 1]
        if _order[-1] == "shuffled":
            random.Random(0).shuffle(self.walk)

    def set_grid_idx(self, x, y, z):
        _, ny, nz = self.grid_dim
        i = self.walk[(x * ny + y) * nz + z]
        self.program = i + 1
        _was["set_grid_idx"](self, i // (ny * nz), i // nz % ny, i % nz)

    def get_bf16(self, value):
        return _rounded(np.array([value], np.float32))

    def binary_op(self, a, b, op):
        if op in BITWISE or tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            out = _was["binary_op"](self, a, b, op)
            return Handle(out.data, tl.int1) if out.data.dtype == np.bool_ else out  # stock: a's type
        out = op(_values(a), _values(b))
        return Handle(out, tl.int1) if out.dtype == np.bool_ else _rounded(out)

    def unary_op(self, a, op):
        bf16 = a.dtype.scalar == tl.bfloat16
        return _rounded(op(_values(a))) if bf16 else _was["unary_op"](self, a, op)

    def ternary_op(self, a, b, c, op):
        if op is not np.clip or a.dtype.scalar != tl.bfloat16:
            return _was["ternary_op"](self, a, b, c, op)
        return _rounded(op(_values(a), _values(b), _values(c)))

    def create_fma(self, x, y, z):
        out = _values(x) * _values(y) + _values(z)
        return _rounded(out) if z.dtype.scalar == tl.bfloat16 else Handle(out, z.dtype.scalar)

    def cast_impl(self, a, to):
        if to.scalar == tl.bfloat16:
            return _rounded(_values(a).astype(np.float32))
        return Handle(_values(a).astype(stock._get_np_dtype(to)), to.scalar)

    def create_fp_to_fp(self, a, to, rounding):
        if rounding == TRUNCATE or 8 in (a.dtype.primitive_bitwidth, to.primitive_bitwidth):
            return _was["create_fp_to_fp"](self, a, to, rounding)
        return self.cast_impl(a, to)

    def create_dot(self, a, b, acc, precision, _):
        x, y = _values(a), _values(b)
        if x.shape[-1] < 16:
            raise ValueError(f"tl.dot over K = {x.shape[-1]}: a GPU wants 16 or more")
        if a.dtype == tl.float32 and precision == stock._ir.INPUT_PRECISION.TF32:
            x, y = _tf32(x), _tf32(y)
        wide = np.float64 if acc.dtype.scalar == tl.float64 else np.float32
        out = np.matmul(x.astype(wide), y.astype(wide)) + _values(acc)
        if acc.dtype.scalar == tl.bfloat16:
            return _rounded(out)
        return Handle(out.astype(acc.data.dtype), acc.dtype.scalar)


_was = {name: getattr(Builder, name) for name in vars(Mended) if hasattr(Builder, name)}


def _wrap(owner: object, name: str, mend: Callable) -> None:
    """Replace owner.name by `mend`, which gets the stock function before the arguments."""
    was = getattr(owner, name)
    setattr(owner, name, lambda *args, **named: mend(was, *args, **named))


def _typed(t: tl.core.tensor, dtype, values: np.ndarray) -> tl.core.tensor:
    kind = tl.block_type(dtype, list(values.shape)) if t.type.is_block() else dtype
    return tl.core.tensor(Handle(values, dtype), kind)


def _through_fp32(apply: Callable, self, inputs):
    """Reductions and scans of bf16 run in fp32 and are rounded once, at the end."""
    if all(t.dtype != tl.bfloat16 for t in inputs):
        return apply(self, inputs)
    wide = (_typed(t, tl.float32, _values(t.handle)) if t.dtype == tl.bfloat16 else t for t in inputs)
    out = apply(self, tuple(wide))
    outs = out if isinstance(out, list | tuple) else (out,)
    outs = (_typed(t, tl.bfloat16, narrow(t.handle.data)) if t.dtype == tl.float32 else t for t in outs)
    return tuple(outs) if isinstance(out, list | tuple) else next(outs)


def _nan_passes(min_max: Callable, self, inputs, val_reduce_op, idx_reduce_op=None):
    """np.nanmax ignores a NaN, so would hide the poison of a masked lane."""
    loud = {np.nanmax: np.max, np.nanmin: np.min}
    return min_max(self, inputs, loud.get(val_reduce_op, val_reduce_op), idx_reduce_op)


def _note_memory(prepare: Callable, self, args, named):
    """At each launch: forget the last one, note every tensor argument of this one."""
    _memory.__init__()
    for a in (*args, *named.values()):
        if hasattr(a, "data_ptr"):
            _memory.add(stock._unwrap_tensor(a))
    return prepare(self, args, named)


def _index(patch: Callable, tensor, scope) -> None:
    """Triton 3.6 with NumPy >= 2.4 fails in `for i in range(tensor)`: int() of an array of one element."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.ravel()[0]))


_patched: dict[int, object] = {}  # in this launch


def _patch_once(patch: Callable, fn):
    """Stock patches all of tl anew in each call of a helper like tl.sum: once a launch is 1.7x faster."""
    key = id(fn.__globals__)
    if key not in _patched:
        _patched[key] = patch(fn)
    return _patched[key]


def _launch_and_restore(launch: Callable, *args, **named):
    try:
        with np.errstate(all="ignore"):
            return launch(*args, **named)
    finally:
        for scope in reversed(list(_patched.values())):
            scope.restore()
        _patched.clear()


def _call(_: Callable, self, *args, **named):
    stock._patch_lang(self.fn)
    return self.rewrite()(*args, **named)


def install() -> None:
    """Repair this process's interpreter. RuntimeError if TRITON_INTERPRET=1 came after `import triton`."""
    if not isinstance(tl.zeros, stock.InterpretedFunction):
        raise RuntimeError("TRITON_INTERPRET=1 came after `import triton`: set it in the environment")
    if not triton.knobs.runtime.interpret or Builder.create_dot is Mended.create_dot:
        return
    for name in vars(Mended):
        if not name.startswith("__"):
            setattr(Builder, name, getattr(Mended, name))
    _wrap(stock.ReduceOps, "apply_impl", _through_fp32)
    _wrap(stock.ScanOps, "apply_impl", _through_fp32)
    _wrap(stock.ReduceOps, "min_max", _nan_passes)
    _wrap(stock.GridExecutor, "_init_args_hst", _note_memory)
    _wrap(stock, "_patch_lang_tensor", _index)
    _wrap(stock, "_patch_lang", _patch_once)
    _wrap(stock.GridExecutor, "__call__", _launch_and_restore)
    _wrap(stock.InterpretedFunction, "__call__", _call)
    # Looking for overflow in every sum of integers, which toy shapes do not reach, is a third of the time.
    builder = stock.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
