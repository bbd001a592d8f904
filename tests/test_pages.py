"""The cache in pages: random schedules against a plain loop, real arithmetic, refusals."""

import os
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import two_roles
from test_rollout import SHAPE, TOK, roam, wanderer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine as engine_file
import grpo
import kernels
from bench.counts import launching, on_meta
from cache import Cache, Pages
from cli import flags
from cli.setting import find_bodies, load
from engine import Engine, Pool
from model import POLICY, SIMULATOR, Config, Stack
from recipes import Objective
from rollout import Question, Trajectory, Turn
from tasks import kind
from train import act, ask

SCHEDULES = int(os.environ.get("SCHEDULES", "150"))  # SCHEDULES=10000 python -m pytest tests/test_pages.py
VOCAB, POISON = 32, 10**6


class Checksum:
    """A body whose next token is a checksum of all that the cache holds of a row, in order: one token that is
    missing, misplaced or somebody else's, and the row says something else."""

    device, dtype, roles = torch.device("cpu"), torch.int64, (POLICY, SIMULATOR)
    config = Config("qwen2", vocab=VOCAB, d=1, layers=1, heads=1, kv_heads=1, head_dim=2, ffn=1)
    cos = torch.zeros(512, 1)

    def pack(self, rows):
        pass

    def stacked(self, old):
        return Stack([], [1.0, 1.0], torch.ones(2), torch.arange(1, 3))

    @staticmethod
    def of(ids):
        return sum(i * (5 * at + 3) for at, i in enumerate(ids)) % VOCAB

    def __call__(self, ids, role, window, lora):
        (B, T), kv = ids.shape, window.layers[0]
        table = torch.arange(B)[:, None] if window.table is None else window.table
        lens = torch.full((B,), T) if window.lens is None else window.lens
        at, P = window.start[:, None] + torch.arange(T), kv.size(2)
        rows, tokens = (torch.arange(T) < lens[:, None]).nonzero().T
        slots = at[rows, tokens]
        kv[table[rows, slots // P], :, slots % P, 0] = ids[rows, tokens, None]
        history = kv[table][:, :, 0, :, 0].flatten(1)  # (B, all slots of a row)
        seen = torch.arange(history.size(1)) < (window.start + lens)[:, None]
        weighed = history * (5 * torch.arange(history.size(1)) + 3)
        return torch.where(seen, weighed, 0).sum(1)[:, None, None].expand(B, T, 1) % VOCAB

    def logits(self, h):
        return 99.0 * torch.nn.functional.one_hot(h[:, 0], VOCAB)


class Numbers:
    """A tokenizer of numbers, without ends or stops."""

    eos = frozenset()

    def token_bytes(self, i):
        return b""

    def decode(self, ids):
        return ""


def talker(rng, capacity, stems, two_roles, log):
    """An episode: turns in its seat, documents between them. It notes what each turn should have said."""

    def expect(held, limit):
        out = []
        for _ in range(min(limit, capacity - len(held))):
            out.append(Checksum.of(held + out))
        return out

    held, context = [], object()
    given = rng.choice(stems)[: rng.randint(1, 12)]
    while len(held) + len(given) < capacity - 1 and rng.random() < 0.85:
        limit, before = rng.randint(1, 9), held + given
        sampled = yield Turn(given, POLICY, limit, 0.0, (), (0,), context)
        held = before + sampled.ids
        log.append((sampled.ids, expect(before, limit)))
        given = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 5))]
        if rng.random() < 0.6 and two_roles:
            prompt = rng.choice(stems)[: rng.randint(1, min(20, capacity - 2))]
            documents = yield Turn(prompt, SIMULATOR, (limit := rng.randint(1, 9)), 0.0, (), (0,))
            log.append((documents.ids, expect(prompt, limit)))
    return True


