"""The network against transformers and peft, which are the oracles, on small random checkpoints of each
family."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import model as M
import weights
from cache import Cache
from model import POLICY, REFERENCE, SIMULATOR

SMALL = dict(
    vocab_size=211,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
    rope_theta=500.0,
)
FAMILIES = {
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-untied": lambda: Qwen2Config(**SMALL, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "llama3-untied": lambda: LlamaConfig(**SMALL, rope_parameters=LLAMA3, tie_word_embeddings=False),
    "llama-linear": lambda: LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
}


def checkpoint(tmp_path, family, dtype=torch.float32, **save):
    """A random checkpoint of a family on disk, and transformers' model of it."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype).eval()
    for p in theirs.parameters():  # biases and norms are not trivial, as in a real checkpoint
        if p.dim() == 1:
            p.data += torch.randn_like(p) * 0.2
    theirs.save_pretrained(tmp_path, **save)
    return theirs


def ids(*shape, seed=1):
    return torch.randint(0, 211, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path, family):
    """A wrong rotary frequency, bias, norm, head or GQA grouping would move the logits."""
    theirs = checkpoint(tmp_path, family)
    mine, x = weights.load(tmp_path), ids(3, 37)
    with torch.no_grad():
        got, want = mine.logits(mine(x, REFERENCE)), theirs(x).logits
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["qwen2", "llama3-untied"])
def test_greedy_continuations_equal_transformers(tmp_path, family):
    """Decoding through the cache would drift from transformers' if a position or a cached key were off by
    one."""
    theirs = checkpoint(tmp_path, family)
    mine, x = weights.load(tmp_path), ids(2, 9)
    want = theirs.generate(x, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)[:, 9:]
    cache = Cache(mine.config, 2, 64, torch.float32, "cpu")
    got, new, length = [], x, 0
    for _ in range(24):
        start, lens = torch.full((2,), length), torch.full((2,), new.size(1))
        with torch.no_grad():
            h = mine(new, REFERENCE, window=cache.window(slice(0, 2), 64, start, lens))
        length += new.size(1)
        new = mine.logits(h[:, -1:]).argmax(-1)
        got.append(new)
    assert torch.equal(torch.cat(got, 1), want)


