"""The bench runs, and its arithmetic is right: a wrong figure would be believed."""

import re
import time
from dataclasses import replace
from functools import partial

import plan
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import kernels
import model as models
from bench import Lesson, Meter, Row, Run, Silent, Workload
from kernels import linear_logp
from model import POLICY, REFERENCE, SIMULATOR, Config, Model, command_line
from rollout import Engine

QUICK = Run(quick=True)
SHAPE = Config("qwen2", vocab=128, d=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, context=512)


@pytest.fixture(scope="module")
def body():
    return bench.two_roles(Model(SHAPE).init(0, std=0.3), rank=4)


class Counting:
    """In transformers' place: says 5 for ever, and remembers what it was fed."""

    dtype = torch.bfloat16

    def __init__(self):
        self.fed = []

    def generate(self, ids, attention_mask, max_new_tokens, **how):
        self.fed.append((int(attention_mask.sum()), max_new_tokens))
        return torch.cat((ids, torch.full((len(ids), max_new_tokens), 5)), 1)


def fails(capsys, *argv):
    """The one line that a command prints when it exits with 2."""
    with pytest.raises(SystemExit) as stop:
        command_line(partial(bench.main, argv))
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and err.startswith("error: ") and "\n" not in err
    return err


# ------------------------------------------------------------------------------------------------- arithmetic


def test_a_power_law_is_found():
    """An exponent that is off by one would call a quadratic cost linear."""
    sizes = [3, 8, 20, 90]
    assert abs(bench.exponent(sizes, [5 * n**1.7 for n in sizes]) - 1.7) < 1e-9
    row = bench.grows("x", sizes, [0.002 * n for n in sizes], "seconds")
    assert abs(row.ratio - 1) < 1e-9 and row.ours == "6 16 40 180 ms"
    assert abs(bench.grows("x", [1, 2], [4.0, 16.0], "bytes", [2, 8]).ratio - 1) < 1e-9


def test_a_ratio_is_theirs_over_ours_pair_by_pair():
    """Upside down, a slow engine would look fast; of medians alone, the spread would mean nothing."""
    row = bench.versus("x", ([1.0, 2.0, 4.0], [3.0, 8.0, 4.0]), tokens=8)
    assert (row.ratio, row.spread) == (3.0, (1.0, 4.0))
    assert (row.ours, row.theirs) == ("4 tok/s", "2 tok/s")
    assert row.cells() == ("x", "4 tok/s", "2 tok/s", "3.00", "1.00 to 4.00", "")


def test_the_two_take_turns():
    """Ten runs of one and then ten of the other measure the machine's mood, not the programs."""
    said = []
    ours, theirs = (lambda: said.append("ours"), lambda: said.append("theirs"))
    spans = bench.alternate(Run(seconds=0), ours, theirs)
    assert said == ["ours", "theirs"] * 2 and len(spans[0]) == len(spans[1]) == 2


def test_the_meter_counts_what_lives():
    """Peak memory is the claim of half the table: views are not memory, what is freed is free again."""
    with Meter() as meter:
        a = torch.zeros(1000)
        b = a.view(10, 100)[3:].T
        assert meter.live == 4000
        c = a + 1
        del a, b
        assert meter.live == 4000 and meter.peak == 8000
        x = torch.zeros(50, 60, requires_grad=True)
        (x * 2).relu_().sum().backward()
        del c
    assert meter.largest_shape == (50, 60) and meter.largest == 12000
    assert meter.live == 24000  # x and its gradient
    assert meter.peak >= 4000 + 3 * 12000


def test_the_meter_passes_over_packed_copies(monkeypatch):
    """They have no storage that could be asked for its size: a real body's peak would be a traceback."""
    body = Model(SHAPE).init(0)
    monkeypatch.setattr(models, "packs", lambda size: True)
    with Meter() as meter, torch.inference_mode():
        body.pack(4)
        body.logits(torch.ones(4, SHAPE.d))
    assert meter.peak > 0


def test_the_peak_of_the_process_is_seen():
    """A peak that was there before the step, or is missed within it, would be charged to the wrong side."""
    if not bench.resident()[0] or torch.cuda.is_available():
        pytest.skip("no /proc, or a GPU")
    big = torch.ones(1 << 26)
    del big
    base = bench.forget_peak()
    assert bench.peak() - base < 1 << 25
    big = torch.ones(1 << 24)
    del big
    assert 1 << 25 < bench.peak() - base < 1 << 27


