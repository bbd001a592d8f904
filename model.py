"""The network: a decoder of the Llama / Qwen families, its seat cache, its LoRA roles, its weights on disk.

One frozen body plays three roles. A role is an index: 0 is the reference (no adapter), 1 the policy,
2 the simulator. A forward pass takes one role for all rows (training) or one per row (decoding), so that a
single copy of the weights is policy, simulator and KL reference at once.

Not a general model library: it reads ordinary Hugging Face directories of `llama`, `qwen2` and `qwen3` models
and refuses, in one line, a checkpoint that asks for anything else.

    model = load("Qwen/Qwen2.5-3B-Instruct")           # a preset, a directory or a hub id
    model.add_role(POLICY, rank=16, alpha=32)
    h = model(ids, POLICY)                              # (B, T, d) hidden states after the final norm
    logits = model.logits(h)                            # (B, T, V)
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels

REFERENCE, POLICY, SIMULATOR = 0, 1, 2
ROLES = 2  # roles that have an adapter

HERE = Path(__file__).resolve().parent
QWEN, LLAMA = ("0.5", "1.5", "3", "7", "14"), ("1", "3")  # sizes, billions of parameters
PRESETS = {
    "tiny": str(HERE / "toy"),
    **{f"{n}b": f"Qwen/Qwen2.5-{n}B-Instruct" for n in QWEN},
    **{f"{n}b-base": f"Qwen/Qwen2.5-{n}B" for n in QWEN},
    **{f"llama-{n}b": f"meta-llama/Llama-3.2-{n}B-Instruct" for n in LLAMA},
    **{f"llama-{n}b-base": f"meta-llama/Llama-3.2-{n}B" for n in LLAMA},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# ---------------------------------------------------------------------------------------------- configuration

# Keys of a config.json that change nothing in the forward pass.
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
    """The shape of a body. `from_hf` reads a config.json; `hf` keeps that to be written back."""

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
    hf: dict = field(default_factory=dict, compare=False)

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    @staticmethod
    def from_hf(c: dict) -> "Config":
        """Read a config.json. Raises ValueError for whatever this network does not implement."""
        family = c.get("model_type")
        if family not in ("llama", "qwen2", "qwen3"):
            raise ValueError(
                f"model_type {family!r} is not supported: use a llama, qwen2 or qwen3 checkpoint"
            )
        _refuse_unknown(c)
        try:
            heads, d = c["num_attention_heads"], c["hidden_size"]
            rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
            return Config(
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
            missing = e.args[0]
            raise ValueError(f"config.json has no {missing!r}: is this a whole {family} model?") from None


def _refuse_unknown(c: dict) -> None:
    off = dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window", "rope_interleaved"), False)
    for key, value in (off | {"hidden_act": "silu"}).items():
        if c.get(key, value) != value:
            raise ValueError(f"config.json sets {key} = {c[key]!r}: only {value!r} is implemented")
    if set(c.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError("config.json asks for sliding-window layers, which this network does not implement")
    unknown = [k for k, v in c.items() if v and k not in KNOWN and not k.startswith("_")]
    if unknown:
        raise ValueError(
            f"config.json sets {', '.join(sorted(unknown))}, unknown to this network: "
            "remove it there if it does not change the forward pass"
        )


def _scaling(rope: dict) -> dict:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    keys = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in keys:
        raise ValueError(f"rope type {kind!r} is not supported: only {', '.join(keys)}")
    missing = [k for k in keys[kind] if k not in rope]
    if missing:
        raise ValueError(f"rope type {kind!r} needs {', '.join(missing)} in config.json")
    return {} if kind == "default" else {"kind": kind} | {k: rope[k] for k in keys[kind]}


def frequencies(c: Config) -> Tensor:
    """Rotary frequencies (head_dim / 2,), radians a position, after the checkpoint's scaling."""
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
    """A frozen matrix: one of the checkpoint's, or several side by side (q, k and v; gate and up)."""

    def __init__(self, d_in: int, parts: dict[str, int], bias: bool = False):
        super().__init__()
        self.d_in, self.parts = d_in, parts
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), d_in), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(sum(parts.values())), requires_grad=False) if bias else None
        self.packed: kernels.Packed | None = None  # see Model.pack

    def forward(self, x: Tensor, lora: "Update | None") -> Tensor:
        """x (B, T, d_in) -> (B, T, sum of the parts), with the role's update."""
        if lora is not None and lora.weight is None and torch.is_grad_enabled():
            return kernels.lora_linear(x, self.weight, self.bias, lora.A, lora.B, lora.scale)
        y = product(x, self.weight, self.packed, self.bias)
        if lora is not None:
            adapt(y, x.to(y.dtype), lora)
        return y.to(x.dtype)


