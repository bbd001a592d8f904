"""The network: a decoder of the Llama / Qwen families, and its LoRA adapters.

One *body*, the frozen base model, plays all roles. A role is an index: 0 is the reference (no adapter),
1 the policy, 2 the simulator, 3 the critic of PPO, 4 the adapter that a policy started
from. A forward pass takes one role for all rows (training) or
one per row (decoding), so a single copy of the weights is policy, simulator and KL reference at once.

Not a general model library: `llama`, `qwen2` and `qwen3` only; a config.json that asks for a feature not
implemented here is refused. weights.py reads and writes checkpoints.

    model = weights.load("Qwen/Qwen2.5-3B-Instruct")   # a preset, a directory or a hub id
    model.add_role(POLICY, rank=16, alpha=32)
    h = model(ids, POLICY)                              # (B, T, d) hidden states after the final norm
    logits = model.logits(h)                            # (B, T, V)
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels

REFERENCE, POLICY, SIMULATOR, CRITIC, START = 0, 1, 2, 3, 4
NO_DROPOUT = {"preserve_rng_state": False}  # nothing here draws, so a recomputed layer needs no random state
ROLES = 2  # roles that have an adapter and decode; the last two never do

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# ---------------------------------------------------------------------------------------------- configuration

# Keys of a config.json that do not change the forward pass.
INERT = """
    architectures attention_dropout bos_token_id eos_token_id pad_token_id initializer_range model_type
    torch_dtype dtype transformers_version use_cache max_window_layers sliding_window pretraining_tp
    is_llama_config name_or_path id2label label2id problem_type output_attentions output_hidden_states
    return_dict use_bfloat16 is_encoder_decoder chunk_size_feed_forward transformers.js_config
    unsloth_fixed unsloth_version tokenizer_class
"""
READ = """
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings
    tie_word_embeddings hidden_act attention_bias mlp_bias use_sliding_window layer_types rope_interleaved
"""
KNOWN = set((INERT + READ).split())


@dataclass(frozen=True)
class Config:
    """The shape of a body. `from_hf` reads a config.json, and `hf` keeps it for writing it back."""

    family: str  # llama | qwen2 | qwen3
    vocab: int
    d: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    eps: float = 1e-6
    theta: float = 10000.0
    scaling: dict = field(default_factory=dict)  # of the rotary frequencies
    context: int = 4096  # the longest position
    tied: bool = True
    bits: int = 0  # of the frozen linears: 8, 4, or 0 for the body's type
    hf: dict = field(default_factory=dict, compare=False)

    qkv_bias = property(lambda self: self.family == "qwen2")
    qk_norm = property(lambda self: self.family == "qwen3")

    @staticmethod
    def from_hf(c: dict) -> "Config":
        """Read a config.json. Raises ValueError for anything that is not implemented here."""
        if how := c.get("quantization_config"):
            kind = how.get("quant_method", "") if isinstance(how, dict) else how
            why = "this checkpoint is quantised already: take the plain one, with --bits 8 or 4"
            raise ValueError(f"config.json has a quantization_config ({kind}): {why}")
        family = c.get("model_type")
        if family not in ("llama", "qwen2", "qwen3"):
            raise ValueError(f"model_type {family!r} is not supported: only llama, qwen2 and qwen3 are")
        try:
            _refuse_unknown(c)
            heads, d = c["num_attention_heads"], c["hidden_size"]
            rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
            config = Config(
                family=family,
                vocab=c["vocab_size"],
                d=d,
                layers=c["num_hidden_layers"],
                heads=heads,
                kv_heads=c.get("num_key_value_heads") or heads,
                head_dim=c.get("head_dim") or d // heads,
                ffn=c["intermediate_size"],
                eps=c["rms_norm_eps"],
                theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0),
                scaling=_scaling(rope),
                context=c["max_position_embeddings"],
                tied=bool(c.get("tie_word_embeddings", False)),
                hf=c,
            )
        except KeyError as e:
            raise ValueError(f"config.json has no {e}: is this a complete {family} model?") from None
        except (TypeError, ArithmeticError, AttributeError) as e:
            raise ValueError(
                f"config.json holds something else than a {family} model's sizes ({e})"
            ) from None
        _check_sizes(config)
        return config


def _refuse_unknown(c: dict) -> None:
    off = dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window", "rope_interleaved"), False)
    for key, value in (off | {"hidden_act": "silu"}).items():
        if c.get(key, value) != value:
            raise ValueError(f"config.json sets {key} = {c[key]!r}: only {value!r} is implemented")
    if set(c.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError("config.json asks for sliding-window layers, which this network does not implement")
    unknown = sorted(k for k, v in c.items() if v and k not in KNOWN and not k.startswith("_"))
    if unknown:
        why = "unknown to this network: remove it there if it does not change the forward pass"
        raise ValueError(f"config.json sets {', '.join(unknown)}, {why}")


def _check_sizes(c: Config) -> None:
    """Raise ValueError for sizes that no network has."""
    sizes = ("vocab", "d", "layers", "heads", "kv_heads", "head_dim", "ffn", "context")
    wrong = {s: n for s in sizes if type(n := getattr(c, s)) is not int or not 0 < n < 2**31}
    numbers = {"rms_norm_eps": c.eps, "rope_theta": c.theta} | c.scaling
    numbers.pop("kind", None)
    wrong |= {s: x for s, x in numbers.items() if type(x) not in (int, float) or not 0 < x < 1e18}
    wrong |= {"head_dim": c.head_dim} if not wrong and c.head_dim % 2 else {}
    wrong |= {"kv_heads": c.kv_heads} if not wrong and c.heads % c.kv_heads else {}
    if wrong:
        told = ", ".join(f"{name} {str(value)[:40]}" for name, value in wrong.items())
        raise ValueError(f"config.json describes no network: {told}")


def _scaling(rope: dict) -> dict:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    keys = {"default": (), "linear": ("factor",)}
    keys["llama3"] = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind not in keys:
        raise ValueError(f"rope type {kind!r} is not supported: only {', '.join(keys)}")
    missing = [k for k in keys[kind] if k not in rope]
    if missing:
        raise ValueError(f"rope type {kind!r} needs {', '.join(missing)} in config.json")
    return {} if kind == "default" else {"kind": kind} | {k: rope[k] for k in keys[kind]}


def frequencies(c: Config) -> Tensor:
    """Rotary frequencies (head_dim / 2,), radians per position, after the checkpoint's scaling."""
    inv = 1.0 / c.theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.int64).float() / c.head_dim)
    s = c.scaling
    if not s:
        return inv
    if s["kind"] == "linear":
        return inv / s["factor"]
    # Llama 3: long wavelengths are stretched by the factor, short ones kept, those between are blended.
    turns = s["original_max_position_embeddings"] * inv / (2 * math.pi)
    keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return keep * inv + (1 - keep) * inv / s["factor"]