def test_the_flops_of_a_pass_are_those_of_its_matrices(body):
    """A share of the matmul rate above one, or far below the truth, would follow."""
    ids = torch.ones(2, 5, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        body(ids, REFERENCE)
    attention = 2 * 5 * SHAPE.layers * 4 * SHAPE.heads * SHAPE.head_dim * 3
    assert bench.forward_flops(SHAPE, 2, 5) - attention <= counter.get_total_flops()
    assert counter.get_total_flops() <= bench.forward_flops(SHAPE, 2, 5) + attention


def test_the_bytes_of_a_decode_step_are_those_it_reads(body):
    """GB/s would be fiction. Embeddings that are not the head are not read."""
    read = plan.parameters(SHAPE) * 4 + 2 * 4 * sum(plan.blocks(SHAPE, 16))
    cache = 3 * 10 * 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * 4
    assert bench.decode_bytes(SHAPE, 3, 10, torch.float32) == read + cache
    untied = replace(SHAPE, tied=False)
    assert bench.decode_bytes(untied, 3, 10, torch.float32) == read + cache


# ---------------------------------------------------------------------------------------------- the workloads


def test_both_ways_do_the_same_episodes(body):
    """Ours and the lock-step way must hold the same tokens at the end, or one of them did less work."""
    w = Workload(2, 3, 20, 3, 2, 9, 12, 15, SHAPE.vocab)
    engine = Engine({r: (body, Silent()) for r in (POLICY, SIMULATOR)}, 9, w.context + 1)
    ts = engine.run([bench.forced_episode(w, row) for row in range(w.rows)])
    theirs = Counting()
    assert sum(len(t.ids) for t in ts) == bench.lock_step(theirs, w)
    assert [sum(t.mask) for t in ts] == [sum(w.lengths(row)) for row in range(w.rows)]
    assert engine.stats.decoded == w.decoded()
    assert max(len(t.ids) for t in ts) <= w.context
    # Theirs: five batches, each as long as its slowest row, and the third turn is fed all that came before.
    slowest = [max(w.lengths(row)[call] for row in range(w.rows)) for call in range(3)]
    assert [n for _, n in theirs.fed] == [slowest[0], 12, slowest[1], 12, slowest[2]]
    before = sum(20 + 2 * 12 + sum(w.lengths(row)[:2]) for row in range(w.rows))
    assert theirs.fed[4][0] == before
    assert engine.stats.prefilled < sum(fed for fed, _ in theirs.fed)


def test_lessons_teach_the_same_number_of_tokens():
    """TRL trains on completions alone: all that we sample must stand behind the prompt."""
    lesson = Lesson(2, 3, 10, 8, 5)
    ts = lesson.trajectories(50)
    assert len(ts) == 6 and all(sum(t.mask[:10]) == 0 and t.mask[10] == 1 for t in ts)
    assert ts[0].ids[:10] == ts[2].ids[:10] != ts[3].ids[:10]


def test_agreement_tells_a_near_tie_from_an_error():
    """Unequal ids in bf16 are no fault where two logits are neighbours, and one where they are far apart."""

    class Logits(Counting):
        def __call__(self, ids):
            z = torch.zeros(1, ids.size(1), 8)
            z[..., 3], z[..., 4] = 16.0, 16.125  # one step of bf16 at 16
            z[..., 5] = 10.0
            return type("Out", (), {"logits": z})

    rows, b = [[1, 2]], [[4, 4, 4, 4]]
    assert bench.agreement(Logits(), rows, b, b) == "greedy ids equal"
    assert "50.0% of greedy ids equal" in bench.agreement(Logits(), rows, [[4, 4, 3, 3]], b)
    assert "at 1 steps" in bench.agreement(Logits(), rows, [[4, 4, 3, 3]], b)
    assert "at 49 steps" in bench.agreement(Logits(), rows, [[4, 5, 4, 4]], b)


def test_nothing_ends_a_silent_turn(body):
    """An engine that stops early would win every race."""
    engine = Engine({POLICY: (body, Silent())}, 3, 60)
    said = bench.generate_ours(engine, [[1, 2], [3], [4, 5, 6]], 40, 1.0)
    assert [len(s) for s in said] == [40] * 3


# -------------------------------------------------------------------------------------------------- the file


def test_only_what_is_between_the_marks_is_replaced():
    """BENCH.md is also written by hand: a run must not eat what others wrote."""
    text = "# Bench\n\nby hand\n\n<!-- bench: memory -->\nold\n<!-- /bench: memory -->\n\nmore by hand\n"
    new = bench.put(text, "memory", "new")
    assert new == text.replace("old", "new") and bench.put(new, "memory", "new") == new
    added = bench.put(text, "growth", "g")
    assert added.startswith(text.rstrip()) and "## Growth\n\n<!-- bench: growth -->\ng\n<!-- /" in added
    with pytest.raises(ValueError, match=r"no <!-- /bench: memory -->"):
        bench.put(text.replace("/bench", "bench"), "memory", "new")


def test_a_written_table_holds_the_machine_and_the_rows(tmp_path, monkeypatch, capsys):
    """A figure without its machine, versions and date cannot be judged."""

    def two(p):
        """What it is."""
        yield Row("a row", "1 s", "2 s", 2.0, (1.5, 2.5), "note")

    monkeypatch.setitem(bench.SECTIONS, "memory", two)
    file = tmp_path / "BENCH.md"
    bench.main(["--only", "memory", "--write", "--file", str(file)])
    text = file.read_text()
    assert "| a row | 1 s | 2 s | 2.00 | 1.50 to 2.50 | note |" in text and "What it is." in text
    assert f"torch {torch.__version__}" in text and time.strftime("%Y-%m-%d") in text
    assert "a row" in capsys.readouterr().out


def test_bad_flags_are_one_line(capsys, tmp_path):
    """A traceback after minutes of measuring is no way to say that a name was mistyped."""
    assert "no section spelling: there are sampling" in fails(capsys, "--only", "spelling")
    assert "leave out --write" in fails(capsys, "--quick", "--write")
    assert "is not a checkpoint directory" in fails(capsys, "--checkpoint", str(tmp_path))
    assert "no checkpoint 'x'" in fails(capsys, "--plan", "x")
    assert "GiB even with --seats 2" in fails(capsys, "--plan", "14b", "--memory", "16")
    assert "--threads 0: must be 1 or more" in fails(capsys, "--threads", "0")
    assert "--seat-tokens -5" in fails(capsys, "--plan", "3b", "--seat-tokens", "-5")
    assert "names no section" in fails(capsys, "--only", ",")
    assert "belong to --plan" in fails(capsys, "--memory", "24")


# ------------------------------------------------------------------------------------------------- smoke runs


def test_sections_run(capsys):
    """What nobody runs for a week is broken when it is needed."""
    bench.main(["--quick", "--only", "sampling,episodes,profile,memory,gpu"])
    out = capsys.readouterr().out
    assert out.count("greedy ids equal") == 2 and "toy fp32, batch 3, 8 tokens, temperature 1" in out
    assert "2 questions x 2, no adapters" in out and "largest tensor of a step" in out
    found = re.search(r"activations kept.*?planned.*?GiB  ([\d.]+)  meta", out)
    assert 0.8 < float(found[1]) < 1.2, "the planner and the meta device disagree"
    assert "dry run, decode, 320 seats" in out and "a step, small body" in out


def test_the_shares_of_a_profile_add_up(body):
    """A function that the model no longer goes through would show as nothing, and its time as the rest."""
    w = Workload(2, 2, 20, 2, 2, 6, 8, 10, SHAPE.vocab)
    before = kernels.rms_norm
    row = bench.shares("x", partial(bench.act, bench.both_roles(body, w), w), 1)
    parts = {part: int(share) for part, share in re.findall(r"(\w[\w ]*?) (\d+)%", row.note)}
    assert [*parts] == [*bench.PARTS, "the rest"] and abs(sum(parts.values()) - 100) <= 4
    assert kernels.rms_norm is before


def test_the_memory_of_logps_does_not_grow_with_the_vocabulary():
    """Logits of all words, for a single token or a moment, would make the peak grow."""
    small, large = (
        bench.metered(lambda v=v: bench.logp_and_back(*bench.logp_inputs(512, 64, v), linear_logp))
        for v in (8192, 32768)
    )
    inputs = (32768 - 8192) * 64 * 4
    assert large.peak - inputs <= 1.02 * small.peak


def test_growth_runs():
    """All exponents are printed, and of the same kind."""
    rows = list(bench.growth(QUICK))
    assert len(rows) == 8 and all(row.note == "exponent" and row.ratio is not None for row in rows)


def test_absent_peers_are_said_to_be_absent(monkeypatch):
    """Who has only requirements.txt must get the rest of the table, and be told what is missing."""
    monkeypatch.setattr(bench, "installed", lambda *names: False)
    rows = [*bench.sampling(QUICK), *bench.episodes(QUICK), *bench.training(QUICK)]
    assert [r.theirs for r in rows] == ["peer not installed"] * 3


def test_a_step_beside_trl():
    """Both sides must learn from the same number of tokens, each in a process of its own."""
    if not bench.installed("trl", "peft"):
        pytest.skip("peer not installed")
    step, memory = bench.training(QUICK)
    assert "trained tokens" in step.note and step.ratio > 0 and memory.ratio > 0


def test_the_plan_is_printed(capsys):
    """`--plan` is for people who decide which card to rent."""
    bench.main(["--plan", "3b", "--memory", "24"])
    out = capsys.readouterr().out
    bench.main(["--plan", "3b", "--sim", "3b"])  # one body in both roles
    assert capsys.readouterr().out.splitlines()[1:] == out.splitlines()[1:]
    assert "3b in 24 GiB: --seats" in out and re.search(r"weights +5,902\.0 MiB", out) and "total" in out
