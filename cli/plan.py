"""Memory of a run, computed before anything is loaded: bytes of each part, and the largest settings that fit.

Arithmetic on a body's shape: weights, adapters, optimiser and cache are exact; activations are counted tensor
by tensor. tests/test_plan.py compares the sums with what is really allocated.

Not a measurement, and no promise about fragmentation or the driver: `fit` leaves SPARE for those.

    python -m bench --plan 3b --memory 24
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import kernels
from cache import PAGE
from cli.disk import read_json
from kernels.quantised import GROUP
from model import NAMES, ROLES, Config, packs
from weights import PRESETS, resolve

SPARE = 0.08  # share of the memory that is left to the driver, fragmentation and libraries
ENOUGH = 128  # seats: all share each read of the weights, so each further one gains less
LENT = 0.9  # share of the activations that can lie in the cache; a layer's are held twice then
LIKELY = 0.25  # share of its longest episode for which a seat has pages, if there are enough of them
Bodies = Sequence[Config]  # the policy's, and the simulator's if that is another

_QWEN = {"theta": 1e6, "context": 32768}
_QWEN3 = {"theta": 1e6, "context": 40960}
_ROPE = {"kind": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ROPE |= {"original_max_position_embeddings": 8192}
_LLAMA = {"theta": 5e5, "context": 131072, "eps": 1e-5, "scaling": _ROPE}
# The presets' shapes, from their config.json, so that planning needs no download: family, vocabulary, width,
# layers, heads, key heads, head_dim, width of the MLP.
SHAPES = {
    "0.5b": Config("qwen2", 151936, 896, 24, 14, 2, 64, 4864, **_QWEN),
    "1.5b": Config("qwen2", 151936, 1536, 28, 12, 2, 128, 8960, **_QWEN),
    "3b": Config("qwen2", 151936, 2048, 36, 16, 2, 128, 11008, **_QWEN),
    "7b": Config("qwen2", 152064, 3584, 28, 28, 4, 128, 18944, tied=False, **_QWEN),
    "14b": Config("qwen2", 152064, 5120, 48, 40, 8, 128, 13824, tied=False, **_QWEN),
    "qwen3-0.6b": Config("qwen3", 151936, 1024, 28, 16, 8, 128, 3072, **_QWEN3),
    "qwen3-1.7b": Config("qwen3", 151936, 2048, 28, 16, 8, 128, 6144, **_QWEN3),
    "qwen3-4b": Config("qwen3", 151936, 2560, 36, 32, 8, 128, 9728, **_QWEN3),
    "qwen3-8b": Config("qwen3", 151936, 4096, 36, 32, 8, 128, 12288, tied=False, **_QWEN3),
    "qwen3-14b": Config("qwen3", 151936, 5120, 40, 40, 8, 128, 17408, tied=False, **_QWEN3),
    "llama-1b": Config("llama", 128256, 2048, 16, 32, 8, 64, 8192, **_LLAMA),
    "llama-3b": Config("llama", 128256, 3072, 28, 24, 8, 128, 8192, **_LLAMA),
}


def shape(name: str) -> Config:
    """The shape of a preset (without a download), a directory or a hub id. ValueError as in `resolve`."""
    known = SHAPES.get(name.removesuffix("-base")) if name in PRESETS else None
    return known or Config.from_hf(read_json(resolve(name) / "config.json", "a checkpoint directory"))


@dataclass(frozen=True)
class Settings:
    """What the bytes depend on, apart from the bodies. `fit` chooses what is 0 or None."""

    seats: int = 0
    seat_tokens: int = 4096
    micro_tokens: int = 0
    recompute: bool | None = None
    rank: int = 16  # of the policy's adapter
    sim_rank: int = 16  # of the simulator's; 0: it is only prompted
    dtype: torch.dtype = torch.bfloat16
    kernels: bool = True  # Triton kernels keep less than the references, which run on a CPU
    critic_rank: int = 0  # of the critic's adapter; 0: there is no critic
    start_rank: int = 0  # of the adapter that is the KL's reference; 0: the body without one is
    pages: int = 0  # of each body's cache, with the kernels; 0: as many as all seats may need
    lend: bool = False  # the policy's cache holds activations while learning

    def __str__(self) -> str:
        flags = f"--seats {self.seats} --seat-tokens {self.seat_tokens} --micro-tokens {self.micro_tokens}"
        flags += f" --rank {self.rank} --dtype {NAMES[self.dtype]}"
        return flags + " --recompute" * bool(self.recompute) + " (activations in the cache)" * self.lend


# ----------------------------------------------------------------------------------------- bytes of each part


def linears(c: Config) -> list[tuple[int, tuple[int, ...]]]:
    """(d_in, widths of the parts) of the four matrices of a layer, as in `model.Layer`."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return [(c.d, (q, kv, kv)), (q, (c.d,)), (c.d, (c.ffn, c.ffn)), (c.ffn, (c.d,))]