# ------------------------------------------------------------------------------------------------ the network


class Linear(nn.Module):
    """A frozen matrix: one of the checkpoint's, or several concatenated (q, k and v; gate and up). In 8 or 4
    bits its `weight` is no Parameter but a `kernels.Quantised`."""

    def __init__(self, d_in: int, parts: dict[str, int], bias: bool = False):
        super().__init__()
        self.d_in, self.parts = d_in, parts
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), d_in), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(sum(parts.values())), requires_grad=False) if bias else None
        self.packed: kernels.Packed | None = None  # see Model.pack
        self.joined: list[Tensor] = []  # see `join`

    def join(self, rows: int) -> Tensor:
        """Room for so many rows of A below the matrix -> that room (rows, d_in). `weight` and `bias` become
        views of the beginning of `joined`: nothing but decoding sees the rest."""
        n, size = len(self.weight), len(self.weight) + kernels.below(rows)
        held = [p for p in (self.weight, self.bias) if p is not None]
        if [(len(x), x.data_ptr()) for x in self.joined] != [(size, p.data_ptr()) for p in held]:
            with torch.inference_mode(False):  # autograd refuses tensors of that mode
                self.joined = [torch.cat((p, p.new_zeros(size - n, *p.shape[1:]))) for p in held]
                for p, x in zip(held, self.joined):
                    p.data = x[:n]
            if self.weight.is_cuda:  # else others get a part of the old block, and the cache needs one piece
                torch.cuda.empty_cache()
        return self.joined[0][n : n + rows]

    def forward(self, x: Tensor, lora: "Update | None") -> Tensor:
        """x (B, T, d_in) -> (B, T, sum of the parts), with the role's LoRA update added."""
        if lora is not None and lora.weight is None and torch.is_grad_enabled():
            return kernels.lora_linear(x, self.weight, self.bias, lora.A, lora.B, lora.scale)
        if lora is not None and lora.weight is not None and self.joined:
            return kernels.expand(F.linear(x, *self.joined), lora.B, lora.weight)
        y = product(x, self.weight, self.packed, self.bias)
        if lora is not None:
            adapt(y, x.to(y.dtype), lora)
        return y.to(x.dtype)