def schedule(seed, log):
    """A random pool, random episodes. Returns the engine when all have come to their ends."""
    rng, body, tok = random.Random(seed), Checksum(), Numbers()
    page, two_roles = rng.choice((1, 2, 3, 4, 8)), rng.random() < 0.8
    capacity, seats = rng.randint(max(14, page + 1), 40), rng.randint(2, 9)
    least = -(-capacity // page)
    pages = rng.choice((least, least + 1, rng.randint(least, seats * least)))
    bodies = {role: (body, tok) for role in (POLICY, SIMULATOR)[: 1 + two_roles]}
    engine = Engine(bodies, seats, capacity, rng.choice((16, 8192)), pages, page)
    engine.pools[POLICY].patience = rng.choice((0, 0, 2))
    stems = [[rng.randrange(VOCAB) for _ in range(20)] for _ in range(2)]
    stems.append(stems[0][:7] + stems[1])
    episodes = [
        talker(random.Random(f"{seed} {i}"), capacity, stems, two_roles, log)
        for i in range(rng.randint(1, 12))
    ]
    assert all(engine.run(episodes))
    return engine


@pytest.fixture
def watched(monkeypatch):
    """A page that nobody has any more holds what no token is; the oldest episode that decodes goes on."""
    drop, preempt = Pages.drop, Pool.preempt

    def emptied(cache, seat):
        before = set(cache.free)
        drop(cache, seat)
        cache.kv[:, sorted(set(cache.free) - before)] = POISON

    def younger(pool, stats):
        oldest = min(pool.rows[: pool.busy], key=lambda seat: seat.job.index, default=None)
        preempt(pool, stats)
        assert oldest is None or oldest in pool.rows[: pool.busy], "no turn is sure to end"

    monkeypatch.setattr(Pages, "drop", emptied)
    monkeypatch.setattr(Pool, "preempt", younger)


def test_any_schedule_comes_to_its_end_and_says_what_it_should(monkeypatch, watched):
    """Pools of a few pages, down to one seat's: none may deadlock, no page may be lost, be two seats' or be
    freed while it is read, and a seat that lost its pages must say what it would have said."""
    preempted = shared = 0
    for seed in range(SCHEDULES):
        log = []
        monkeypatch.setattr(engine_file, "PAGE", random.Random(seed).choice((1, 2, 3, 4, 8)))
        engine = schedule(seed, log)
        cache, stats = engine.pools[POLICY].cache, engine.stats
        assert all(got == want for got, want in log), f"schedule {seed}"
        assert sorted(cache.free) == list(range(len(cache.owners))) and not any(cache.owners), (
            f"schedule {seed}"
        )
        preempted, shared = preempted + stats.preempted, shared + stats.shared
    assert preempted > SCHEDULES / 2 and shared > SCHEDULES


@pytest.fixture(scope="module")
def body():
    """A random body whose two roles differ."""
    return two_roles(SHAPE)


@pytest.mark.parametrize("seats", [3, 64])
@pytest.mark.parametrize("page", [7, 64])
@pytest.mark.parametrize("few", [False, True])
def test_pages_change_no_result(body, watched, capsys, seats, page, few):
    """Where a token's keys lie, who shares them, and who had to be fed again is only memory: trajectories are
    those of whole seats (fp32), their log-probs but for the order of sums."""
    want, _ = roam(body, 64)
    pages = -(-400 // page) if few else 0
    got, stats = roam(body, seats, page=page, pages=pages)
    assert [g[0] for g in got] == [w[0] for w in want]
    pairs = [(a, b) for g, w in zip(got, want) for a, b in zip(g[1], w[1]) if a is not None]
    assert max(abs(a - b) for a, b in pairs) < 1e-4
    assert stats.shared > 0 and (stats.preempted > 0) == (few and seats == 64)
    said = f"the cache was full: {stats.preempted} times a seat lost its pages" in capsys.readouterr().out
    assert said == (stats.preempted > 0)


@pytest.fixture(scope="module")
def toy():
    """A step of `python train.py`, 8 x 5 episodes, and its trajectories in whole seats."""
    a = flags.settle("train", {"questions": 8, "group": 5})
    task = kind(a.task)(a)
    questions = task.to_train()[0]
    s = load(a, task, questions, find_bodies(a))
    for role in (POLICY, SIMULATOR):
        g = torch.Generator().manual_seed(role)
        theta = s.engine.pools[role].model.adapter(role)
        theta.data += torch.randn(theta.shape, generator=g) * 0.003
    asked = ask(a, questions, 3)
    return a, s, asked, act(a, s, 3, asked)


@pytest.mark.parametrize("seats", [3, 64])
@pytest.mark.parametrize("page, pages", [(16, 0), (64, 0), (8, 32)])
def test_a_step_of_the_toy_run_is_the_same_in_pages(toy, seats, page, pages):
    """The toy's body, words, stops and simulator: what is sampled, searched and answered must not change by a
    token (fp32), nor its log-probs by more than the order of a sum."""
    a, s, asked, want = toy
    pool = s.engine.pools[POLICY]
    bodies = {role: (pool.model, pool.tok) for role in (POLICY, SIMULATOR)}
    engine = Engine(bodies, seats, a.seat_tokens, a.micro_tokens, pages, page)
    got = act(a, replace(s, engine=engine), 3, asked)
    for g, w in zip(got, want, strict=True):
        assert (g.ids, g.mask, g.answer, g.end) == (w.ids, w.mask, w.answer, w.end)
        assert max(abs(x - y) for x, y in zip(g.logps, w.logps)) < 1e-4
    assert sum(len(t.searches) for t in got) > 3 and engine.stats.shared > 0
    assert (engine.stats.preempted > 0) == (pages > 0 and seats == 64)


def test_a_seat_has_pages_for_what_it_holds(body, monkeypatch):
    """A seat that has its longest episode's from the start leaves nine tenths of the cache empty."""
    most, step = [0], Pool.step

    def counted(pool, stats):
        held = {page for row, n in zip(pool.cache.rows, pool.cache.held) for page in row[:n]}
        holding = {id(s): s.fed + 1 for s in pool.rows if s}
        assert len(held) + len(pool.cache.free) == 64 * 50  # none is lost
        assert all(0 <= s.room - s.fed <= 8 + 1 for s in pool.rows[: pool.busy])
        most[0] = max(most[0], len(held))
        return step(pool, stats) if holding else []

    monkeypatch.setattr(Pool, "step", counted)
    roam(body, 64, page=8)
    assert 12 * 2 < most[0] < 12 * 30  # of 64 x 50


def test_a_pool_that_cannot_hold_one_seat_is_refused(body):
    """It would wait for pages that never come."""
    message = "6 pages of 64 tokens hold 384, but a single seat may need 400: lower --seat-tokens"
    with pytest.raises(ValueError, match=message):
        Engine({POLICY: (body, TOK)}, 8, 400, pages=6, page=64)
    assert len(Engine({POLICY: (body, TOK)}, 8, 400, pages=7, page=64).pools[POLICY].cache.free) == 7
    assert len(Engine({POLICY: (body, TOK)}, 2, 400, pages=999, page=64).pools[POLICY].cache.free) == 14
    assert isinstance(Engine({POLICY: (body, TOK)}, 2, 400, pages=9).pools[POLICY].cache, Pages)  # as planned
    assert not isinstance(Engine({POLICY: (body, TOK)}, 2, 400).pools[POLICY].cache, Pages)


def test_two_seats_share_full_pages_and_no_others():
    """A shared page that somebody writes would change what the other has read."""
    cache = Pages(SHAPE, 4, 100, torch.float32, "cpu", pages=20, page=8)
    cache.grow(0, 21)
    cache.kv.normal_()
    cache.share(0, 1, 20)
    assert cache.grow(1, 21) == 24 and cache.held[:2] == [3, 3] and len(cache.free) == 16
    a, b = cache.rows[:2, :3].tolist()
    assert a[:2] == b[:2] and a[2] != b[2]
    assert torch.equal(cache.kv[:, a[2], :, :4], cache.kv[:, b[2], :, :4])
    cache.share(0, 2, 16)
    assert cache.held[2] == 2 and len(cache.free) == 16
    cache.swap(1, 3, 20, 0)
    cache.drop(0)
    assert cache.rows[3, :3].tolist() == b and len(cache.free) == 17
    cache.drop(3)
    assert len(cache.free) == 18 and not set(a[:2]) & set(cache.free)
    cache.drop(2)
    assert sorted(cache.free) == list(range(20))


def test_whole_seats_are_moved_and_shared_as_pages_are():
    """On a CPU the same calls copy."""
    cache = Cache(SHAPE, 3, 10, torch.float32, "cpu")
    cache.kv.normal_()
    before = cache.kv.clone()
    cache.swap(0, 2, 4, 7)
    assert torch.equal(cache.kv[:, 2, :, :4], before[:, 0, :, :4])
    assert torch.equal(cache.kv[:, 0, :, :7], before[:, 2, :, :7])
    cache.swap(2, 1, 4, 0)
    cache.share(1, 2, 3)
    assert torch.equal(cache.kv[:, 1, :, :4], before[:, 0, :, :4])
    assert torch.equal(cache.kv[:, 2, :, :3], before[:, 0, :, :3])


class Graph:
    """A CUDA graph that runs `decode` at replay, on the tensors that it was given when it was captured."""

    captured = 0

    def pool(self):
        return None

    def replay(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pages, "update", lambda cache: None)  # a graph copies nothing from the host
            self.decode(*self.given)


@contextmanager
def capturing(graph, pool=None):
    """Nothing is computed while a graph is captured."""
    Graph.captured += 1
    graph.decode = Pool.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "decode", lambda *given: setattr(graph, "given", given))
        yield


@pytest.mark.parametrize("joined", [False, True])
def test_a_graph_that_is_replayed_is_the_eager_step(monkeypatch, watched, joined):
    """What the host decides at capture (rows of the table, roles, stops, adapters) stays as it was then: a
    run from graphs must be the run without, when pages move, when seats are preempted, and when the adapters
    have changed since (`joined`: those that lie below the matrices)."""
    body = two_roles(SHAPE)
    monkeypatch.setattr(Graph, "captured", 0)

    def twice(seats, **more):
        engine, out = Engine({POLICY: (body, TOK), SIMULATOR: (body, TOK)}, seats, 200, **more), []
        for factor in (4, 1 / 4):
            out.append([ids for ids, _ in engine.run([wanderer(i, i) for i in range(12)])])
            with torch.no_grad():
                body.adapter(POLICY).mul_(factor)
        return engine, out

    _, want = twice(64)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "joins", lambda x: joined)
        patch.setattr(kernels, "compiled", lambda x: True)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", capturing)
        engine, got = twice(9, pages=25, page=8)
    assert got == want and want[0] != want[1] and joined == bool(body.layers[0].out.joined)
    assert engine.stats.preempted and 3 < Graph.captured < 12