def memory(free: bool = False) -> int:
    """Bytes of this machine's memory, or of what is available (4 GiB where the system does not say)."""
    info = Path("/proc/meminfo")
    if info.exists():
        name = "MemAvailable" if free else "MemTotal"
        return next(int(line.split()[1]) * 1024 for line in info.open() if line.startswith(name))
    known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 if free else 1) if known else 2**32


def packs(size: int) -> bool:
    """Whether weights of so many bytes get packed copies on a CPU: not tiny, and memory suffices."""
    return 2**26 < size < memory() / 8


def product(x: Tensor, weight: Tensor, packed: "kernels.Packed | None", bias: Tensor | None = None) -> Tensor:
    """x (..., d_in) -> x W^T + bias. In inference mode, in which the engine samples: from the packed copy, in
    its type. Not wherever gradients are off: policy and KL reference must round alike.
    """
    if packed is not None and torch.is_inference_mode_enabled():
        return kernels.packed_linear(x.to(packed.weight.dtype), weight, packed)
    return F.linear(x, weight, bias)


def adapt(y: Tensor, x: Tensor, lora: "Update") -> None:
    """Add a Linear's update to its result y in place, without gradients."""
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
    """A view of adjacent rows of the cache, with their lengths before and in this forward pass."""

    layers: tuple[Tensor, ...]  # of each layer: the heads of k, then those of v (B, 2 KV, L, D)
    start: Tensor  # (B,) tokens that each row already holds
    lens: Tensor | None  # (B,) new tokens of each row; None: all are real