def memory(free: bool = False) -> int:
    """Bytes of this machine's memory, all or (`free`) what is available; 4 GiB if the system does not say."""
    if (info := Path("/proc/meminfo")).exists():
        name = "MemAvailable" if free else "MemTotal"
        return next(int(line.split()[1]) * 1024 for line in info.open() if line.startswith(name))
    known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 if free else 1) if known else 2**32


def packs(size: int) -> bool:
    """Whether weights of `size` bytes get packed copies on a CPU: not tiny ones, nor if memory is short."""
    return 2**26 < size < memory() / 8


def product(x: Tensor, weight: kernels.Matrix, packed: kernels.Packed | None, bias: Tensor | None = None):
    """x (..., d_in) -> x W^T + bias. The packed copy, and its type, are for inference mode only: there the
    engine samples. Under no_grad they stay unused, because policy and KL reference must round alike.
    """
    if packed is not None and torch.is_inference_mode_enabled():
        return kernels.packed_linear(x.to(packed.weight.dtype), weight, packed)
    return kernels.linear(x, weight, bias)


def adapt(y: Tensor, x: Tensor, lora: "Update") -> None:
    """Add the LoRA update to y, the output of a Linear for x, in place and without gradients."""
    if lora.weight is not None:
        kernels.lora(y, x, lora.A, lora.B, lora.weight)
    else:  # one adapter for all rows, perhaps an fp32 master copy
        A, B = lora.A.to(x.dtype), lora.B.to(x.dtype)
        y.flatten(0, -2).addmm_(x.flatten(0, -2) @ A.T, B.T, alpha=lora.scale)


@dataclass(frozen=True)
class Update:
    """What LoRA adds to one Linear: scale (x A^T) B^T for all rows, or each row's weighted sum over roles."""

    A: Tensor  # (k, d_in), or (R, k, d_in) with weights
    B: Tensor  # (d_out, k), or (R, k, d_out)
    scale: Tensor | float = 1.0
    weight: Tensor | None = None  # (B, R): the scale of each row's role, 0 for the others


@dataclass(frozen=True)
class Window:
    """Adjacent rows of the cache (cache.py), with their cached lengths and their numbers of new tokens."""

    layers: tuple[Tensor, ...]  # each (pages, 2 KV, tokens of a page, D): the heads of k, then those of v
    upto: int  # positions of a row that attention covers
    start: Tensor  # (B,) tokens that each row already holds
    lens: Tensor | None = None  # (B,) new tokens of each row; None: all are real
    table: Tensor | None = None  # (B, pages of a row); None: page b is row b
    feeds: bool = False  # only the cache is wanted: the last layer stops at its keys and values


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU. Each residual addition happens inside the norm that follows it."""

    def __init__(self, c: Config):
        super().__init__()
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.c = c
        self.norm_1 = nn.Parameter(torch.ones(c.d), requires_grad=False)
        self.qkv = Linear(c.d, {"q_proj": q, "k_proj": kv, "v_proj": kv}, bias=c.qkv_bias)
        if c.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(c.head_dim), requires_grad=False)
            self.k_norm = nn.Parameter(torch.ones(c.head_dim), requires_grad=False)
        self.out = Linear(q, {"o_proj": c.d})
        self.norm_2 = nn.Parameter(torch.ones(c.d), requires_grad=False)
        self.gate_up = Linear(c.d, {"gate_proj": c.ffn, "up_proj": c.ffn})
        self.down = Linear(c.ffn, {"down_proj": c.d})

    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def forward(self, x, delta, attend, updates, chosen=None):
        """x (B, T, d) the residual stream, delta the last layer's output, not yet added to it -> both; or
        what they are at the `chosen` (N,) of the B T tokens, (N, d)."""
        eps = self.c.eps
        if delta is None:
            y = kernels.rms_norm(x, self.norm_1, eps)
        else:
            y, x = kernels.rms_norm(delta, self.norm_1, eps, residual=x)
        qkv = self.qkv(y, updates[0]).unflatten(-1, (-1, self.c.head_dim))  # (B, T, H + 2 KV, D)
        if (o := attend(self, qkv)) is None:  # keys and values are in the cache, and nothing else is wanted
            return x, y
        o = o.flatten(-2)
        if chosen is not None:
            o, x = (y.flatten(0, 1).index_select(0, chosen) for y in (o, x))
        delta = self.out(o, updates[1])
        y, x = kernels.rms_norm(delta, self.norm_2, eps, residual=x)
        return x, self.down(kernels.swiglu(self.gate_up(y, updates[2])), updates[3])

    def parts(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (B, T, H + 2 KV, D) -> q, k and v, of which Qwen3 normalises the first two."""
        c = self.c
        q, k, v = qkv.split((c.heads, c.kv_heads, c.kv_heads), 2)
        if c.qk_norm:
            q, k = kernels.rms_norm(q, self.q_norm, c.eps), kernels.rms_norm(k, self.k_norm, c.eps)
        return q, k, v