def test_bf16_and_shards(tmp_path):
    """A sharded bf16 checkpoint must load whole; rounding differently from Llama's would show in the
    logits."""
    theirs = checkpoint(tmp_path, "qwen2-untied", torch.bfloat16, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    mine, x = weights.load(tmp_path, torch.bfloat16), ids(2, 20)
    with torch.no_grad():
        got, want = mine.logits(mine(x, REFERENCE)).float(), theirs(x).logits.float()
    assert (got - want).norm() / want.norm() < 0.02
    up = weights.load(tmp_path, torch.float32)
    with torch.no_grad():
        assert (up.logits(up(x, REFERENCE)) - theirs.float()(x).logits).abs().max() < 1e-4


def trained(mine, role, seed=3, rank=4):
    """Give a role an adapter that does something."""
    mine.add_role(role, rank=rank, alpha=8)
    with torch.no_grad():
        mine.adapter(role).add_(
            torch.randn(mine.adapter(role).shape, generator=torch.Generator().manual_seed(seed)) * 0.1
        )


def test_adapters_that_lie_apart_again_are_read_there(tmp_path, monkeypatch):
    """Copies of A that were left below W would be multiplied in place of the ones that change."""
    checkpoint(tmp_path, "qwen2")
    mine = weights.load(tmp_path)
    trained(mine, POLICY, 3)
    for joined in (True, False):
        monkeypatch.setattr(M.kernels, "joins", lambda x, joined=joined: joined)
        stack = mine.stacked()
        trained(mine, POLICY, 4 + joined)
        stack = mine.stacked(stack)
    x, roles = torch.arange(5, 12)[None], torch.tensor([POLICY])
    with torch.no_grad():
        assert (mine(x, roles, lora=stack.rows(roles)) - mine(x, POLICY)).abs().max() < 1e-4


@pytest.mark.parametrize("bits, joined", [(0, False), (0, True), (8, True)])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama3-untied"])
def test_prefill_decode_and_extension_equal_the_full_pass(tmp_path, monkeypatch, family, bits, joined):
    """Ragged rows in the cache, rows of different roles, and stale keys of earlier tenants must change
    nothing; nor adapters that lie below the matrices, as on a GPU. A prefill that only feeds leaves the same
    cache."""
    monkeypatch.setattr(M.kernels, "joins", lambda x: joined)
    checkpoint(tmp_path, family)
    mine = weights.load(tmp_path, bits=bits)
    trained(mine, POLICY, 3), trained(mine, SIMULATOR, 4, rank=6)
    lengths, roles = [17, 23, 5, 30], torch.tensor([POLICY, SIMULATOR, REFERENCE, POLICY])
    x = ids(4, 30)
    with torch.no_grad():
        full = [mine(x[b : b + 1, :n], int(roles[b]))[0] for b, n in enumerate(lengths)]
        cache = Cache(mine.config, 6, 40, torch.float32, "cpu")
        cache.kv.normal_()  # what earlier tenants left
        stack, held = mine.stacked(), torch.zeros(4, dtype=torch.long)
        out = [[] for _ in lengths]
        for news in ([8, 3, 1, 20], [1, 1, 1, 1], [8, 19, 3, 9]):
            news = torch.tensor(news)
            block = torch.zeros(4, int(news.max()), dtype=torch.long)
            for b in range(4):
                block[b, : news[b]] = x[b, held[b] : held[b] + news[b]]
            where, before = (slice(1, 5), 40, held, news), cache.kv.clone()
            mine(block, roles, window=replace(cache.window(*where), feeds=True), lora=stack.rows(roles))
            fed = cache.kv.clone()
            cache.kv.copy_(before)
            h = mine(block, roles, window=cache.window(*where), lora=stack.rows(roles))
            assert torch.equal(cache.kv, fed) and not torch.equal(fed, before)
            for b in range(4):
                out[b].append(h[b, : news[b]])
            held = held + news
    assert all(bool(x.joined) == (joined and not bits) for x in mine.linears())
    for want, got in zip(full, out):
        assert (torch.cat(got) - want).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_packed_copies_change_nothing_but_rounding(tmp_path, monkeypatch, packable, rows, dtype):
    """Copies of another layout or type, biases and adapters with them, must give the products of the body.
    A CPU that cannot pack bf16 must not be asked to: it gets copies in fp32, or none.
    """
    checkpoint(tmp_path, "qwen2")
    bodies = [weights.load(tmp_path, t) for t in (torch.float64, dtype, dtype)]
    packed = bodies[2]
    monkeypatch.setattr(M, "packs", lambda size: True)
    packed.pack(3), packed.pack(rows)  # the second engine may have more seats than the first
    assert (packed.packed_head and packed.packed_head.weight.dtype) == M.kernels.fast_type(dtype, rows)
    x, roles = ids(rows, 1), torch.arange(rows) % 3
    out = []
    for body in bodies:
        trained(body, POLICY, 3), trained(body, SIMULATOR, 4, rank=6)
        for role in (roles, POLICY):  # one a row, and one for all
            with torch.inference_mode():
                window = Cache(body.config, rows, 8, body.dtype, "cpu").window(slice(0, rows), 1, roles * 0)
                h = body(x, role, window=window, lora=body.stacked().rows(role))
                assert h.dtype == body.dtype
                out.append(body.logits(h[:, 0]).double())
    for truth, plain, got in (out[0::2], out[1::2]):
        error, usual = got - truth, plain - truth
        if dtype == torch.float32:
            assert error.abs().max() < 1e-4
        else:  # two rounding errors of one size: their norms vary less than their maxima
            assert error.norm() < 1.5 * usual.norm()
    assert (out[0] - out[1]).abs().max() > 1e-2 or rows == 1  # the roles differ


@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_gradient_is_no_other_arithmetic(tmp_path, monkeypatch, packable, dtype, bits):
    """The KL reference and a held-out loss are taken without gradients: in another rounding (the packed
    copies') the KL of an untrained policy is not 0; and fp32 adapters meet a body of any type."""
    checkpoint(tmp_path, "qwen2")
    body = weights.load(tmp_path, dtype, bits=bits)
    body.add_role(POLICY, rank=4)
    monkeypatch.setattr(M, "packs", lambda size: True)
    body.pack(20)
    x = ids(2, 7)
    want = body(x, POLICY).detach()
    with torch.no_grad():
        reference, policy = body(x, REFERENCE), body(x, POLICY)
        assert torch.equal(reference, want) and torch.equal(policy, want)
        trained(body, POLICY)
        assert body(x, POLICY).dtype == dtype and not torch.equal(body(x, POLICY), want)


def test_logits_are_not_rounded_before_their_log_prob(monkeypatch):
    """On a GPU, bf16 logits made old log-probs .03 to .06 wrong: `gap` could show no error below that."""
    c = M.Config("qwen2", vocab=500, d=64, layers=1, heads=2, kv_heads=1, head_dim=32, ffn=64)
    body, h = M.Model(c).init(0, std=0.3).bfloat16(), torch.randn(5, 64).bfloat16()
    monkeypatch.setattr(M.kernels, "compiled", lambda x: True)
    monkeypatch.setattr(M.kernels, "mm_fp32", lambda a, b: a.float() @ b.float())
    want, _ = M.kernels.linear_logp(h, body.head, torch.arange(5))
    got = body.logits(h[:, None])[:, 0].log_softmax(-1).gather(1, torch.arange(5)[:, None])[:, 0]
    assert (got - want).abs().max() < 1e-4 < (body.logits(h).bfloat16() - body.logits(h)).abs().max()


def test_an_adapter_of_lower_rank_leaves_nothing_of_the_one_before(tmp_path):
    """A stack that is wide enough for the other role is kept, and with it what stood beyond the new rank."""
    checkpoint(tmp_path, "qwen2")
    body = weights.load(tmp_path)
    trained(body, POLICY, 3, rank=6), trained(body, SIMULATOR, 4, rank=6)
    old = body.stacked()
    trained(body, POLICY, 5, rank=3)
    body.roles[POLICY].alpha = 4.0  # the same scale
    new, fresh = body.stacked(old), body.stacked()
    assert new is old
    for a, b in zip(new.rows(torch.tensor([1, 2])), fresh.rows(torch.tensor([1, 2]))):
        x, y = torch.randn(2, 1, a.A.size(2)), torch.zeros(2, 1, a.B.size(2))
        update = [M.kernels.lora(y.clone(), x, u.A, u.B, u.weight) for u in (a, b)]
        assert torch.equal(*update) and update[0].abs().max() > 0


def test_adapters_below_the_matrices_are_seen_by_decoding_alone(tmp_path, monkeypatch):
    """A GPU's matrices have further rows. In a checkpoint they would be a wrong shape, in training another
    rounding; and a CUDA graph finds them, and the matrices, where they were when it was recorded."""
    checkpoint(tmp_path / "was", "qwen2")
    plain, body = weights.load(tmp_path / "was"), weights.load(tmp_path / "was")
    monkeypatch.setattr(M.kernels, "joins", lambda x: True)
    assert body.stacked() and not body.layers[0].qkv.joined  # without an adapter nothing is copied
    for mine in (plain, body):
        trained(mine, POLICY, 3, rank=3), trained(mine, SIMULATOR, 4, rank=2)
    with torch.inference_mode():
        body.stacked()  # a run whose adapters were given after its engine was made
    stack = body.stacked()
    for (A, _), x, y in zip(stack.pairs, body.linears(), plain.linears()):
        W, rows = x.joined[0], 6 * len(x.parts)
        assert x.weight.is_contiguous() and torch.equal(x.weight, y.weight) and not x.weight.is_inference()
        assert x.weight.data_ptr() == W.data_ptr() and len(W) == len(x.weight) + M.kernels.below(rows)
        assert torch.equal(W[len(x.weight) :][:rows].view_as(A), A) and not W[len(x.weight) + rows :].any()
        if x.bias is not None:
            assert torch.equal(x.bias, y.bias) and len(x.joined[1]) == len(W)
            assert not x.joined[1][len(x.bias) :].any()
    weights.save_model(body, tmp_path / "now")
    now, was = (weights.hf_tensors(weights.load(tmp_path / name)) for name in ("now", "was"))
    assert all(torch.equal(now[name], was[name]) for name in was)
    x, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.bool)
    for role in (REFERENCE, POLICY):
        a, b = (mine(x, role, chosen=mask) for mine in (body, plain))
        assert torch.allclose(a, b, atol=1e-5)
    a.sum().backward(), b.sum().backward()
    assert torch.allclose(body.adapter(POLICY).grad, plain.adapter(POLICY).grad, rtol=1e-3, atol=1e-4)

    places = [x.joined[0].data_ptr() for x in body.linears()]
    body.adapter(POLICY).data.mul_(2)
    before, place = stack.pairs[0][0].clone(), stack.pairs[0][0].data_ptr()
    assert body.stacked(stack) is stack and body.stacked().pairs[0][0].data_ptr() == place
    assert torch.allclose(stack.pairs[0][0][0], 2 * before[0])
    assert places == [x.joined[0].data_ptr() for x in body.linears()]
    trained(body, SIMULATOR, 4, rank=8)  # another engine makes more room, then as much as there was before
    wide, body.roles[SIMULATOR] = body.stacked(), plain.roles[SIMULATOR]
    again = body.stacked()
    assert wide.pairs[0][0].size(1) == 24 and again.pairs[0][0].size(1) == 9
    assert body.stacked(stack) is not stack and body.stacked(again) is again


