"""A 3B model on a GPU: decoding, prefill, training and whole steps, as shares of what the GPU can do."""

import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from cache import Cache
from cli import plan
from kernels import linear_logp
from kernels.tools import measure
from model import POLICY, SIMULATOR, Adapter, Config, Model

from .growth import turn_seconds
from .timing import Row, Run, forget_peak, metered, peak, progress, timed
from .work import DEVICE, SMALL, Workload, engine, learner, random_body, threads

BF16 = torch.bfloat16


def gpu(p: Run) -> Iterator[Row]:
    """Random weights in the shape of Qwen2.5-3B, bf16. Without a GPU this is a dry run: shapes and bytes on
    the meta device, and the same code on the CPU with a small body."""
    c, small = plan.shape("3b"), replace(plan.shape("tiny"), vocab=512)
    if DEVICE == "cpu":
        yield from dry_run(replace(c, layers=2) if p.quick else c)
    body = random_body(small if DEVICE == "cpu" else c, BF16, DEVICE)
    least, most = ((1, 3), 16, 8, 2, 32), ((1, 32, 128, 320), 512, 128, 8, 1024)
    seats, context, tokens, batch, length = least if DEVICE == "cpu" else p.few(least, most)
    with threads(1):
        yield from decode_rows(body, seats, context, tokens)
        yield from pass_rows(body, batch, length)
        del body
        if DEVICE == "cpu":
            w = replace(SMALL, vocab=small.vocab)
            s = plan.Settings(6, w.context + 1, 64, True, dtype=BF16, kernels=False)
            yield step_row("a step, small body", small, w, s)
        else:
            yield from step_rows(p, c)


def decode_bytes(c: Config, seats: int, context: int, dtype: torch.dtype) -> int:
    """The bytes that one decode step must read: weights (not the embedding), both adapters, the cache."""
    unread = 0 if c.tied else c.vocab * c.d
    weights = plan.weights(c, plan.Settings(dtype=dtype))
    return (
        weights
        + (2 * sum(plan.blocks(c, 16)) - unread) * dtype.itemsize
        + seats * context * plan.cache_token(c, dtype)
    )


def share(name: str, rate: float, of: str) -> Row:
    """The row of a rate, as a share of this GPU's measured ceiling (on a CPU there is none)."""
    ceiling, (unit, scale) = measure.ceilings()[of], measure.UNITS[of]
    theirs = f"{ceiling / scale:,.1f} {unit}" if ceiling else "not measured"
    ratio = rate / ceiling if ceiling else None
    return Row(name, f"{rate / scale:,.3g} {unit}", theirs, ratio, note=f"share of a measured {of}")