class Model(nn.Module):
    """The body. Weights are frozen parameters; the roles' adapters are in `roles`."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed = nn.Parameter(torch.empty(c.vocab, c.d), requires_grad=False)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.Parameter(torch.ones(c.d), requires_grad=False)
        self.untied = None if c.tied else nn.Parameter(torch.empty(c.vocab, c.d), requires_grad=False)
        self.packed_head: kernels.Packed | None = None
        self.head_bits: kernels.Quantised | None = None  # see `round_head`
        self.roles: dict[int, Adapter] = {}
        self.rotary()

    def quantise(self, bits: int, device: torch.device | str) -> None:
        """Give a body on meta room on a device for its linears in 8 or 4 bits. ValueError for 4 bits of a
        width that does not suit them."""
        self.config = replace(self.config, bits=bits)
        for linear in self.linears():
            shape = linear.weight.shape
            del linear.weight  # nn.Module gives a Parameter's name to nothing else
            linear.weight = kernels.Quantised.empty(*shape, bits, device)

    def rotary(self) -> None:
        """(Re)compute the cosines and sines, (context, head_dim / 2) in fp32, on the weights' device."""
        with torch.device("cpu"):
            angle = torch.arange(min(self.config.context, 32768)).float()[:, None] * frequencies(self.config)
        device = "cpu" if self.device.type == "meta" else self.device
        self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)

    @property
    def head(self) -> Tensor:
        """The output matrix (V, d)."""
        return self.embed if self.untied is None else self.untied

    device = property(lambda self: self.embed.device)
    dtype = property(lambda self: self.embed.dtype)

    def forward(
        self,
        ids: Tensor,
        role: int | Tensor,
        lengths: Tensor | None = None,
        window: Window | None = None,
        lora: list[Update] | None = None,
        recompute: bool = False,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """ids (B, T) -> hidden states (B, T, d) after the final norm.

        role: one for all rows, or (B,) one per row (needs `lora` from a `Stack`). lengths (B,): tokens of
        right-padded rows. window: row b's tokens follow the window.start[b] cached ones and join the cache.
        recompute: keep only the layers' inputs for the backward pass (activation checkpointing). chosen
        (B, T) bool: only these tokens' states, (N, d); the last layer leaves the others out after attention.
        """
        updates = lora if lora is not None else self.updates(role)
        attends = self._alone(lengths) if window is None else self._cached(window, ids.size(1))
        x, delta = F.embedding(ids, self.embed), None  # (B, T, d)
        last = None if chosen is None else chosen.flatten().nonzero()[:, 0]
        for i, (layer, attend) in enumerate(zip(self.layers, attends)):
            given = x, delta, attend, updates[4 * i : 4 * i + 4], last if layer is self.layers[-1] else None
            if recompute and torch.is_grad_enabled():
                x, delta = checkpoint(layer, *given, use_reentrant=False, **NO_DROPOUT)
            else:
                x, delta = layer(*given)
        return kernels.rms_norm(delta, self.norm, self.config.eps, residual=x)[0]

    def _alone(self, lengths: Tensor | None) -> Iterator[Callable]:
        """For each layer: attention within each row, without a cache."""

        def attend(layer, qkv):
            q, k, v = layer.parts(qkv)
            return kernels.attention(*kernels.rope(q, k, self.cos, self.sin), v, lengths)

        return repeat(attend)

    def _cached(self, w: Window, T: int) -> Iterator[Callable]:
        """For each layer: attention that first writes its T new keys and values into the layer's cache."""
        place = kernels.Place(w.start, T, w.upto, w.lens, self.cos, self.sin, self.dtype, w.table)

        def attend(cache, layer, qkv):
            if self.config.qk_norm:
                qkv = torch.cat(layer.parts(qkv), 2)
            q = kernels.rope_cache(qkv, cache, place)
            return None if w.feeds and layer is self.layers[-1] else kernels.cached_attention(q, cache, place)

        return (partial(attend, layer) for layer in w.layers)

    def logits(self, h: Tensor) -> Tensor:
        """h (..., d) -> (..., V); on a GPU in fp32, whatever the body's type."""
        if kernels.compiled(h):
            return kernels.mm_fp32(h.flatten(0, -2), self.head.T).unflatten(0, h.shape[:-1])
        if self.head_bits is not None and torch.is_inference_mode_enabled():
            return kernels.linear(h, self.head_bits)
        return product(h, self.head, self.packed_head)

    @torch.no_grad()
    def round_head(self) -> None:
        """Round the head of a quantised body (and a tied embedding) to 8 bits, on a CPU with fast products of
        8 bits: the engine multiplies such a copy, training the same numbers in full."""
        if self.config.bits and self.device.type == "cpu" and kernels.packs_bits():
            self.head_bits = kernels.Quantised.empty(*self.head.shape, 8)
            self.head_bits.copy_(self.head)
            self.head.copy_(self.head_bits.integers() * self.head_bits.scale[:, None])
            self.head_bits.pack()

    def pack(self, rows: int) -> None:
        """On a CPU, where it pays (`packs`): packed copies of the matrices, for sampling with `rows` rows.

        In fp32 with 8 rows, matmuls are nearly 3 times as fast for a body of 135M; a tiny body gains nothing.
        """
        kind = kernels.fast_type(self.dtype, rows)
        done = self.packed_head is not None and self.packed_head.weight.dtype == kind
        if self.device.type != "cpu" or kind is None or done:
            return
        if self.head_bits is None and packs(sum(p.numel() for p in self.parameters()) * kind.itemsize):
            for linear in self.linears():
                if isinstance(linear.weight, Tensor):
                    linear.packed = kernels.pack(linear.weight.data, linear.bias, kind)
            self.packed_head = kernels.pack(self.head.data, None, kind)

    # roles

    def linears(self) -> Iterator[Linear]:
        """Every matrix that LoRA adapts, four per layer."""
        return (linear for layer in self.layers for linear in layer.linears())

    def add_role(self, role: int, rank: int = 16, alpha: float = 32.0, seed: int = 0) -> None:
        """Give a role a new adapter that changes nothing yet: A uniform as in PEFT, B (and value) 0."""
        self.roles[role] = Adapter.fresh(list(self.linears()), rank, alpha, seed, self.device)
        if role == CRITIC:
            self.roles[role].value = nn.Parameter(torch.zeros(self.config.d, device=self.device))

    def adapter(self, role: int) -> nn.Parameter:
        """The role's parameters, one flat fp32 vector. Raises KeyError if the role has no adapter."""
        return self.roles[role].theta

    def updates(self, role: int) -> list[Update | None]:
        """The LoRA updates of every linear for one role, differentiable in its adapter."""
        if (adapter := self.roles.get(role)) is None:
            return [None] * (4 * len(self.layers))
        return [Update(A, B, adapter.scale) for A, B in adapter.pairs(list(self.linears()))]

    @torch.no_grad()
    def stacked(self, old: "Stack | None" = None) -> "Stack":
        """A copy of all roles' adapters in the type of the matmuls, for decoding with one role per row.

        `old`, if its scales, rank, type and place still hold, is overwritten in place, for the CUDA graphs
        that read it. Lower ranks are padded with zeros. On a GPU A lies below the matrices (kernels/lora.py).
        """
        linears, roles = list(self.linears()), range(1, ROLES + 1)
        mine = {r: self.roles[r] for r in roles if r in self.roles}
        scales = [mine[r].scale if r in mine else 0.0 for r in roles]
        rank = max((a.rank for a in mine.values()), default=1)
        plain = self.packed_head is None or self.config.bits
        dtype = self.dtype if plain else self.packed_head.weight.dtype
        sizes = [(len(x.parts) * rank, x.d_in, x.weight.shape[0]) for x in linears]
        A = None if old is None else old.pairs[0][0]
        join = kernels.joins(self.embed) and any(scales) and self.packed_head is None and not self.config.bits
        for x in linears if not join else ():
            x.joined = []  # A lies apart from W
        room = [x.join(ROLES * k).view(ROLES, k, i) for x, (k, i, _) in zip(linears, sizes) if join]
        moved = any(x.data_ptr() != pair[0].data_ptr() for x, pair in zip(room, old.pairs if old else ()))
        if A is None or moved or (old.scales, A.size(1), A.dtype) != (scales, sizes[0][0], dtype):
            zeros = partial(torch.zeros, dtype=dtype, device=self.device)
            room = room or [zeros(ROLES, k, i) for k, i, _ in sizes]
            pairs = [(A, zeros(ROLES, k, o)) for A, (k, _, o) in zip(room, sizes)]
            scale, index = (torch.tensor(x, device=self.device) for x in (scales, roles))
            old = Stack(pairs, scales, scale, index)
        for role, adapter in mine.items():
            for (A, B), (a, b) in zip(old.pairs, adapter.pairs(linears)):
                A[role - 1, : len(a)], B[role - 1, : len(a)] = a, b.T
                A[role - 1, len(a) :] = 0  # the adapter here before may have had a higher rank
        return old

    def init(self, seed: int, std: float = 0.02) -> "Model":
        """Random weights, for a body that will be trained from scratch."""
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                p.data.normal_(0, std, generator=g)
            else:
                p.data.fill_(0.0 if name.endswith("bias") else 1.0)
        return self


@dataclass(frozen=True)
class Stack:
    """Every linear's adapters of all roles, A (R, k, d_in) and B (R, k, d_out), and the roles' scales."""

    pairs: list[tuple[Tensor, Tensor]]
    scales: list[float]
    scale: Tensor  # (R,), the same
    roles: Tensor  # (R,): 1, 2

    def rows(self, role: Tensor | int) -> list[Update | None]:
        """The updates for a batch: role (B,) one per row, or one for all rows (cheaper)."""
        if isinstance(role, Tensor) and any(self.scales):
            weight = torch.where(role[:, None] == self.roles, self.scale, 0.0)  # (B, R)
            return [Update(A, B, weight=weight) for A, B in self.pairs]
        if isinstance(role, Tensor) or role == REFERENCE or not self.scales[role - 1]:
            return [None] * len(self.pairs)
        return [Update(A[role - 1], B[role - 1].T, self.scales[role - 1]) for A, B in self.pairs]


# --------------------------------------------------------------------------------------------------- adapters


@dataclass
class Adapter:
    """One role's LoRA matrices in one flat fp32 vector: a single tensor to optimise, clip and save.

    Each part of a Linear has its own A (rank, d_in) and B (part, rank), as in PEFT. The As are concatenated
    and the Bs put into one block-diagonal matrix: two thin matmuls, however many parts there are.
    """

    theta: nn.Parameter
    rank: int
    alpha: float
    value: nn.Parameter | None = None  # (d,), the critic's: its value of a state h is h . value

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.theta] if self.value is None else [self.theta, self.value]

    @staticmethod
    def fresh(linears: list[Linear], rank: int, alpha: float, seed: int, device: torch.device) -> "Adapter":
        size = sum(len(x.parts) * rank * x.d_in + rank * x.weight.shape[0] for x in linears)
        adapter, g = (
            Adapter(nn.Parameter(torch.zeros(size)), rank, alpha),
            torch.Generator().manual_seed(seed),
        )
        for linear, (A, _) in zip(linears, adapter.pieces(linears)):
            A.data.uniform_(-(linear.d_in**-0.5), linear.d_in**-0.5, generator=g)
        adapter.theta.data = adapter.theta.data.to(device)
        return adapter

    def pieces(self, linears: list[Linear]) -> list[tuple[Tensor, list[Tensor]]]:
        """Views: for each Linear its As (parts * rank, d_in) and Bs (part, rank). One split, one backward."""
        r = self.rank
        sizes = [n * r for x in linears for n in (len(x.parts) * x.d_in, *x.parts.values())]
        flat = iter(self.theta.split(sizes))
        return [
            (next(flat).view(-1, x.d_in), [next(flat).view(n, r) for n in x.parts.values()]) for x in linears
        ]

    def pairs(self, linears: list[Linear]) -> list[tuple[Tensor, Tensor]]:
        """For each Linear: A (parts * rank, d_in) and the block-diagonal B (d_out, parts * rank)."""
        return [(A, Bs[0] if len(Bs) == 1 else torch.block_diag(*Bs)) for A, Bs in self.pieces(linears)]
