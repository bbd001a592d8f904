"""A body in 8 and 4 bits, in all roles: against transformers with the same numbers, sampling against
training, what is held in memory while it loads, and the flags."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from test_kernel_quantised import dense
from test_model import checkpoint, ids, trained
from transformers import AutoModelForCausalLM, Qwen2Config

import grpo
import kernels
import weights
from bench.timing import Meter
from bench.work import Silent
from cli import flags, plan, setting
from engine import Engine
from kernels import quantised
from model import POLICY, REFERENCE, SIMULATOR
from rollout import Question, Trajectory, Turn

WIDE = dict(vocab_size=211, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
WIDE |= dict(
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=False
)


@pytest.fixture(params=["digits", "plain"])
def way(request, monkeypatch):
    """CPUs with fast products of 8 bits, and the others."""
    if request.param == "plain":
        monkeypatch.setattr(quantised, "can_pack", lambda: False)
        monkeypatch.setattr(kernels, "packs_bits", lambda: False)


@pytest.fixture
def wide(tmp_path):
    """A checkpoint whose widths suit 4 bits, and transformers' model of it."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(Qwen2Config(**WIDE)).eval()
    theirs.save_pretrained(tmp_path)
    return tmp_path, theirs


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_transformers_model_of_the_quantised_numbers(wide, way, monkeypatch, bits):
    """A part of a fused matrix in another's place, a lost scale or bias, a matrix that was not quantised."""
    path, theirs = wide
    mine, kept = weights.load(path, bits=bits), theirs.state_dict()
    monkeypatch.setattr(quantised, "can_pack", lambda: False)
    plain = weights.load(path, bits=bits)
    for i, layer in enumerate(plain.layers):
        for linear in layer.linears():
            rows = dense(linear.weight).float().split(list(linear.parts.values()))
            for part, W in zip(linear.parts, rows):
                home = "mlp" if "proj" in part and part[0] in "gud" else "self_attn"
                name = f"model.layers.{i}.{home}.{part}.weight"
                assert 1e-4 < (kept[name] - W).norm() / kept[name].norm() < (0.02 if bits == 8 else 0.15)
                kept[name].copy_(W)
    assert (kept["lm_head.weight"] - mine.head).norm() < 0.02 * mine.head.norm()  # in 8 bits, or as it was
    kept["lm_head.weight"].copy_(mine.head)
    theirs.load_state_dict(kept)
    x = ids(3, 37)
    with torch.no_grad():
        assert (mine.logits(mine(x, REFERENCE)) - theirs(x).logits).abs().max() < 1e-4
    assert mine.embed.dtype == torch.float32


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_sampling_and_training_are_one_distribution(wide, way, bits):
    """`gap` of a quantised body is that of any other: the engine, the learner and the KL's reference read the
    same numbers and round alike. Weights that only the sampler quantises would be .01 to .1 off; rounding of
    log-probs near 6 is about 1e-6, more or less of it with the machine's matmuls."""
    body = weights.load(wide[0], bits=bits)
    trained(body, POLICY, 3), trained(body, SIMULATOR, 4)
    engine = Engine({POLICY: (body, Silent()), SIMULATOR: (body, Silent())}, 6, 64)

    def talk(role, i):
        t = Trajectory(Question("", ()))
        t.add(said := list(range(20, 30 + i)))
        sampled = yield Turn(said, role, 20, 1.0, (), (i, role))
        t.add(sampled.ids, sampled.logps)
        return t

    for role in (POLICY, SIMULATOR):
        ts = engine.run([talk(role, i) for i in range(5)])
        (batch,) = grpo.make_batches(ts, [1.0] * 5, 1000)
        logp, _ = grpo.token_logps(body, batch, role)
        assert (logp - batch.old).abs().mean() < 1e-5
        with torch.no_grad():
            assert torch.equal(grpo.token_logps(body, batch, role)[0], logp)


def test_gradients_through_it_are_those_of_its_numbers(wide, way):
    """An adapter's gradient must be the one that a plain body of the same numbers gives."""
    body, plain = weights.load(wide[0], bits=8), weights.load(wide[0])
    for mine, other in zip(body.linears(), plain.linears()):
        W = mine.weight
        other.weight.data = W.integers().float() * W.scale[:, None]
    w = torch.randn(2, 9, 64)
    for one in (body, plain):
        trained(one, POLICY)
        (one(ids(2, 9), POLICY, recompute=one is body) * w).sum().backward()
    mine, want = (one.adapter(POLICY).grad for one in (body, plain))
    assert (mine - want).norm() / want.norm() < 1e-5


class Real(Meter):
    """Tensors on meta take no memory."""

    @staticmethod
    def storages(tree):
        return [x for x in Meter.storages(tree) if x[0].device.type != "meta"]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_whole_body_is_never_held(tmp_path, way, bits):
    """A 14B body in bf16 is 28 GB: loading it whole runs out of memory on the card that it is for."""
    torch.manual_seed(0)
    big = WIDE | dict(num_hidden_layers=12, hidden_size=128, intermediate_size=512)
    AutoModelForCausalLM.from_config(Qwen2Config(**big)).save_pretrained(tmp_path)
    with Real() as meter:
        body = weights.load(tmp_path, bits=bits)
    c = body.config
    s = plan.Settings(dtype=torch.float32, kernels=False)
    largest = 512 * 128 * 4
    assert meter.peak < plan.weights(c, s) + body.cos.nbytes * 2 + 14 * largest < plan.parameters(c) * 4
    held = sum(p.nbytes for p in body.parameters()) + sum(x.weight.nbytes for x in body.linears())
    packed = any(x.weight.packed is not None for x in body.linears())
    held += body.head_bits.nbytes if packed else 0
    expected = plan.weights(c, replace(s, kernels=not packed))
    assert c.bits == bits and held == expected < plan.parameters(c) * 4


def test_what_is_quantised_already_is_refused(wide):
    """Packed tensors of another program, read as if they were plain, are a body that says anything."""
    file = wide[0] / "config.json"
    for method in ("gptq", "awq", "bitsandbytes"):
        config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": method, "bits": 4}}
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"\({method}\).*quantised already.*--bits"):
            weights.load(wide[0], bits=8)


def test_widths_that_do_not_suit_4_bits(tmp_path):
    """A group cut by the end of a row: an error of one line, not a crash while loading."""
    checkpoint(tmp_path, "qwen2")
    with pytest.raises(ValueError, match="divisible by 64, not 48: use 8"):
        weights.load(tmp_path, bits=4)


def test_one_body_or_two(wide):
    """With --bits one copy plays all roles; --sim-bits is for a simulator with a checkpoint of its own."""
    a = Namespace(command="train", bits="8", sim_bits="4", device="cpu", dtype="fp32")
    assert (setting.bits_of(a, POLICY), setting.bits_of(a, SIMULATOR)) == (8, 4)
    a.sim_bits = ""
    assert setting.bits_of(a, SIMULATOR) == 8
    given = {"data": "toy", "sim-bits": "4"}
    for sim in ({}, {"sim": "self"}, {"sim": "http://127.0.0.1:1/v1"}):
        with pytest.raises(ValueError, match="--sim-bits is for a --sim that is a body of its own"):
            flags.settle("train", given | sim)