class Cache:
    """Keys and values of a fixed number of seats, which are rows. Their lengths are kept by the caller."""

    def __init__(self, c: Config, seats: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        self.seats, self.capacity = seats, capacity
        shape = (c.layers, seats, 2 * c.kv_heads, capacity, c.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)

    def window(self, rows: slice, upto: int, start: Tensor, lens: Tensor | None = None) -> Window:
        """A view of adjacent rows, cut after `upto` positions."""
        return Window(self.kv[:, rows, :, :upto].unbind(), start, lens)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give the target seat the first `length` tokens of the source."""
        self.kv[:, target, :, :length] = self.kv[:, source, :, :length]

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange two seats; the longer one holds `length` tokens."""
        kept = self.kv[:, a, :, :length].clone()
        self.copy(b, a, length)
        self.kv[:, b, :, :length] = kept


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

    def forward(self, x, delta, attend, updates):
        """x (B, T, d) the residual stream, delta the last layer's addition to it -> both after this layer."""
        c, eps = self.c, self.c.eps
        if delta is None:
            y = kernels.rms_norm(x, self.norm_1, eps)
        else:
            y, x = kernels.rms_norm(delta, self.norm_1, eps, residual=x)
        qkv = self.qkv(y, updates[0]).unflatten(-1, (-1, c.head_dim))  # (B, T, H + 2 KV, D)
        delta = self.out(attend(self, qkv).flatten(-2), updates[1])
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
        self.roles: dict[int, Adapter] = {}
        self.rotary()

    def rotary(self) -> None:
        """(Re)compute the cosines and sines, (context, head_dim / 2) in fp32, on the weights' device."""
        with torch.device("cpu"):
            angle = torch.arange(min(self.config.context, 32768)).float()[:, None] * frequencies(self.config)
        device = self.embed.device if self.embed.device.type != "meta" else "cpu"
        self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)

    @property
    def head(self) -> Tensor:
        """The output matrix (V, d)."""
        return self.embed if self.untied is None else self.untied

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    def forward(
        self,
        ids: Tensor,
        role: int | Tensor,
        lengths: Tensor | None = None,
        window: Window | None = None,
        lora: list[Update] | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """ids (B, T) -> hidden states (B, T, d) after the final norm.

        role: one for all rows, or (B,) one a row (needs `lora` from a `Stack`). lengths (B,): of right-padded
        rows. window: row b's tokens follow the window.start[b] tokens in the cache and are added there.
        recompute: keep only the layers' inputs for the backward pass (activation checkpointing).
        """
        updates = lora if lora is not None else self.updates(role)
        attends = self._alone(lengths) if window is None else self._cached(window, ids.size(1))
        x, delta = F.embedding(ids, self.embed), None  # (B, T, d)
        for i, (layer, attend) in enumerate(zip(self.layers, attends)):
            mine = updates[4 * i : 4 * i + 4]
            if recompute and torch.is_grad_enabled():
                x, delta = checkpoint(layer, x, delta, attend, mine, use_reentrant=False)
            else:
                x, delta = layer(x, delta, attend, mine)
        return kernels.rms_norm(delta, self.norm, self.config.eps, residual=x)[0]

    def _alone(self, lengths: Tensor | None) -> Iterator[Callable]:
        """For every layer: attention within the rows."""

        def attend(layer, qkv):
            q, k, v = layer.parts(qkv)
            q, k = kernels.rope(q, k, self.cos, self.sin)
            return kernels.attention(q, k, v, lengths)

        return repeat(attend)

    def _cached(self, w: Window, T: int) -> Iterator[Callable]:
        """For each layer: attention that first writes its T new keys and values into the layer's cache."""
        L = w.layers[0].size(2)
        place = kernels.Place(w.start, T, L, w.lens, self.cos, self.sin, self.dtype)

        def attend(cache, layer, qkv):
            if self.config.qk_norm:
                qkv = torch.cat(layer.parts(qkv), 2)
            q = kernels.rope_cache(qkv, cache, place)
            return kernels.cached_attention(q, *cache.chunk(2, 1), place)

        return (partial(attend, layer) for layer in w.layers)

    def logits(self, h: Tensor) -> Tensor:
        """h (..., d) -> (..., V)."""
        return product(h, self.head, self.packed_head)

    def pack(self, rows: int) -> None:
        """On a CPU: make packed copies of the matrices for sampling so many rows, where that pays (`packs`).

        In fp32 with 8 rows products are nearly 3 times as fast for a body of 135M; a tiny one gains nothing.
        """
        kind = kernels.fast_type(self.dtype, rows)
        done = self.packed_head is not None and self.packed_head.weight.dtype == kind
        if self.device.type != "cpu" or kind is None or done:
            return
        if not packs(sum(p.numel() for p in self.parameters()) * kind.itemsize):
            return
        for linear in self.linears():
            linear.packed = kernels.pack(linear.weight.data, linear.bias, kind)
        self.packed_head = kernels.pack(self.head.data, None, kind)

    # roles

    def linears(self) -> Iterator[Linear]:
        """Every matrix that LoRA adapts, four a layer."""
        return (linear for layer in self.layers for linear in layer.linears())

    def add_role(self, role: int, rank: int = 16, alpha: float = 32.0, seed: int = 0) -> None:
        """Give a role a new adapter: A uniform as in PEFT, B = 0, so that it equals the base exactly."""
        self.roles[role] = Adapter.fresh(list(self.linears()), rank, alpha, seed, self.device)

    def adapter(self, role: int) -> nn.Parameter:
        """The role's parameters, one flat fp32 vector. Raises KeyError where the role has no adapter."""
        return self.roles[role].theta

    def updates(self, role: int) -> list[Update | None]:
        """The LoRA updates of every linear for one role, differentiable in its adapter."""
        if role not in self.roles:
            return [None] * (4 * len(self.layers))
        adapter = self.roles[role]
        return [Update(A, B, adapter.scale) for A, B in adapter.pairs(list(self.linears()))]

    @torch.no_grad()
    def stacked(self, old: "Stack | None" = None) -> "Stack":
        """All roles' adapters in the type of the products, for decoding with one role a row.

        A copy: take a new one after the adapters have changed. An old one of the same scales, rank and type
        is overwritten in place, so that CUDA graphs go on reading it. Lower ranks are padded with zeros.
        """
        linears, roles = list(self.linears()), range(1, ROLES + 1)
        scales = [self.roles[r].scale if r in self.roles else 0.0 for r in roles]
        rank = max((a.rank for a in self.roles.values()), default=1)
        dtype = self.dtype if self.packed_head is None else self.packed_head.weight.dtype
        sizes = [(len(x.parts) * rank, x.d_in, x.weight.size(0)) for x in linears]
        A = None if old is None else old.pairs[0][0]
        if A is None or (old.scales, A.size(1), A.dtype) != (scales, sizes[0][0], dtype):
            zeros = partial(torch.zeros, dtype=dtype, device=self.device)
            pairs = [(zeros(ROLES, k, i), zeros(ROLES, k, o)) for k, i, o in sizes]
            scale = torch.tensor(scales, device=self.device)
            old = Stack(pairs, scales, scale, torch.tensor(roles, device=self.device))
        for role, adapter in self.roles.items():
            for (A, B), (a, b) in zip(old.pairs, adapter.pairs(linears)):
                A[role - 1, : len(a)], B[role - 1, : len(a)] = a, b.T
                A[role - 1, len(a) :] = 0  # an adapter that was here may have had a higher rank
        return old

    def init(self, seed: int, std: float = 0.02) -> "Model":
        """Random weights for a body that is to be trained from nothing."""
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
        """The updates for a batch: role (B,) one a row, or one for all rows (cheaper)."""
        if isinstance(role, Tensor) and any(self.scales):
            weight = torch.where(role[:, None] == self.roles, self.scale, 0.0)  # (B, R)
            return [Update(A, B, weight=weight) for A, B in self.pairs]
        if isinstance(role, Tensor) or role == REFERENCE or not self.scales[role - 1]:
            return [None] * len(self.pairs)
        return [Update(A[role - 1], B[role - 1].T, self.scales[role - 1]) for A, B in self.pairs]


# --------------------------------------------------------------------------------------------------- adapters


@dataclass
class Adapter:
    """One role's LoRA matrices in one flat fp32 vector: one operation to step, one tensor to save.

    A Linear of several parts has for each part its own A (rank, d_in) and B (part, rank), as in PEFT. Side by
    side the As are one matrix; the Bs make a block-diagonal one, so that every Linear needs two thin matmuls
    whatever its parts.
    """

    theta: nn.Parameter
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @staticmethod
    def fresh(linears: list[Linear], rank: int, alpha: float, seed: int, device: torch.device) -> "Adapter":
        size = sum(len(x.parts) * rank * x.d_in + rank * x.weight.size(0) for x in linears)
        adapter = Adapter(nn.Parameter(torch.zeros(size)), rank, alpha)
        g = torch.Generator().manual_seed(seed)
        for linear, (A, _) in zip(linears, adapter.pieces(linears)):
            A.data.uniform_(-(linear.d_in**-0.5), linear.d_in**-0.5, generator=g)
        adapter.theta.data = adapter.theta.data.to(device)
        return adapter

    def pieces(self, linears: list[Linear]) -> list[tuple[Tensor, list[Tensor]]]:
        """Views: for each Linear its As (parts * rank, d_in) and Bs (part, rank). One split, one backward."""
        sizes = [
            [len(x.parts) * self.rank * x.d_in] + [n * self.rank for n in x.parts.values()] for x in linears
        ]
        flat = iter(self.theta.split([n for group in sizes for n in group]))
        out = []
        for x in linears:
            A = next(flat).view(-1, x.d_in)
            out.append((A, [next(flat).view(n, self.rank) for n in x.parts.values()]))
        return out

    def pairs(self, linears: list[Linear]) -> list[tuple[Tensor, Tensor]]:
        """For each Linear: A (parts * rank, d_in) and the block-diagonal B (d_out, parts * rank)."""
        return [(A, Bs[0] if len(Bs) == 1 else torch.block_diag(*Bs)) for A, Bs in self.pieces(linears)]


def _peft_tensors(model: Model, adapter: Adapter) -> dict[str, Tensor]:
    """PEFT's names -> views of the adapter's vector."""
    out, pieces = {}, iter(adapter.pieces(list(model.linears())))
    for i, layer in enumerate(model.layers):
        for linear in layer.linears():
            A, Bs = next(pieces)
            for (part, _), a, b in zip(linear.parts.items(), A.split(adapter.rank), Bs):
                name = f"base_model.model.model.layers.{i}.{_home(part)}.{part}"
                out[name + ".lora_A.weight"], out[name + ".lora_B.weight"] = a.detach(), b.detach()
    return out


def _home(part: str) -> str:
    return "mlp" if part in ("gate_proj", "up_proj", "down_proj") else "self_attn"


def save_adapter(model: Model, role: int, path: str | Path, base: str = "") -> None:
    """Write a role's adapter in PEFT's format: adapter_config.json and adapter_model.safetensors."""
    path, adapter = Path(path), model.roles[role]
    path.mkdir(parents=True, exist_ok=True)
    parts = [part for linear in model.layers[0].linears() for part in linear.parts]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": parts,
        "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {k: v.cpu().contiguous() for k, v in _peft_tensors(model, adapter).items()}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model: Model, role: int, path: str | Path) -> None:
    """Read a PEFT LoRA adapter into a role. Modules that it does not adapt get B = 0.

    Raises ValueError where the adapter uses what this network does not implement, or does not fit the body.
    """
    path = Path(path)
    c = read_json(path / "adapter_config.json", "a PEFT adapter directory", r=int, lora_alpha=(int, float))
    for key in (
        "use_dora",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "fan_in_fan_out",
    ):
        if c.get(key):
            raise ValueError(f"{path}: the adapter sets {key}, which is not supported")
    if c.get("peft_type") != "LORA" or c.get("bias", "none") != "none":
        raise ValueError(f"{path}: only plain LoRA adapters without trained biases are supported")
    model.add_role(role, c["r"], c["lora_alpha"])
    mine = _peft_tensors(model, model.roles[role])
    for name, theirs in _read_safetensors(path / "adapter_model.safetensors"):
        if name not in mine:
            raise ValueError(f"{path}: {name} adapts a module that this body does not have")
        if theirs.shape != mine[name].shape:
            raise ValueError(
                f"{path}: {name} is {tuple(theirs.shape)}, the body needs {tuple(mine[name].shape)}"
            )
        mine[name].copy_(theirs)


# -------------------------------------------------------------------------------------------- weights on disk


def resolve(name: str | Path) -> Path:
    """A preset, a local directory or a hub id -> a local directory. Raises ValueError where there is none."""
    name = str(name)
    where = PRESETS.get(name, name)
    if Path(where).is_dir():
        return Path(where)
    if where.count("/") != 1 or where.startswith((".", "/", "~")):
        raise ValueError(
            f"no checkpoint {name!r}: give a directory, a hub id, or a preset: {' '.join(PRESETS)}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(where, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"])
        )
    except Exception as e:  # the hub client raises dozens of types, all of them "could not be had"
        reason = str(e).strip().splitlines()[0]
        raise ValueError(
            f"could not download {where!r}: {reason}. A local directory works without a network"
        ) from None


