"""The bench runs, and its arithmetic is right: a wrong figure would be believed."""

import mmap
import re
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
import model as models
from bench import __main__ as command
from bench import counts, decoding, gpu, growth, timing, training, work
from bench.counts import Searching
from bench.timing import Meter, Row, Run
from bench.work import Lesson, Silent, Workload
from cli import plan, screen
from engine import PATIENCE, Engine
from kernels import linear_logp
from model import POLICY, REFERENCE, SIMULATOR, Config, Model

QUICK = Run(quick=True)
SHAPE = Config("qwen2", vocab=128, d=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, context=512)


@pytest.fixture(scope="module")
def body():
    return work.with_roles(Model(SHAPE).init(0, std=0.3), rank=4)


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
        screen.run(partial(command.main, argv))
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and err.startswith("error: ") and "\n" not in err
    return err


# ------------------------------------------------------------------------------------------------- arithmetic


def test_a_power_law_is_found():
    """An exponent that is off by one would call a quadratic cost linear."""
    sizes = [3, 8, 20, 90]
    assert abs(timing.exponent(sizes, [5 * n**1.7 for n in sizes]) - 1.7) < 1e-9
    row = timing.grows("x", sizes, [0.002 * n for n in sizes], "seconds")
    assert abs(row.ratio - 1) < 1e-9 and row.ours == "6 16 40 180 ms"
    assert abs(timing.grows("x", [1, 2], [4.0, 16.0], "bytes", [2, 8]).ratio - 1) < 1e-9


def test_a_ratio_is_theirs_over_ours_pair_by_pair():
    """Upside down, a slow engine would look fast; of medians alone, the spread would mean nothing."""
    row = timing.versus("x", ([1.0, 2.0, 4.0], [3.0, 8.0, 4.0]), tokens=8)
    assert (row.ratio, row.spread) == (3.0, (1.0, 4.0))
    assert (row.ours, row.theirs) == ("4 tok/s", "2 tok/s")
    assert row.cells() == ("x", "4 tok/s", "2 tok/s", "3.00", "1.00 to 4.00", "")


def test_the_two_take_turns():
    """Ten runs of one and then ten of the other measure the machine's mood, not the programs."""
    said = []
    ours, theirs = (lambda: said.append("ours"), lambda: said.append("theirs"))
    spans = timing.alternate(Run(seconds=0), ours, theirs)
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
    if not timing.peak() or torch.cuda.is_available():
        pytest.skip("no /proc, or a GPU")

    def touch(size: int) -> None:
        """Memory of our own: malloc might give what it has kept from earlier tests."""
        with mmap.mmap(-1, size) as memory:
            memory.write(b"1" * size)

    touch(1 << 28)
    base = timing.forget_peak()
    assert timing.peak() - base < 1 << 25
    touch(1 << 26)
    assert 1 << 25 < timing.peak() - base < 1 << 27