class Captured(TorchDispatchMode):
    """Complains of what a CUDA graph cannot hold: a wait for the host, a host's tensor, memory of others."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "record_stream")

    def __init__(self, pool):
        super().__init__()
        body, stack = pool.model, pool.stack
        lasting = [*body.parameters(), body.cos, body.sin, pool.cache.kv, pool.cache.table, pool.numbers]
        lasting += [pool.temperature, pool.due, pool.u, pool.ids, pool.logps, pool.closers]
        lasting += [*(x for pair in stack.pairs for x in pair), stack.scale, stack.roles]
        self.known = {x.untyped_storage()._cdata for x in lasting}
        self.kept, self.count = [], 0

    def look(self, x, name):
        if isinstance(x, torch.Tensor):
            assert x.device.type == "meta", f"{name}: a tensor of the host"
            assert x.untyped_storage()._cdata in self.known, f"{name}: memory that the graph does not own"

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f._schema.name.removeprefix("aten::")
        assert name not in self.WAITS, f"{name} waits for the device"
        for x in tree_leaves((args, kwargs)):
            self.look(x, name)
        out = f(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                assert x.device.type == "meta", f"{name} makes a tensor of the host"
                self.known.add(x.untyped_storage()._cdata)
                self.kept.append(x)  # so that no other storage gets its address
        return out

    def launch(self, *args, **options):
        self.count += 1
        for x in (*args, *options.values()):
            self.look(x, "a launch")


def test_a_step_can_be_captured():
    """The step that a GPU captures, with the kernels' own wrappers on tensors without memory. A host's number
    in a tensor, a value fetched, a buffer made before the capture: a replay would read what it was then."""
    pytest.importorskip("triton")
    pool = on_meta(Config("qwen2", 256, 64, 2, 4, 2, 32, 96, context=4096), 16)
    watch = Captured(pool)
    with launching(watch.launch), torch.no_grad(), watch:
        pool.decode(16, pool.capacity, pool.role[:16], pool.on[:16])
    assert watch.count > 2 * 10
    assert all(x.joined[0].data_ptr() == x.weight.data_ptr() for x in pool.model.linears())
    stale = torch.ones(16, dtype=torch.long, device="meta")
    watch = Captured(pool)
    with pytest.raises(AssertionError, match="does not own"), launching(watch.launch), torch.no_grad(), watch:
        pool.decode(16, pool.capacity, pool.role[:16], stale)


@pytest.mark.parametrize("pages, page", [(64, 64), (3, 16), (1, 1)])
def test_activations_in_the_cache_are_those_that_were_kept(body, pages, page):
    """Learning where the cache lies, wholly, in part or not at all: the update is the same but for rounding
    (a copy has other strides), whatever stood there."""
    ts = []
    for n in range(4):
        ts.append(Trajectory(Question("", ())))
        ts[-1].add(list(range(1, 9 + n)))
        ts[-1].add(list(range(20, 30)), [-1.0] * 10)
    cache = Pages(SHAPE, 4, page * pages, torch.float32, "cpu", pages, page)
    cache.kv.fill_(float("nan"))
    theta, after = body.adapter(POLICY), []
    before = theta.detach().clone()
    for more in ((), (cache.lent,)):
        batches = grpo.make_batches(ts, [1.0, -1.0, 0.5, 0.1], 40)
        o, optimizer = Objective(kl=0.1), torch.optim.SGD([theta], lr=0.1)
        grpo.learn(body, batches, optimizer, o, False, *more)
        after.append(theta.detach().clone())
        theta.data.copy_(before)
    gap = (after[0] - after[1]).abs().max() / (after[0] - before).abs().max()
    assert gap < 1e-6, gap
    assert cache.kv.isfinite().any()