def test_adapters_are_read_anew_in_the_type_of_the_products(tmp_path, monkeypatch):
    """An engine made before another packed the body in another type would multiply what cannot be."""
    checkpoint(tmp_path, "qwen2")
    body = weights.load(tmp_path, torch.bfloat16)
    trained(body, POLICY)
    monkeypatch.setattr(M, "packs", lambda size: True)
    if M.kernels.fast_type(torch.float32, 16) is None:
        pytest.skip("this build of torch has no packed products")
    few = torch.bfloat16 if M.kernels.fast_type(torch.bfloat16, 4) == torch.bfloat16 else None
    monkeypatch.setattr(M.kernels, "fast_type", lambda dtype, rows: torch.float32 if rows > 4 else few)
    body.pack(4)
    old = body.stacked()
    assert body.stacked(old) is old and old.pairs[0][0].dtype == torch.bfloat16
    body.pack(16)
    assert body.stacked(old).pairs[0][0].dtype == body.packed_head.weight.dtype == torch.float32


def test_padding_and_other_rows_change_nothing(tmp_path):
    """A right-padded row must give what it gives alone, whatever stands in its padding."""
    checkpoint(tmp_path, "qwen2")
    mine = weights.load(tmp_path)
    x, lengths = ids(2, 12), torch.tensor([12, 7])
    y = x.clone()
    y[1, 7:] = 5
    with torch.no_grad():
        a, b = mine(x, REFERENCE, lengths), mine(y, REFERENCE, lengths)
        alone = mine(x[1:, :7], REFERENCE)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1, :7], b[1, :7])
    assert (a[1:, :7] - alone).abs().max() < 1e-5