def machine(device: str | None, dtype: str | None) -> tuple[str, str]:
    """Names of device and type (a key of DTYPES): by default a GPU in bf16, else the CPU in fp32."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, dtype or ("fp32" if device == "cpu" else "bf16")


def load(name: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Model:
    """Load a body from a Hugging Face directory, strictly: every tensor must be there, fit, and be expected.

    Raises ValueError with one line that says what is wrong with the checkpoint.
    """
    path = resolve(name)
    config = Config.from_hf(read_json(path / "config.json", "a checkpoint directory"))
    with torch.device("meta"):
        model = Model(config)
    model = model.to(dtype).to_empty(device=device)
    if model.device.type == "cpu":  # where small products with matrices laid out this way are a third faster
        for linear in model.linears():
            linear.weight.data = linear.weight.data.t().contiguous().t()
    model.rotary()
    mine = hf_tensors(model)
    seen = set()
    for file in _shards(path):
        for tensor_name, theirs in _read_safetensors(file):
            if tensor_name not in mine:
                if _expected_extra(tensor_name, config):
                    continue
                raise ValueError(
                    f"{file}: unexpected tensor {tensor_name}: not a plain {config.family} checkpoint"
                )
            if theirs.shape != mine[tensor_name].shape:
                need = tuple(mine[tensor_name].shape)
                raise ValueError(
                    f"{file}: {tensor_name} is {tuple(theirs.shape)}, config.json implies {need}"
                )
            mine[tensor_name].copy_(theirs)
            seen.add(tensor_name)
    missing = sorted(set(mine) - seen)
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(mine)} tensors are missing, the first is {missing[0]}"
        )
    return model.eval()


def _expected_extra(name: str, c: Config) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (c.tied and name == "lm_head.weight")


def hf_tensors(model: Model) -> dict[str, Tensor]:
    """Hugging Face's names -> views of this body's tensors (fused matrices are cut into their parts)."""
    out = {"model.embed_tokens.weight": model.embed.data, "model.norm.weight": model.norm.data}
    if model.untied is not None:
        out["lm_head.weight"] = model.untied.data
    for i, layer in enumerate(model.layers):
        pre = f"model.layers.{i}."
        out[pre + "input_layernorm.weight"] = layer.norm_1.data
        out[pre + "post_attention_layernorm.weight"] = layer.norm_2.data
        if model.config.qk_norm:
            out[pre + "self_attn.q_norm.weight"] = layer.q_norm.data
            out[pre + "self_attn.k_norm.weight"] = layer.k_norm.data
        for linear in layer.linears():
            widths = list(linear.parts.values())
            for part, w in zip(linear.parts, linear.weight.data.split(widths)):
                out[f"{pre}{_home(part)}.{part}.weight"] = w
            if linear.bias is not None:
                for part, b in zip(linear.parts, linear.bias.data.split(widths)):
                    out[f"{pre}{_home(part)}.{part}.bias"] = b
    return out


def save_model(model: Model, path: str | Path) -> None:
    """Write config.json and model.safetensors as a Hugging Face directory."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(model.config.hf, indent=2) + "\n")
    tensors = {k: v.cpu().contiguous().clone() for k, v in hf_tensors(model).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _shards(path: Path) -> list[Path]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise ValueError(f"{path} holds neither model.safetensors nor model.safetensors.index.json")
    names = sorted(set(read_json(index, "a sharded checkpoint", weight_map=dict)["weight_map"].values()))
    absent = [n for n in names if not (path / n).exists()]
    if absent:
        raise ValueError(f"{path}: the shard {absent[0]} is missing: download the checkpoint again")
    return [path / n for n in names]


def _read_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if not file.exists():
        raise ValueError(f"{file} is missing")
    try:
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                yield name, f.get_tensor(name)
    except SafetensorError as e:
        raise ValueError(f"{file} is corrupt ({e}): download it again") from None


def read_json(file: Path, what: str, **needed: type | tuple[type, ...]) -> dict:
    """Read a JSON object. Raises ValueError that names the file and what it should belong to.

    needed: names that it must have, with the type of their values.
    """
    if not file.exists():
        raise ValueError(f"{file} does not exist: {file.parent} is not {what}")
    try:
        value = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{file} is not JSON ({e})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    for name, kind in needed.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f"{file} has no {name}, or not as it should be: is {file.parent} {what}?")
    return value


def write_json(file: Path, value: dict, errors: str = "strict") -> None:
    """Write a JSON object whole or not at all. errors: "replace" makes "?" of half a surrogate pair."""
    whole = file.with_name(f"{file.name}.tmp")
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    whole.write_text(text, encoding="utf-8", errors=errors)
    whole.replace(file)


class OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage. No flag may be shortened."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more, allow_abbrev=False)

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (python {self.prog} --help lists the flags)\n")


def command_line(main: Callable[[], None]) -> None:
    """Run a command: bad input (ValueError, OSError) is one line on stderr and exit code 2; Ctrl-C is 130."""
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