def matrices(c: Config) -> int:
    """Numbers in these matrices, over all layers."""
    return c.layers * sum(d_in * sum(parts) for d_in, parts in linears(c))


def parameters(c: Config) -> int:
    """Numbers in the frozen body."""
    biases = (c.heads + 2 * c.kv_heads) * c.head_dim * c.qkv_bias
    norms = 2 * c.d + 2 * c.head_dim * c.qk_norm
    return c.vocab * c.d * (1 if c.tied else 2) + matrices(c) + c.layers * (biases + norms) + c.d


def adapter(c: Config, rank: int) -> int:
    """Numbers in a role's adapter."""
    return c.layers * sum(rank * (len(parts) * d_in + sum(parts)) for d_in, parts in linears(c))


def weights(c: Config, s: Settings) -> int:
    """Bytes of the frozen body. Of its matrices in 8 or 4 bits each row has a scale in fp32, and 4 bits a
    number for each group; a CPU with fast products of 8 bits holds 4 as 8, and the head in 8 as well."""
    n, rows = matrices(c), c.layers * sum(sum(parts) for _, parts in linears(c))
    held = {0: n * s.dtype.itemsize, 8: n + 4 * rows, 4: n // 2 + n // GROUP + 4 * rows}
    if in_digits(c, s):
        return (parameters(c) - n) * s.dtype.itemsize + held[8] + c.vocab * (c.d + 4)
    return (parameters(c) - n) * s.dtype.itemsize + held[c.bits]


def in_digits(c: Config, s: Settings) -> bool:
    """Whether the matrices go through the CPU's products of 8 bits."""
    return bool(c.bits and not s.kernels and kernels.packs_bits())


def in_full(c: Config, s: Settings) -> dict[str, int]:
    """Bytes of the largest matrix of 8 or 4 bits, which the references spell out in integers and in full."""
    n = max(d_in * sum(parts) for d_in, parts in linears(c))
    return {"a matrix in full": n * (1 + s.dtype.itemsize)} if c.bits and not s.kernels else {}


def packed_type(c: Config, s: Settings) -> torch.dtype | None:
    """The type of the copies that `Model.pack` makes on a CPU; None if it makes none."""
    dtype = None if s.kernels or in_digits(c, s) else kernels.fast_type(s.dtype, s.seats)
    plain = parameters(c) - (matrices(c) if c.bits else 0)
    return dtype if dtype and packs(plain * dtype.itemsize) else None


def product_type(c: Config, s: Settings) -> torch.dtype:
    """The type of the linears' inputs and adapters in decoding."""
    return (None if c.bits else packed_type(c, s)) or s.dtype


def packed(c: Config, s: Settings) -> int:
    """Bytes of those copies."""
    dtype = packed_type(c, s)
    return ((0 if c.bits else matrices(c)) + c.vocab * c.d) * dtype.itemsize if dtype else 0


def blocks(c: Config, rank: int) -> tuple[int, int]:
    """Numbers in all A and in all block-diagonal B of a role, as the forward pass uses them."""
    A = sum(len(parts) * rank * d_in for d_in, parts in linears(c))
    B = sum(len(parts) * rank * sum(parts) for _, parts in linears(c))
    return c.layers * A, c.layers * B


def stack(c: Config, rank: int, s: Settings) -> int:
    """Bytes of the adapters as decoding reads them; with the kernels A lies below W, padded, and a bias is as
    long as both."""
    joined = s.kernels and not c.bits
    rows = [(d_in, ROLES * rank * len(parts)) for d_in, parts in linears(c)]
    rows = [(d_in, kernels.below(k)) for d_in, k in rows] if joined else rows
    A = c.layers * (sum(d_in * k for d_in, k in rows) + rows[0][1] * c.qkv_bias * joined)
    return (A + ROLES * blocks(c, rank)[1]) * product_type(c, s).itemsize


def cache_token(c: Config, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values."""
    return 2 * c.layers * c.kv_heads * c.head_dim * dtype.itemsize


def kept(c: Config, s: Settings) -> float:
    """Bytes per token that a layer keeps for its backward pass.

    Two norms keep their sum and their result (4 d); q, k and v as projected, q and k also rotated; the output
    of attention; gate, up and their product. Where q and k are normalised (Qwen3), also the norms' input.
    """
    q, kv, size = c.heads * c.head_dim, c.kv_heads * c.head_dim, s.dtype.itemsize
    normed = (q + kv) * c.qk_norm
    numbers = 4 * c.d + (q + 2 * kv) + (q + kv) + q + 3 * c.ffn
    if s.kernels:
        return (numbers + normed) * size + 4 * c.heads  # and the log-sum-exp of each head
    fp32 = 2 * (c.d + normed) if size < 4 else 0  # the norms' input, again in fp32
    return (numbers + q + c.ffn + fp32) * size + 4 * (c.heads + 2)  # masked output, silu(gate)


def head_chunk(c: Config, s: Settings, tokens: int) -> int:
    """Bytes of the logits that `kernels.linear_logp` holds at a time, and of what it derives from them."""
    size = s.dtype.itemsize
    if s.kernels:
        some = max(128, (160 << 20) // (c.vocab * size) // 128 * 128)
        partials = min(tokens, 2048) * 24 * math.ceil(c.vocab / 128)  # of the forward pass's stripes of words
        return max(min(tokens, some) * c.vocab * size, partials)
    words = min(2048, c.vocab)  # three tiles in fp32, and those words' rows of the head, in fp32
    return min(tokens, (1 << 20) // words) * words * 12 + (words * c.d * 4 if size < 4 else 0)


def learning(c: Config, s: Settings) -> dict[str, float]:
    """Peak bytes of one micro-batch, beyond what a run always holds: either at the log-probs, when all
    activations are held, or in the last layer's backward pass."""
    tokens = max(s.micro_tokens, s.seat_tokens)  # a single row may be as long as a seat
    layer, size = kept(c, s), s.dtype.itemsize
    each = 2 * c.d * size if s.recompute else layer
    gradients = 2 * c.ffn + (5 if s.recompute else 2) * c.d * s.kernels
    back = tokens * (gradients * size + (layer if s.recompute else 0))
    head = 5 * c.d * (2 if size < 4 and not s.kernels else 1)  # the last norm, the head's input, its gradient
    activations = tokens * c.layers * each
    lent = min(cache([c], s), LENT * activations) - tokens * layer if s.lend else 0
    return {
        "activations": activations - lent,
        "log-probs, or gradients within a layer": max(back, tokens * head * size + head_chunk(c, s, tokens)),
        "the adapter's matrices": 4 * blocks(c, s.rank)[1],
    } | in_full(c, s)


def acting(c: Config, s: Settings) -> dict[str, float]:
    """Peak bytes of one body: in prefill of prompts and documents, and in a decode step."""
    size, tokens = s.dtype.itemsize, max(s.micro_tokens, s.seat_tokens)
    if s.kernels:
        wide = 4 * c.d + 3 * c.ffn if c.bits else 3 * c.d + 4 * c.ffn  # `expand` writes a tensor of its own
        feeding, logits = tokens * wide * size, s.seats * c.vocab * 4  # fp32 from any type
    else:  # attention's mask; sampling makes four fp32 tables, in addition to logits in bf16 or fp16
        fed = 4 * (c.d + c.ffn) * product_type(c, s).itemsize
        feeding = tokens * (fed + s.seat_tokens * size)
        logits = s.seats * c.vocab * (16 + (size if size < 4 else 0))
    return {"prefill of prompts and documents": feeding, "logits of all seats": logits} | in_full(c, s)


def budget(bodies: Bodies, s: Settings) -> dict[str, int]:
    """Bytes of each part, by name.

    Of the "acting: ..." and "learning: ..." parts only the greater sum is in "total": the phases alternate.
    """
    n, n_sim = adapter(bodies[0], s.rank), adapter(bodies[-1], s.sim_rank)
    n += adapter(bodies[0], s.critic_rank) + bodies[0].d if s.critic_rank else 0  # it never decodes
    ranks = [max(s.rank, s.sim_rank)] if len(bodies) == 1 else [s.rank, s.sim_rank]
    stacks = sum(stack(c, k, s) for c, k in zip(bodies, ranks))
    tables = sum(8 * min(c.context, 32768) * (c.head_dim // 2) for c in bodies)  # cosines and sines
    copies = sum(packed(c, s) for c in bodies)
    held = {
        "weights": sum(weights(c, s) for c in bodies) + tables,
        "adapters": 4 * (n + n_sim + adapter(bodies[0], s.start_rank)),
        "adapters again, for decoding": stacks,
        "gradient": 4 * n,
        "optimiser": 8 * n,
        cache_name(s): cache(bodies, s),
        "bookkeeping of the seats": bookkeeping(bodies, s),
    }
    held |= {"weights again, packed": copies} if copies else {}
    feeding = max((acting(c, s) for c in bodies), key=lambda parts: sum(parts.values()))
    phases = {"learning": learning(bodies[0], s), "acting": feeding}
    peak = max(sum(parts.values()) for parts in phases.values())
    out = held | {f"{phase}: {name}": n for phase, parts in phases.items() for name, n in parts.items()}
    return {name: math.ceil(n) for name, n in out.items()} | {"total": sum(held.values()) + math.ceil(peak)}


def most_pages(s: Settings) -> int:
    """The pages that all seats need if each is full."""
    return s.seats * math.ceil(s.seat_tokens / PAGE)


def cached(s: Settings) -> int:
    """Tokens that a body's cache holds: in whole seats on a CPU, in pages with the kernels."""
    return (s.pages or most_pages(s)) * PAGE if s.kernels else s.seats * s.seat_tokens


def cache(bodies: Bodies, s: Settings) -> int:
    """Bytes of the keys and values of all bodies."""
    return sum(cache_token(c, s.dtype) for c in bodies) * cached(s)


def cache_name(s: Settings) -> str:
    """What the cache is, for the table."""
    whole = f"cache of {s.seats} seats x {s.seat_tokens:,} tokens"
    return f"cache of {cached(s) // PAGE:,} pages x {PAGE} tokens" if s.kernels else whole


def bookkeeping(bodies: Bodies, s: Settings) -> int:
    """Bytes of the seats' numbers: lengths, limits, ids, log-probs, uniforms; and of the table of pages."""
    table = 4 * math.ceil(s.seat_tokens / PAGE) * s.kernels
    return len(bodies) * s.seats * (16 * s.seat_tokens + 64 + table)


def table(b: dict[str, int]) -> str:
    """A budget as lines of text, in MiB."""
    width = max(map(len, b))
    return "\n".join(f"  {name:{width}s} {size / 2**20:12,.1f} MiB" for name, size in b.items())


# ------------------------------------------------------------------------------------------------ what fits


def fit(bodies: Bodies, memory: float, s: Settings, useful: int = 640) -> tuple[Settings, dict[str, int]]:
    """Choose what `s` leaves open (0 or None) so that a step fits into `memory` bytes, less SPARE.

    useful: the most seats that a step can fill. Tried in this order: large micro-batches with activations
    kept; smaller ones; with activations kept in the cache; recomputed. The first whose cache suits ENOUGH
    seats is taken, else the one with the largest cache. Raises ValueError with the arithmetic if not even
    2 seats fit.

    With the kernels the cache has pages: all useful seats (fewer where not each would have a page), and as
    many pages as fit, so that few seats can be full at a time (the engine preempts some if more would be).
    """
    room, found = memory * (1 - SPARE), []
    enough = min(useful, ENOUGH) * s.seat_tokens * (LIKELY if s.kernels else 1)
    enough = min(enough, s.seats * s.seat_tokens) if s.seats else enough
    for trial in _trials(s):
        if s.kernels:
            trial = _paged(bodies, room, trial, useful)
        elif not s.seats:
            trial = replace(trial, seats=_seats(bodies, room, trial, useful))
        b = budget(bodies, trial)
        if trial.seats >= 2 and b["total"] <= room:
            found.append((trial, b))
            if cached(trial) >= enough:
                return trial, b
    if not found:
        raise ValueError(_refusal(bodies, room, s))
    return max(found, key=lambda one: cached(one[0]))


def acting_pages(bodies: Bodies, memory: float, s: Settings) -> int:
    """The most pages of each cache with which bodies that are loaded can act in `memory` free bytes."""
    peak = max(sum(acting(c, s).values()) for c in bodies)
    free = memory * (1 - SPARE) - bookkeeping(bodies, s) - peak
    each = cache(bodies, replace(s, pages=1))
    return int(min(max(free // each, 2 * math.ceil(s.seat_tokens / PAGE)), most_pages(s)))


def _trials(s: Settings) -> list[Settings]:
    """Settings for learning, from the fastest to the smallest; those that were given are kept."""
    least = s.seat_tokens
    sizes = [s.micro_tokens] if s.micro_tokens else [n for n in (8192, 4096) if n > least] + [least]
    ways = [(False, False), *[(False, True)] * s.kernels, (True, False)]
    ways = [way for way in ways if s.recompute in (None, way[0])]
    return [replace(s, micro_tokens=n, recompute=way, lend=lend) for way, lend in ways for n in sizes]


def _paged(bodies: Bodies, room: float, s: Settings, useful: int) -> Settings:
    """Settings with seats and pages: seats that are not given are halved until each has a page at least."""
    for seats in [s.seats] if s.seats else [max(2, useful >> n) for n in range(useful.bit_length())]:
        found = replace(s, seats=seats)
        found = replace(found, pages=s.pages or _pages(bodies, room, found))
        if found.pages >= seats and budget(bodies, found)["total"] <= room:
            break
    return found


def _pages(bodies: Bodies, room: float, s: Settings) -> int:
    """The most pages with which the step fits: as many as two full seats need at least."""
    least, most = most_pages(replace(s, seats=2)), most_pages(s)

    def over(pages: int) -> bool:
        return budget(bodies, replace(s, pages=pages))["total"] > room

    return max(least, bisect_left(range(1, most + 1), True, key=over))


def _seats(bodies: Bodies, room: float, s: Settings, useful: int) -> int:
    """The most seats, up to `useful`, with which the step fits (0: not even one). Two bisections, above and
    below MANY, because packed copies for many rows may be smaller than for few."""

    def over(seats: int) -> bool:
        return budget(bodies, replace(s, seats=seats))["total"] > room

    few = min(kernels.MANY - 1, useful)
    more = bisect_left(range(few + 1, useful + 1), True, key=over)
    return few + more if more else bisect_left(range(1, few + 1), True, key=over)


def _refusal(bodies: Bodies, room: float, s: Settings) -> str:
    least = replace(_trials(s)[-1], seats=max(2, s.seats))
    least = replace(least, pages=most_pages(replace(s, seats=2)) * s.kernels)
    b = {name: size / 2**30 for name, size in budget(bodies, least).items()}
    needs = (
        f"a step needs {b.pop('total'):.2f} GiB even with {least}, but {room / 2**30:.2f} GiB are available"
    )
    parts = ", ".join(f"{name} {b[name]:.2f}" for name in sorted(b, key=b.get, reverse=True)[:4])
    return (
        f"{needs} ({parts} GiB, ...): lower --seat-tokens and --episode-tokens, or use a smaller checkpoint"
    )