def test_a_fresh_role_is_the_base(tmp_path):
    """A new adapter that moved the output would make the first step's KL and ratio wrong."""
    checkpoint(tmp_path, "qwen2")
    mine = weights.load(tmp_path)
    mine.add_role(POLICY)
    assert torch.equal(mine(ids(2, 9), POLICY), mine(ids(2, 9), REFERENCE))


def test_only_the_adapter_gets_a_gradient(tmp_path):
    """Training must touch the role's vector, nothing else; and recomputation must give the same gradient."""
    checkpoint(tmp_path, "qwen2")
    mine = weights.load(tmp_path)
    trained(mine, POLICY), trained(mine, SIMULATOR)
    grads = []
    for recompute in (False, True):
        mine(ids(2, 9), POLICY, recompute=recompute).square().sum().backward()
        grads.append(mine.adapter(POLICY).grad.clone())
        mine.adapter(POLICY).grad = None
    assert grads[0].abs().sum() > 0 and torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-5)
    assert mine.adapter(SIMULATOR).grad is None and all(p.grad is None for p in mine.parameters())


def test_peft_reads_ours_and_we_read_theirs(tmp_path):
    """An adapter that peft or vLLM loads differently would not be the policy that was trained."""
    peft = pytest.importorskip("peft")
    theirs = checkpoint(tmp_path / "base", "qwen2")
    mine, x = weights.load(tmp_path / "base"), ids(2, 15)
    trained(mine, POLICY)
    weights.save_adapter(mine, POLICY, tmp_path / "adapter")
    with_ours = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    with torch.no_grad():
        got, want = mine.logits(mine(x, POLICY)), with_ours(x).logits
    assert (got - want).abs().max() < 1e-4
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"])
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    new = peft.get_peft_model(fresh, config)
    for name, p in new.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    new.save_pretrained(tmp_path / "new")
    weights.load_adapter(mine, SIMULATOR, tmp_path / "new")
    with torch.no_grad():
        got, want = mine.logits(mine(x, SIMULATOR)), new(x).logits
    assert (got - want).abs().max() < 1e-4


