"""What the interpreter cannot show: real shapes, CUDA graphs, the whole network compiled. Needs a GPU.

There every kernel test runs on the device too, compiled (see conftest.py): `python -m pytest -m gpu`.
"""

import pytest
import torch

from kernels.tools import measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MODULES = dict(measure.modules())
ONE_LAUNCH_AFTER_ANOTHER = ("cached_attention", "lora", "rms_norm", "rope_cache", "sample", "swiglu")


def cases(file: str, model: str):
    """The benchmark's calls, with the same numbers each time."""
    torch.manual_seed(0)
    return MODULES[file].cases(measure.MODELS[model], "cuda")


@pytest.mark.parametrize("file", [file for file in measure.FILES if file != "sample"])
def test_real_shapes_equal_the_reference(file):
    """Offsets beyond 2^31, a launch too large, blocks that only long rows reach: toy shapes have none."""
    for case in cases(file, "Qwen2.5-0.5B"):
        assert measure.error(case) <= 1e-2, case.name  # both sides round to bf16


@pytest.mark.parametrize("file", ONE_LAUNCH_AFTER_ANOTHER)
def test_decoding_fits_a_graph(file):
    """The engine replays its launches: one that waits for the device, or sizes itself by data, cannot be."""
    for case in cases(file, "toy"):
        if "backward" in case.name:
            continue
        eager = measure.tensors(case.run())  # compiles, which a capture may not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = measure.tensors(case.run())
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True)), case.name


def test_a_graph_serves_rows_of_any_length():
    """Captured while the seats are nearly empty, replayed when they are full: the grid must cover both."""
    from kernels.cached_attention import cached_attention_torch, cached_attention_triton
    from kernels.place import Place

    torch.manual_seed(0)
    q, cache = torch.randn(3, 1, 8, 64, device="cuda"), torch.randn(40, 4, 64, 64, device="cuda")
    table = torch.randperm(40, dtype=torch.int32, device="cuda")[:33].view(3, 11)
    start, on = torch.tensor([0, 1, 5], device="cuda"), torch.ones(3, dtype=torch.long, device="cuda")
    place = Place(start, 1, 704, on, table=table)
    cached_attention_triton(q, cache, place)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = cached_attention_triton(q, cache, place)
    start.copy_(torch.tensor([699, 300, 0]))
    table.copy_(table.flip(0))  # rows moved, too
    graph.replay()
    at = Place(start, 1, 704, on, dtype=torch.float64, table=table)
    want = cached_attention_torch(q.double(), cache.double(), at)
    assert measure.relative_rms(o, want) <= 1e-5


def test_logits_are_not_rounded_to_the_type_of_the_body():
    """Rounded to bf16, old log-probs are off by .03 to .06, and so is every ratio at the start."""
    from model import Config, Model

    c = Config("qwen2", vocab=5000, d=256, layers=1, heads=4, kv_heads=2, head_dim=64, ffn=64)
    body = Model(c).init(0, std=0.3).to("cuda", torch.bfloat16)
    h = torch.randn(7, 1, 256, device="cuda", dtype=torch.bfloat16)
    z = body.logits(h)
    assert z.dtype == torch.float32 and measure.relative_rms(z, h.double() @ body.head.double().T) <= 1e-5


@pytest.mark.parametrize("file", ["attention", "linear_logp", "rms_norm", "rope", "swiglu"])
def test_twice_the_same_bits(file):
    """Programs that run at once, in an order of their own, must not change a gradient by a bit."""
    for case in cases(file, "Qwen2.5-0.5B"):
        once, again = (measure.tensors(case.run()) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True)), case.name


def test_sampling_of_real_vocabularies():
    """Sums of 151,936 words in another order move a boundary now and then: a neighbour is no error."""
    from kernels.sample import sample_torch, sample_triton

    torch.manual_seed(0)
    logits = 3 * torch.randn(512, 151936, device="cuda", dtype=torch.bfloat16)
    u, tau = torch.rand(512, device="cuda"), torch.ones(512, device="cuda")
    (mine, logp), (theirs, want) = (f(logits, u, tau) for f in (sample_triton, sample_torch))
    same = mine == theirs
    assert same.float().mean() > 0.95 and (logp - want)[same].abs().max() < 1e-4


def test_the_engine_in_graphs_says_what_it_says_without(monkeypatch):
    """Rows beyond the busy ones, addresses that changed since the recording, adapters that were trained in
    between: each would make the episodes of a replayed graph other ones."""
    from engine import Engine, Pool
    from model import POLICY, SIMULATOR, Config, Model
    from rollout import Turn

    shape = Config("qwen2", 300, 64, 2, 4, 2, 32, 96, context=512)
    body = Model(shape).init(0, std=0.3).cuda()
    body.rotary()
    for role in (POLICY, SIMULATOR):
        body.add_role(role, 8, 16.0, role)

    class Silent:
        eos = frozenset()

        def token_bytes(self, i):
            return b""

        def decode(self, ids):
            return ""

    def talk(n):
        context, said = object(), []
        for call in range(3):
            given = [n + call + 1] * (5 + n)
            policy = yield Turn(given, POLICY, 3 + n % 5, 1.0, (), (n, call, 1), context)
            other = yield Turn(given + policy.ids, SIMULATOR, 4, 0.8, (), (n, call, 2))
            said += policy.ids + other.ids
        return said

    def eager(pool, n):
        pool.decode(n, pool.capacity, pool.role[:n], pool.on[:n])

    engine, replay = Engine({r: (body, Silent()) for r in (POLICY, SIMULATOR)}, 7, 128), Pool.replay
    for seed in (1, 2):  # the second time the graphs are there, and the adapters are others
        for role in (POLICY, SIMULATOR):
            noise = torch.randn(body.adapter(role).shape, generator=torch.Generator().manual_seed(seed))
            body.adapter(role).data += 0.05 * noise.cuda()
        monkeypatch.setattr(Pool, "replay", replay)
        graphs = engine.run(map(talk, range(12)))
        monkeypatch.setattr(Pool, "replay", eager)
        assert graphs == engine.run(map(talk, range(12)))
    assert all(x.joined[0].data_ptr() == x.weight.data_ptr() for x in body.linears())