def test_the_flops_of_a_pass_are_those_of_its_matrices(body):
    """A share of the matmul rate above one, or far below the truth, would follow."""
    ids = torch.ones(2, 5, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        body(ids, REFERENCE)
    attention = 2 * 5 * SHAPE.layers * 4 * SHAPE.heads * SHAPE.head_dim * 3
    assert gpu.forward_flops(SHAPE, 2, 5) - attention <= counter.get_total_flops()
    assert counter.get_total_flops() <= gpu.forward_flops(SHAPE, 2, 5) + attention


def test_the_bytes_of_a_decode_step_are_those_it_reads(body):
    """GB/s would be fiction. Embeddings that are not the head are not read."""
    read = plan.parameters(SHAPE) * 4 + 2 * 4 * sum(plan.blocks(SHAPE, 16))
    cache = 3 * 10 * 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * 4
    assert gpu.decode_bytes(SHAPE, 3, 10, torch.float32) == read + cache
    untied = replace(SHAPE, tied=False)
    assert gpu.decode_bytes(untied, 3, 10, torch.float32) == read + cache


# ---------------------------------------------------------------------------------------------- the workloads


def test_both_ways_do_the_same_episodes(body):
    """Ours and the lock-step way must hold the same tokens at the end, or one of them did less work."""
    w = Workload(2, 3, 20, 3, 2, 9, 12, 15, SHAPE.vocab)
    engine = Engine({r: (body, Silent()) for r in (POLICY, SIMULATOR)}, 9, w.context + 1)
    ts = w.act(engine)
    theirs = Counting()
    assert sum(len(t.ids) for t in ts) == decoding.lock_step(theirs, w)
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
    assert decoding.agreement(Logits(), rows, b, b) == "greedy ids equal"
    assert "50.0% of greedy ids equal" in decoding.agreement(Logits(), rows, [[4, 4, 3, 3]], b)
    assert "within 1 steps" in decoding.agreement(Logits(), rows, [[4, 4, 3, 3]], b)
    assert "within 49 steps" in decoding.agreement(Logits(), rows, [[4, 5, 4, 4]], b)


def test_nothing_ends_a_silent_turn(body):
    """An engine that stops early would win every race."""
    engine = Engine({POLICY: (body, Silent())}, 3, 60)
    said = work.generate_ours(engine, [[1, 2], [3], [4, 5, 6]], 40, 1.0)
    assert [len(s) for s in said] == [40] * 3


def test_a_planned_step_acts_and_learns_as_planned(monkeypatch):
    """With the planner's seats but pages for all of them to be full, the step of 24 GiB would allocate 90."""
    made, plain = [], gpu.engine
    monkeypatch.setattr(gpu, "engine", lambda *a, **more: made.append(plain(*a, **more)) or made[-1])
    w = replace(work.SMALL, vocab=SHAPE.vocab, prompt=80)
    s = plan.Settings(6, w.context + 1, 64, False, dtype=torch.float32, pages=5, lend=True)
    gpu.step_row("a step", replace(SHAPE, layers=3), w, s)
    cache = made[0].pools[POLICY].cache
    assert len(cache.owners) == 5 and cache.borrowed > 0.5 * cache.kv.nbytes


def test_the_counted_work_is_the_workload():
    """Counts of other episodes than those of the table's heading would be compared with other machines'."""
    w = Searching()
    searches = [len(w.lengths(row)) - 1 for row in range(w.rows)]
    turns = [n for row in range(w.rows) for n in w.lengths(row)]
    assert sum(searches) / w.rows == 1.75 and max(searches) == 5 and abs(sum(turns) / len(turns) - 110) < 2
    one, other = (w.ordered((0, 0, q, 0, 0), [7]) for q in (0, 3))
    alike = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    assert 300 < alike < len(one) < 460, "the simulator's prompts differ before their ends"
    small = Searching(2, 3)
    body, e = counts.acted(small, plan.Settings(9, 2048, 4096))
    assert sum(rows for rows, _ in body.decodes) == e.stats.decoded == small.decoded()
    assert len(body.decodes) == e.stats.steps and e.pools[POLICY].patience == PATIENCE
    assert sum(rows * length for rows, length in body.prefills) >= e.stats.prefilled > 1000
    row = counts.counted("x", body, e)
    assert f"9 seats, {e.stats.steps:,} decode steps, {len(body.prefills)} prefill forwards" in row.ours


def test_the_floor_of_a_step_is_bytes_or_operations():
    """A floor above the truth would call a slow engine perfect."""
    c, body, w = plan.shape("3b"), counts.Nothing(), Searching(1, 2)
    body.decodes, s = [(3, 1000)], plan.Settings(recompute=False)
    size = gpu.decode_bytes(c, 1, 1000, torch.bfloat16) + 8 * 3 * c.vocab
    row = counts.floors("x", c, w, s, body, 0.0)
    assert row.ours == f"{size / 1e9:.2f} GB" and f"H100: floor {1e3 * size / 3e12:.2f} ms" in row.note
    body.decodes = [(4096, 0)]  # as many rows as that are bound by arithmetic
    flops = 4096 * (gpu.forward_flops(c, 1, 1) + 2 * c.vocab * c.d)
    assert f"H100: floor {1e3 * flops / 7.9e14:.2f} ms" in counts.floors("x", c, w, s, body, 0.0).note
    body.prefills = [(1, 1)] * 1000
    assert "act 100" in counts.floors("x", c, w, s, body, 0.1).note


def test_launches_are_counted():
    """Each of Triton's, each of torch's; a view is none."""
    pytest.importorskip("triton")
    c = Config("qwen2", vocab=64, d=32, layers=3, heads=2, kv_heads=1, head_dim=16, ffn=32, context=4096)
    found = counts.host(c, 1)
    more = counts.host(replace(c, layers=5), 1)
    each = {name: (more[name][0] - found[name][0]) / 2 for name in found}
    # A layer: 2 norms, 4 matmuls, RoPE, attention and its merge, SwiGLU; 4 for LoRA of both roles.
    assert each["a decode step"] == 14 and each["a prefill, both roles"] == 13
    assert found["a decode step"][1] == 0 < found["a prefill, both roles"][1]


# -------------------------------------------------------------------------------------------------- the file


def test_only_what_is_between_the_marks_is_replaced():
    """BENCH.md is also written by hand: a run must not eat what others wrote."""
    text = "# Bench\n\nby hand\n\n<!-- bench: memory -->\nold\n<!-- /bench: memory -->\n\nmore by hand\n"
    new = command.put(text, "memory", "new")
    assert new == text.replace("old", "new") and command.put(new, "memory", "new") == new
    added = command.put(text, "growth", "g")
    assert added.startswith(text.rstrip()) and "## Growth\n\n<!-- bench: growth -->\ng\n<!-- /" in added
    with pytest.raises(ValueError, match=r"no <!-- /bench: memory -->"):
        command.put(text.replace("/bench", "bench"), "memory", "new")


def test_a_written_table_holds_the_machine_and_the_rows(tmp_path, monkeypatch, capsys):
    """A figure without its machine, versions and date cannot be judged."""

    row = Row("a row", "1 s", "2 s", 2.0, (1.5, 2.5), "note")

    def section(p):
        """What it is."""
        yield row

    monkeypatch.setitem(command.SECTIONS, "memory", section)
    file = tmp_path / "BENCH.md"
    command.main(["--only", "memory", "--write", "--file", str(file)])
    text = file.read_text()
    assert "| a row | 1 s | 2 s | 2.00 | 1.50 to 2.50 | note |" in text and "What it is." in text
    assert f"torch {torch.__version__.split('+')[0]}" in text and time.strftime("%Y-%m-%d") in text
    assert "a row" in capsys.readouterr().out


def test_bad_flags_are_one_line(capsys, tmp_path):
    """A traceback after minutes of measuring is no way to say that a name was mistyped."""
    assert "no section spelling: there are counts, sampling" in fails(capsys, "--only", "spelling")
    assert "leave out --write" in fails(capsys, "--quick", "--write")
    assert "is not a checkpoint directory" in fails(capsys, "--checkpoint", str(tmp_path))
    assert "no checkpoint 'x'" in fails(capsys, "--plan", "x")
    assert "GiB even with --seats 2" in fails(capsys, "--plan", "14b", "--memory", "16")
    assert "--threads must be at least 1" in fails(capsys, "--threads", "0")
    assert "--seat-tokens must be at least 1, not -5" in fails(capsys, "--plan", "3b", "--seat-tokens", "-5")
    assert "names no section" in fails(capsys, "--only", ",")
    assert "belong to --plan" in fails(capsys, "--memory", "24")
    for sim in ((), ("--sim", "3b")):
        assert "is for a --sim that is another body" in fails(capsys, "--plan", "3b", *sim, "--sim-bits", "4")


def test_readme_has_the_planners_cards(capsys):
    """A change of the planner leaves the table behind, with pairs that no longer fit."""
    command.main(["--plan", "cards"])
    assert capsys.readouterr().out in work.README.read_text()


# ------------------------------------------------------------------------------------------------- smoke runs


def test_sections_run(capsys):
    """What nobody runs for a week is broken when it is needed."""
    command.main(["--quick", "--only", "counts,sampling,bits,episodes,profile,memory,gpu"])
    out = capsys.readouterr().out
    assert "80 GiB  8 seats" in out and "4090: floor" in out
    assert out.count("greedy ids equal") == 2 and "toy fp32, batch 3, 8 tokens, temperature 1" in out
    assert "2 questions x 2, no adapters" in out and "largest tensor of a step" in out
    found = re.findall(r"2,048 tokens, activations (.*?)  ([\d.]+) GiB  planned.*?GiB  ([\d.]+)  meta", out)
    (kept, most, near), (again, less, _) = found
    assert (kept, again) == ("kept", "computed again") and float(most) > 1.3 * float(less)
    assert 0.8 < float(near) < 1.2, "the planner and the meta device disagree"
    assert "dry run, decode, 320 seats" in out and "a step, small body" in out
    assert "toy 4 bits" in out and "8 bits against our fp32, batch 3" in out
    assert "14b, a decode step" in out and "4 bits 15.43 GB" in out


def test_the_shares_of_a_profile_add_up(body):
    """A function that the model no longer goes through would show as nothing, and its time as the rest."""
    w = Workload(2, 2, 20, 2, 2, 6, 8, 10, SHAPE.vocab)
    before = kernels.rms_norm
    row = decoding.shares("x", partial(w.act, w.engine(body)), 1)
    parts = {part: int(share) for part, share in re.findall(r"(\w[\w ]*?) (\d+)%", row.note)}
    assert [*parts] == [*decoding.PARTS, "the rest"] and abs(sum(parts.values()) - 100) <= 4
    assert kernels.rms_norm is before


@pytest.mark.parametrize(
    "module, name, part",
    [
        (models, "product", "products"),
        (models, "adapt", "adapters"),
        (kernels, "cached_attention", "attention"),
        (kernels, "rms_norm", "RMSNorm"),
        (kernels, "rope_cache", "RoPE and cache"),
        (kernels, "swiglu", "SwiGLU"),
        (kernels, "sample", "sampling"),
    ],
)
def test_a_profile_calls_each_part_by_its_name(body, monkeypatch, module, name, part):
    """With two labels swapped somebody would speed up the wrong kernel. Only one part takes time here."""
    w, ticks, f = Workload(1, 2, 8, 2, 2, 3, 4, 5, SHAPE.vocab), [0], getattr(module, name)

    def tick(*args, **kwargs):
        ticks[0] += 1
        return f(*args, **kwargs)

    monkeypatch.setattr(timing, "clock", lambda: ticks[0])
    monkeypatch.setattr(module, name, tick)
    assert decoding.shares("x", partial(w.act, w.engine(body)), 1).note == f"{part} 100%"


def test_the_products_alone_are_all_matrices_once_a_token(body, monkeypatch):
    """Without the head, or with a head for each prompt token, the limit that our rates are compared to would
    be out of reach, or no limit."""

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    monkeypatch.setattr(decoding, "timed", flops)
    matrices = SHAPE.layers * sum(d_in * sum(parts) for d_in, parts in plan.linears(SHAPE))
    wanted = 2 * 3 * (7 + 5) * matrices + 2 * 3 * 5 * SHAPE.vocab * SHAPE.d
    assert decoding.products_alone(body, 3, 7, 5) == wanted


def test_the_row_without_adapters_is_the_one_without(monkeypatch):
    """Swapped, adapters would seem to speed the engine up."""
    calls, adapt = [0], models.adapt

    def count(*args):
        calls[0] += 1
        adapt(*args)

    def adapted(call):
        before = calls[0]
        call()
        return [1.0 + calls[0] - before]

    monkeypatch.setattr(models, "adapt", count)
    monkeypatch.setattr(decoding, "alternate", lambda p, *sides: [adapted(side) for side in sides])
    both, neither = decoding.episodes(QUICK)
    assert both.ratio < 1 == neither.ratio
    assert "no adapters" in neither.name and "no adapters" not in both.name


def test_a_training_row_says_what_was_trained(monkeypatch):
    """Kept or computed again: memory differs threefold; with the labels swapped the table would advise the
    wrong one."""

    def apart(f, b, lesson):
        ours = f is training.train_ours
        return {
            "seconds": [1.0 + lesson.recompute if ours else 6.0],
            "peak": (1 + 2 * ours) << 20,
            "tokens": 5,
        }

    monkeypatch.setattr(training, "installed", lambda *names: True)
    monkeypatch.setattr(training, "apart", apart)
    again, kept = training.training(Run())
    assert (again.name, again.ratio) == ("toy fp32, activations computed again: a step", 3.0)
    assert (kept.name, kept.ratio) == ("toy fp32, activations kept: a step", 6.0)
    step, peak = training.training(QUICK)
    assert (peak.ours, peak.theirs, peak.ratio) == (
        "3 MiB",
        "1 MiB",
        1 / 3,
    ) and "5 trained tokens" in step.note


def test_the_passes_of_training_are_counted_rightly(body, monkeypatch):
    """One forward pass, two, or three with recomputation: a wrong factor would be a wrong TFLOP/s. The clock
    counts operations, so each rate is about one operation a tick; adapters are not in the formula."""
    with FlopCounterMode(display=False) as counter:
        monkeypatch.setattr(timing, "clock", counter.get_total_flops)
        rows = list(gpu.pass_rows(body, 2, 32))
    names = ["prefill", "forward and backward", "the same, activations computed again"]
    assert [row.name.split(", 2 x")[0] for row in rows] == names
    assert all(0.8e-12 < float(row.ours.split()[0]) < 1.1e-12 for row in rows)


def test_our_log_probs_are_in_our_column():
    """The claim of the memory section, the right way round, where a vocabulary is large enough to show it."""
    row = next(growth.memory(SimpleNamespace(few=lambda quick, full: (32768, 256, 32))))
    assert row.ratio > 2 and float(row.ours.split()[0]) * row.ratio == pytest.approx(
        float(row.theirs.split()[0]), rel=0.02
    )


def test_the_memory_of_logps_does_not_grow_with_the_vocabulary():
    """Logits of all words, for a single token or a moment, would make the peak grow."""
    small, large = (
        timing.metered(growth.logp_call(linear_logp, 512, 64, vocab)).peak for vocab in (8192, 32768)
    )
    assert large <= 1.02 * small


def test_growth_is_that_of_the_work(monkeypatch):
    """The clock counts multiplications. A row of other work than its label's, or an exponent in other sizes,
    would call a quadratic cost linear; a step that is not divided by its tokens is no step."""
    done = [0]

    def counted(f):
        def call(x, weight, *args):
            done[0] += x.shape[:-1].numel() * weight.numel()
            return f(x, weight, *args)

        return call

    monkeypatch.setattr(timing, "clock", lambda: done[0])
    for module, name in ((models, "product"), (kernels, "lora_linear"), (growth, "linear_logp")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    rows = {row.name: row for row in growth.growth(QUICK)}
    assert len(rows) == 9 and all(row.note == "exponent" for row in rows.values())
    assert all(row.ours.split()[-1] == ("MiB" if "peak" in name else "ms") for name, row in rows.items())

    def figures(start):
        (row,) = (row for name, row in rows.items() if name.startswith(start))
        return row.ratio, float(row.ours.split()[0]) / 1e3

    def work_of(c, tokens, sampled, fed=0):  # the last layer feeds keys and values alone
        qkv, *rest = (d_in * sum(parts) for d_in, parts in plan.linears(c))
        matrices = c.layers * tokens * (qkv + sum(rest)) - fed * sum(rest)
        return pytest.approx(matrices + sampled * c.vocab * c.d, rel=0.01)

    toy = plan.shape("tiny")
    assert figures("a turn (8 rows, 4 tokens fed, 4 sampled)") == (pytest.approx(0), work_of(toy, 64, 32, 32))
    assert figures("a decode step (8 rows") == (pytest.approx(0), work_of(growth.TINY, 8, 8))
    assert 1.1 < figures("episodes (8 rows), exponent in tokens sampled")[0] < 1.3  # in turns: 1.5
    assert 0.5 < figures("acting: siblings")[0] < 0.9  # the prompt is fed once
    assert figures("learning: siblings")[0] == pytest.approx(1, abs=0.02)  # sampled tokens vary
    assert figures("learning: siblings")[1] > 1.2 * figures("acting: siblings")[1]
    assert figures("log-prob and gradient") == (pytest.approx(1), pytest.approx(64 * 64 * 1024, rel=0.01))


def test_a_turn_is_timed_among_those_that_wait(monkeypatch):
    """An engine that pays at each step for each waiting episode must be seen to do so. The history is not
    timed, and the run ends before thousands of episodes are through."""
    ticks = [0]

    def run(episodes):
        assert [len(next(e).ids) for e in episodes[:3]] == [2] * 3
        ticks[0] += 1000
        turns = [e.send(None) for e in episodes[:3]]
        assert len(turns[0].ids) == 4 and len({id(t.context) for t in turns}) == 3
        ticks[0] += len(episodes) * turns[0].limit
        for e in episodes[:3]:
            next(e, None)
        raise AssertionError("it went on")

    monkeypatch.setattr(timing, "clock", lambda: ticks[0])
    e = SimpleNamespace(pools={POLICY: SimpleNamespace(model=SimpleNamespace(config=SHAPE))}, run=run)
    assert growth.turn_seconds(e, 3, 2, 4, 5, waiting=100) == 103 * 5


def test_absent_peers_are_said_to_be_absent(monkeypatch):
    """Who has only requirements.txt must get the rest of the table, and be told what is missing."""
    for module in (decoding, training):
        monkeypatch.setattr(module, "installed", lambda *names: False)
    rows = [*decoding.sampling(QUICK), *decoding.episodes(QUICK), *training.training(QUICK)]
    assert [r.theirs for r in rows] == ["peer not installed"] * 3


def test_a_step_beside_trl():
    """Both sides must learn from the same number of tokens, each in a process of its own."""
    if not work.installed("trl", "peft"):
        pytest.skip("peer not installed")
    step, memory = training.training(QUICK)
    assert "trained tokens" in step.note and step.ratio > 0 and memory.ratio > 0


def test_the_plan_is_printed(capsys):
    """`--plan` is for people who decide which card to rent."""
    command.main(["--plan", "3b", "--memory", "24"])
    out = capsys.readouterr().out
    command.main(["--plan", "3b", "--sim", "3b"])  # one body in both roles
    assert capsys.readouterr().out.splitlines()[1:] == out.splitlines()[1:]
    assert "3b in 24 GiB: --seats" in out and re.search(r"weights +5,902\.0 MiB", out) and "total" in out