def test_save_and_load_round_trip(tmp_path):
    """A body written by save_model must be an ordinary checkpoint for transformers too."""
    checkpoint(tmp_path / "a", "qwen2")
    mine, x = weights.load(tmp_path / "a"), ids(1, 9)
    weights.save_model(mine, tmp_path / "b")
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tmp_path / "b")(x).logits
        assert (mine.logits(mine(x, REFERENCE)) - want).abs().max() < 1e-4


def edit(path, **changes):
    c = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(c | changes))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(model_type="mamba"), "mamba"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(use_sliding_window=True), "use_sliding_window"),
        (dict(rope_parameters=None, rope_scaling={"rope_type": "yarn", "factor": 4}), "yarn"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(num_hidden_layers=4), "missing"),
        (dict(num_hidden_layers=2), "unexpected tensor"),
        (dict(intermediate_size=96), "implies"),
    ],
)
def test_what_it_does_not_know_is_a_clear_error(tmp_path, change, words):
    """A guess at an unknown option would load a model that is silently wrong."""
    checkpoint(tmp_path, "qwen2")
    edit(tmp_path, **change)
    with pytest.raises(ValueError, match=words):
        weights.load(tmp_path)


def test_missing_and_corrupt_files(tmp_path):
    """A broken download must end in one line that names the file."""
    with pytest.raises(ValueError, match="preset"):
        weights.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="preset"):
        weights.load("4b")
    checkpoint(tmp_path, "qwen2")
    good = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="corrupt"):
        weights.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        weights.load(tmp_path)


@pytest.mark.parametrize("recompute", [False, True])
def test_chosen_tokens_are_as_in_the_whole(tmp_path, monkeypatch, recompute):
    """Log-probs of sampled tokens need nothing else of the last layer: it must leave the rest out, and give
    the same states and gradients. To compute a layer again, no random state need be saved: none draws."""
    checkpoint(tmp_path, "qwen3")
    mine, chosen = weights.load(tmp_path), ids(3, 9) % 3 == 0
    mine.add_role(POLICY, rank=4)
    mine.adapter(POLICY).data.add_(0.01)

    def states(pick, **more):
        mine.adapter(POLICY).grad = None
        h = pick(mine(ids(3, 9), POLICY, torch.tensor([9, 7, 8]), **more))
        h.square().sum().backward()
        return h.detach(), mine.adapter(POLICY).grad

    want, sizes, swiglu = states(lambda h: h[chosen]), [], M.kernels.swiglu
    monkeypatch.setattr(M.kernels, "swiglu", lambda x: sizes.append(x.shape[:-1].numel()) or swiglu(x))
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("a random state was saved"))
    got = states(lambda h: h, chosen=chosen, recompute=recompute)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert sizes[:3] == [27, 27, int(chosen.sum())]


@pytest.mark.parametrize(
    "name, text, read",
    [
        ("model.safetensors.index.json", '{"metadata": {}}', lambda path: weights._shards(path)),
        (
            "adapter_config.json",
            '{"peft_type": "LORA"}',
            lambda path: weights.load_adapter(None, POLICY, path),
        ),
        (
            "adapter_config.json",
            '{"r": "8", "lora_alpha": 16}',
            lambda path: weights.load_adapter(None, POLICY, path),
        ),
    ],
)
def test_json_that_lacks_what_is_needed_is_one_clear_line(tmp_path, name, text, read):
    """A file cut short or of another program would end in a KeyError, which tells a user nothing."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} has no (weight_map|r|lora_alpha), or not as it should be"):
        read(tmp_path)