def decode_rows(body: Model, seats: tuple[int, ...], context: int, tokens: int) -> Iterator[Row]:
    """The engine's tokens per second, and the memory bandwidth that it reaches: of a long turn less a short
    one, so that neither the prefill nor the turn's begin and end are in the figure."""
    for n in seats:
        progress("gpu", "decode", n, "seats")
        e = engine(body, n, context + tokens + 8)
        turn_seconds(e, n, context, 1, 4)  # compiles, records graphs
        few = tokens // 4
        spent = turn_seconds(e, n, context, 1, few), turn_seconds(e, n, context, 1, tokens)
        steps, span = tokens - few, max(spent[1] - spent[0], 1e-6)  # on a busy machine the short one may last
        rate = decode_bytes(body.config, n, context + (tokens + few) // 2, body.dtype) * steps / span
        name = f"decode, {n} seats, {context} cached tokens: {n * steps / span:,.0f} tok/s"
        yield share(name, rate, "copy")
        del e


def forward_flops(c: Config, rows: int, length: int) -> float:
    """Operations of a forward pass without the head: 2 per weight and token, and causal attention."""
    matrices = c.layers * sum(d_in * sum(parts) for d_in, parts in plan.linears(c))
    attention = c.layers * 4 * c.heads * c.head_dim * (length + 1) / 2  # a token's: q k, and p v
    return rows * length * (2 * matrices + attention)


def pass_rows(body: Model, rows: int, length: int) -> Iterator[Row]:
    """Prefill and training: operations per second. The base is frozen, so a backward costs a forward."""
    ids = torch.randint(1, body.config.vocab, (rows, length), device=body.device)

    def update(recompute: bool) -> None:
        body(ids, POLICY, recompute=recompute).sum().backward()

    passes = {"prefill": (torch.inference_mode()(partial(body, ids, POLICY)), 1)}
    passes["forward and backward"] = (partial(update, False), 2)
    passes["the same, activations computed again"] = (partial(update, True), 3)
    for name, (call, times) in passes.items():
        progress("gpu", name)
        call()
        span = statistics.median(timed(call) for _ in range(3))
        rate = times * forward_flops(body.config, rows, length) / span
        title = f"{name}, {rows} x {length} tokens: {rows * length / span:,.0f} tok/s"
        yield share(title, rate, "matmul")


def step_rows(p: Run, c: Config) -> Iterator[Row]:
    """The whole step of `--policy 3b --sim 3b`, with the plan for this GPU, and with the plan for 24 GiB."""
    w = p.few(Workload(2, 2, 32, 2, 4, 8, 16, 16), Workload(64, 5, vocab=c.vocab))
    card = torch.cuda.get_device_properties(0).total_memory / 2**30
    for gib in (g for g in (card, 24.0) if g <= card):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(gib / card)
        s, _ = plan.fit([c], gib * 2**30, plan.Settings(seat_tokens=w.context + 1), useful=2 * w.rows)
        yield step_row(f"a step of {w.questions} x {w.group} in {gib:.0f} GiB", c, w, s)
    torch.cuda.set_per_process_memory_fraction(1.0)


def step_row(name: str, c: Config, w: Workload, s: plan.Settings) -> Row:
    """Act and learn once: seconds of each, and the peak memory against the planner's."""
    progress("gpu", name, s)
    forget_peak()
    body = random_body(c, s.dtype, DEVICE)
    e = engine(body, s.seats, s.seat_tokens, (POLICY, SIMULATOR), prefill=s.micro_tokens, pages=s.pages)
    lent = e.pools[POLICY].cache.lent if s.lend else nullcontext
    ts = []
    acting = timed(lambda: ts.extend(w.act(e)))
    learning = timed(learner(body, ts, w.group, s.micro_tokens, recompute=bool(s.recompute), lent=lent))
    planned, real = plan.budget([c], s)["total"], peak()
    ours = f"act {acting:.3g} s ({w.decoded() / acting:,.0f} tok/s), learn {learning:.3g} s"
    note = f"peak {real / 2**30:.2f} GiB, planned {planned / 2**30:.2f}" if DEVICE == "cuda" else ""
    return Row(f"{name}: {s}", ours, note=note)


def dry_run(c: Config) -> Iterator[Row]:
    """On the meta device, which computes nothing: shapes and bytes of decode steps, the peak of training."""
    with torch.device("meta"):
        body = Model(c).to(BF16)
        body.cos, body.sin = (torch.empty(x.shape) for x in (body.cos, body.sin))
        for role in (POLICY, SIMULATOR):
            A_and_B = torch.nn.Parameter(torch.empty(plan.adapter(c, 16)))
            body.roles[role] = Adapter(A_and_B, rank=16, alpha=32.0)
    for seats in (1, 32, 128, 320):
        progress("gpu", "dry run", seats, "seats")
        cache = Cache(c, seats, 640, body.dtype, "meta")
        start = torch.empty(seats, dtype=torch.long, device="meta")
        window = cache.window(slice(0, seats), 640, start)
        h = body(start[:, None], start, window=window, lora=body.stacked().rows(start))
        assert h.shape == (seats, 1, c.d) and body.logits(h).shape == (seats, 1, c.vocab)
        planned = plan.cache([c], plan.Settings(seats, 640))
        assert planned == cache.kv.nbytes
        name = f"dry run, decode, {seats} seats, 512 cached tokens"
        note = f"meta; the cache of 640 tokens a seat has {planned / 2**30:.2f} GiB"
        yield Row(name, f"{decode_bytes(c, seats, 576, body.dtype) / 1e9:.2f} GB a step", note=note)
    # A micro-batch, through the references. Its rows are short: on meta alone, attention keeps T x T weights.
    ids = torch.empty(64, 32, dtype=torch.long, device="meta")

    def update(recompute: bool) -> None:
        h = body(ids, POLICY, recompute=recompute).flatten(0, 1)
        linear_logp(h, body.head, ids.flatten())[0].sum().backward()

    for recompute, how in ((False, "kept"), (True, "computed again")):
        progress("gpu", "dry run", "training")
        measured = metered(partial(update, recompute)).peak
        body.adapter(POLICY).grad = None
        s = plan.Settings(seat_tokens=2048, micro_tokens=2048, recompute=recompute, kernels=False)
        planned = sum(plan.learning(c, s).values())
        shown = (f"{measured / 2**30:.2f} GiB", f"planned {planned / 2**30:.2f} GiB")
        name = f"dry run, training, 2,048 tokens, activations {how}"
        yield Row(name, *shown, planned / measured, note="meta")
