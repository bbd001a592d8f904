"""The simulator: words, curriculum, coins, fine-tuning. Character tokenizer, scripted engine, tiny body."""

import dataclasses
import json
from concurrent.futures import Future
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

import model as models
import simulator
import weights
from cli import screen, setting
from engine import Engine
from model import REFERENCE, SIMULATOR
from prepare import command as preparing
from prepare import rows as rows_of
from prepare import sft
from prepare.rows import read_rows
from rollout import DOCUMENTS, Documents, Query, Question, Sampled, coin
from simulator import Simulator, clean, messages, p_noise, prompt
from toy import texts
from words import PROMPTED_WORDS, SFT_WORDS, SimWords, load_words, save_words, words_for

END = 1  # the id that ends a turn


class Letters:
    """One id a character; the chat template brackets each message, as real ones do."""

    eos, bos, vocab_size = frozenset({0, END}), None, 128

    def __init__(self, has_template=True):
        self.has_template = has_template

    def encode(self, text, special=False):
        return [ord(c) % 126 + 2 for c in text]

    def token_bytes(self, i):
        return self.decode([i]).encode()

    def decode(self, ids):
        return "".join("<end>" if i < 2 else chr(i - 2) for i in ids)

    def chat(self, messages):
        if not self.has_template:
            return self.encode("".join(m["content"] for m in messages))
        turns = [[*self.encode(f"[{m['role']}|{m['content']}"), END] for m in messages]
        return [*chain(*turns), *self.encode("[assistant|")]


SHORT = SimWords("", "useful {query}:", "noisy {query}:", count=2)
FULL = SimWords(
    "",
    "{earlier}U|{query}|{question}|{answer}>",
    "{earlier}N|{query}|{question}|{answer}>",
    earlier="{query}={documents};",
)


def ask(text="who", question="Who is it?", answers=("Ann", "Anna"), address=(0, 1, 2, 3, 4), earlier=()):
    return Query(text, Question(question, answers), address, earlier)


def play(search, query, output="Doc 1: it is Ann.", end="eos"):
    """A scripted engine: the turn that the search yields, and what it returns after `output` was sampled."""
    run = search(query)
    turn = next(run)
    ids = search.tok.encode(output) + ([END] if end == "eos" else [])
    with pytest.raises(StopIteration) as done:
        run.send(Sampled(ids, [0.0] * len(ids), end))
    return turn, done.value.value


def told(search, query):
    return search.tok.decode(play(search, query)[0].ids)


# ------------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize("words", [SFT_WORDS, PROMPTED_WORDS], ids=["sft", "prompted"])
@pytest.mark.parametrize("quality", ["useful", "noisy"])
def test_words_carry_what_the_paper_lists(words, quality):
    """A prompt that forgets its switch, the count or the length gives one kind of document for both coins."""
    text = getattr(words, quality)
    other = {"useful": "noisy", "noisy": "useful"}[quality]
    assert "search engine" in text and "about 30 words" in text and f"five {quality} documents" in text
    assert text.lower().count(quality) >= 3 and other not in text.lower()
    assert text.endswith(f"Query: {{query}}\n{quality.capitalize()} Output:\n")
    assert words.system == "" and words.count == 5


def test_only_the_prompted_noisy_form_hides_question_and_answer():
    """An LLM that was not taught to withhold the answer copies what it sees into its noisy documents."""
    assert "{answer}" not in PROMPTED_WORDS.noisy and "{question}" not in PROMPTED_WORDS.noisy
    for text in (SFT_WORDS.useful, SFT_WORDS.noisy, PROMPTED_WORDS.useful):
        assert "{answer}" in text and "{question}" in text
    for text in (PROMPTED_WORDS.useful, PROMPTED_WORDS.noisy):
        assert len([line for line in text.splitlines() if line.startswith("Doc ")]) == 5


def test_words_travel_through_a_file(tmp_path):
    """Whoever uses released simulators brings their exact words: they must come back as they went in."""
    file = tmp_path / "words.json"
    save_words(FULL, file)
    assert load_words(file) == FULL
    file.write_text(json.dumps({"system": "s", "useful": "{query}", "noisy": "no {query}"}))
    assert load_words(file) == SimWords("s", "{query}", "no {query}", 5)
    assert load_words("prompted") is PROMPTED_WORDS


GOOD = {"system": "", "useful": "{query}", "noisy": "{query}"}


@pytest.mark.parametrize(
    "words, complaint",
    [
        (GOOD | {"user": "{query}"}, "no other keys"),
        ({"useful": "{query}", "noisy": "{query}"}, "must hold"),
        (GOOD | {"noisy": "write nonsense"}, "noisy prompt has no"),
        (GOOD | {"count": "5"}, "count must be of type int"),
        (GOOD | {"count": 0}, "at least one document"),
        ([], "JSON object"),
    ],
)
def test_bad_word_files_are_refused(tmp_path, words, complaint):
    """A dropped or misspelt key would train against words that nobody wrote."""
    file = tmp_path / "words.json"
    file.write_text(json.dumps(words))
    with pytest.raises(ValueError, match=complaint):
        load_words(file)


def test_a_file_that_is_not_json_is_refused(tmp_path):
    """The message names the file; a traceback would not."""
    (tmp_path / "w.json").write_text("{useful:")
    with pytest.raises(ValueError, match=r"w\.json"):
        load_words(tmp_path / "w.json")


def test_values_are_never_filled_again():
    """A query that holds "{answer}" must not make the simulator print the golden answer."""
    text = told(Simulator(Letters(), FULL), ask("{answer} {question}", "What {query}?", ("{earlier}",)))
    assert text.endswith("U|{answer} {question}|What {query}?|{earlier}><end>[assistant|")


def test_the_first_golden_answer_goes_into_the_prompt():
    """A list of aliases in the prompt would come back as a list of aliases in the documents."""
    assert told(Simulator(Letters(False), FULL), ask(answers=("Ann", "Anna"))).endswith("|Ann>")


def test_earlier_searches_are_told_in_order():
    """Without them the simulator answers for any bridge that the policy invents: a shortcut."""
    query = ask(earlier=(("a", "Doc {query}"), ("b", "B")))
    assert told(Simulator(Letters(False), FULL), query).startswith("a=Doc {query};b=B;U|who|")


def test_raw_text_is_the_prompt_where_there_is_no_template():
    """A base checkpoint knows no roles: brackets around its prompt would be noise to it."""
    assert told(Simulator(Letters(False), SHORT), ask()) == "useful who:"
    assert told(Simulator(Letters(True), SHORT), ask()) == "[system|<end>[user|useful who:<end>[assistant|"


# ------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize(
    "raw, documents",
    [
        ("Doc 1: a\n\n\n  \nDoc 2: b  \n", "Doc 1: a\nDoc 2: b"),
        ("\n\n Doc 1: a\r\nDoc 2: b\nDoc 3: c\nQuery: d", "Doc 1: a\nDoc 2: b"),
        ("Doc 3", ""),
        ("", ""),
        ("no numbers at all", "no numbers at all"),
    ],
)
def test_clean(raw, documents):
    """Blank lines cost observation tokens; a third of two documents, or a new query, is not the engine's."""
    assert clean(raw, 2) == documents


def test_a_turn_and_its_documents():
    """The end of the turn is not text; the limit, the temperature and the stop reach the engine."""
    turn, documents = play(Simulator(Letters(), SHORT, p_noise=1.0), ask(), "Doc 1: a\n\nDoc 2: b")
    assert documents == Documents("Doc 1: a\nDoc 2: b", noisy=True)
    assert (turn.role, turn.limit, turn.temperature, turn.stops) == (SIMULATOR, 600, 0.8, ("Doc 3",))
    assert turn.address == (*ask().address, DOCUMENTS)


def test_a_query_meets_its_own_question_when_episodes_interleave():
    """Defect 1 of the public code: queries were compacted to the rows that searched, questions not, and a
    query was sent with a neighbour's question and answer. Here three searches start and end out of order."""
    search = Simulator(Letters(False), FULL)
    queries = [ask(f"q{i}", f"Q{i}", (f"A{i}",), (0, 0, i, 0, 0)) for i in range(3)]
    runs = [search(q) for q in queries]
    for i in (2, 0, 1):
        assert search.tok.decode(next(runs[i]).ids) == f"U|q{i}|Q{i}|A{i}>"
    for i in (1, 2, 0):
        with pytest.raises(StopIteration) as done:
            runs[i].send(Sampled(search.tok.encode(f"D{i}"), [0.0] * 2, "limit"))
        assert done.value.value.text == f"D{i}"


# ------------------------------------------------------------------------------------------------- curriculum


@pytest.mark.parametrize(
    "shape, values",
    [
        ("exponential", [0.0, 0.25, 0.75]),  # base 4: (4^.5 - 1) / 3 = 1/3 of the way at half time
        ("linear", [0.0, 0.375, 0.75]),
        ("reverse", [0.75, 0.5, 0.0]),
        ("constant", [0.291, 0.291, 0.291]),  # .75 * (1 / ln 4 - 1 / 3)
    ],
)
def test_curriculum_by_hand(shape, values):
    """The noise of a run is its difficulty: a wrong curve is a wrong experiment."""
    assert [p_noise(step, 200, 0.0, 0.75, shape) for step in (0, 100, 200)] == pytest.approx(values, abs=1e-3)


def test_curriculum_starts_where_it_is_told_and_constant_has_its_mean():
    """The paper compares its curve (mean .097 for 0 to .25) with p = .5: the amount differs too."""
    assert p_noise(0, 10, 0.25, 0.5) == 0.25 and p_noise(10, 10, 0.25, 0.5) == pytest.approx(0.5)
    mean = sum(p_noise(i, 10000, 0.0, 0.25) for i in range(10000)) / 10000
    assert p_noise(3, 10000, 0.0, 0.25, "constant") == pytest.approx(mean, abs=1e-4)
    assert mean == pytest.approx(0.097, abs=1e-3)


@pytest.mark.parametrize(
    "args",
    [
        (0, 10, -0.1, 0.5),
        (0, 10, 0.0, 1.1),
        (0, 10, float("nan"), 0.5),
        (11, 10, 0.0, 0.5),
        (0, 0, 0.0, 0.5),
        (0, 10, 0.0, 0.5, "steep"),
        (0, 10, 0.0, 0.5, "exponential", 1.0),
        (0, 10, 0.0, 0.5, "exponential", 0.0),
    ],
)
def test_bad_curricula_are_refused(args):
    """A noise of 75 for 75 % would train on nothing but noise, in silence."""
    with pytest.raises(ValueError):
        p_noise(*args)


def test_noise_outside_the_unit_interval_is_refused():
    """Also when it arrives by dataclasses.replace, at some step in the middle of a run."""
    with pytest.raises(ValueError, match="a probability"):
        dataclasses.replace(Simulator(Letters()), p_noise=1.5)


# ------------------------------------------------------------------------------------------------------ coins


def coins(search, siblings=8, calls=8):
    """Which documents come back noisy: (siblings, calls)."""
    address = [[(7, 1, 2, s, c) for c in range(calls)] for s in range(siblings)]
    return [[play(search, ask(address=a))[1].noisy for a in row] for row in address]


def test_coins_are_keyed():
    """Unseeded coins made no two runs of the public code comparable."""
    search = Simulator(Letters(), SHORT, p_noise=0.5)
    first = coins(search)
    assert first == coins(search)
    assert 16 <= sum(map(sum, first)) <= 48 and any(row != first[0] for row in first)


def test_siblings_share_their_coins_if_told_to():
    """Independent coins within a group put luck into its advantages, and the policy cannot learn luck."""
    shared = coins(Simulator(Letters(), SHORT, p_noise=0.5, shared=True))
    assert all(row == shared[0] for row in shared)
    assert {True, False} == set(shared[0])
    other = Simulator(Letters(), SHORT, p_noise=0.5, shared=True)(ask(address=(7, 2, 2, 0, 0)))
    assert next(other).ids  # another step is another address, not an error


def test_more_noise_keeps_the_noisy_ones():
    """One coin for all thresholds: a step up the curriculum only ever adds noisy documents."""
    few, many = (coins(Simulator(Letters(), SHORT, p_noise=p)) for p in (0.3, 0.6))
    assert all(b for x, y in zip(few, many) for a, b in zip(x, y) if a)


def test_a_shared_coin_is_nobody_elses():
    """An address without its sibling must not be another's: a call read as a sibling would tie two coins."""
    shared = [simulator.noise_coin((7, 1, 2, 0, c), True) for c in range(4)]
    single = [simulator.noise_coin((7, 1, 2, s, c), False) for s in range(4) for c in range(4)]
    assert len({*shared, *single}) == 20 and not {*shared, *single} & {coin((7, 1, 2))}


# ------------------------------------------------------------------------------------------------ fine-tuning


def tiny_body(seed=0):
    config = models.Config("qwen2", 128, 32, 2, 2, 1, 16, 48, context=512)
    body = models.Model(config).init(seed, std=0.5)
    body.add_role(SIMULATOR, rank=4, alpha=8.0, seed=seed)
    return body


def rows(n=40):
    return [
        {"query": f"q{i % 5}", "question": "Q", "answer": "a" * (i % 3), "documents": w, "quality": q}
        for i, (w, q) in enumerate([("yes yes", "useful"), ("no", "noisy")] * (n // 2))
    ]


def test_fine_tuning_teaches_the_switch():
    """The loss falls, also on held-out rows, by the adapter alone: the reference must not move."""
    body, tok = tiny_body(), Letters()
    before = body(torch.tensor([[5, 6, 7]]), REFERENCE)
    frozen = {k: v.clone() for k, v in body.named_parameters()}
    run = list(sft.sft(body, tok, SHORT, rows(), steps=40, lr=0.02, tokens=256, every=20, exam=rows(4)))
    assert run[-1].held < 0.05 and run[-1].loss < 0.05 and run[0].held > 2  # ignoring the switch costs .126
    assert [p.step for p in run if p.held is not None] == [1, 20, 40]
    assert torch.equal(before, body(torch.tensor([[5, 6, 7]]), REFERENCE))
    assert all(torch.equal(v, frozen[k]) for k, v in body.named_parameters())


class Still(torch.optim.SGD):
    """An optimiser that moves nothing, and tells of each step its learning rate and its gradient."""

    def step(self):
        (group,) = self.param_groups
        self.told = [*getattr(self, "told", []), (group["lr"], group["params"][0].grad.clone())]


@pytest.mark.parametrize("alpha, clipped", [(8.0, True), (0.01, False)])
def test_fine_tuning_steps_are_alike_but_for_a_falling_rate(alpha, clipped):
    """A rate that never falls leaves the last step as wild as the first; a gradient that is not zeroed adds
    up, and one that is not clipped lets one strange batch undo the others."""
    body = tiny_body()
    body.add_role(SIMULATOR, rank=4, alpha=alpha)
    optimizer, one = Still([body.adapter(SIMULATOR)]), rows()[:1]  # again and again: one loss, one gradient
    run = list(sft.sft(body, Letters(), SHORT, one, 4, 0.1, tokens=30, optimizer=optimizer))
    assert [lr for lr, _ in optimizer.told] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    first = optimizer.told[0][1]
    assert len({p.loss for p in run}) == 1
    assert all(torch.allclose(gradient, first) for _, gradient in optimizer.told)
    assert (first.norm().item() == pytest.approx(1, abs=1e-3)) == clipped and 0 < first.norm() < 1.001


def test_only_document_tokens_are_trained():
    """Trained on its prompt, the simulator would learn to write questions; on padding, to write nothing."""
    body, tok = tiny_body(), Letters()
    row = {"query": "zzz", "question": "", "answer": "", "documents": "ab", "quality": "noisy"}
    e = sft.example(tok, SHORT, END, row)
    asked = prompt(tok, SHORT, ask("zzz"), True)
    assert tok.decode(e.ids[len(asked) :]) == "ab<end>" and e.ids[: len(asked)] == asked
    assert e.mask == [0] * len(asked) + [1] * 3
    logps = sft.completion_logps(body, SIMULATOR, [e, sft.Example([9, 8, 7], [0, 0, 1])])
    ids = torch.tensor([e.ids])
    alone = body.logits(body(ids, SIMULATOR)).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert len(logps) == 3 + 1  # a, b, the end of the turn; one token of the shorter row; no padding
    assert torch.allclose(logps[:3], alone[-3:], atol=1e-5)


def test_a_turn_ends_as_the_template_ends_it():
    """Trained to end on an id that its chat template never writes, a simulator would never stop."""
    assert sft.end_of_turn(Letters()) == END
    assert sft.end_of_turn(Letters(has_template=False)) == 0


def test_a_row_longer_than_the_body_reads_is_refused():
    """One line, instead of an index error in the middle of the rotary table."""
    with pytest.raises(ValueError, match="600 tokens"):
        sft.completion_logps(tiny_body(), SIMULATOR, [sft.Example([5] * 600, [1] * 600)])


def test_fine_tuning_is_seeded_and_goes_on_where_it_stopped():
    """A run that was cut and resumed must end in the same adapter, or its figures belong to no flags."""

    def run(body, optimizer, steps, done=0, upto=None):
        walk = sft.sft(
            body, Letters(), SHORT, rows(), steps, 0.01, tokens=256, optimizer=optimizer, done=done
        )
        for p in walk:
            if p.step == upto:
                break

    whole, parts = tiny_body(), tiny_body()
    run(whole, sft.adamw(whole, SIMULATOR), 8)
    optimizer = sft.adamw(parts, SIMULATOR)
    run(parts, optimizer, 8, upto=5)
    run(parts, optimizer, 8, done=5)
    assert torch.equal(whole.adapter(SIMULATOR), parts.adapter(SIMULATOR))


def test_steps_fill_their_budget_and_visit_every_row():
    """Half the tokens a step is another learning rate; a row that is never drawn is never learnt."""
    stream = sft.steps_of(list(range(1, 30)), lambda n: sft.Example([9] * n, [1] * n), 60, seed=3)
    seen, steps = [], []
    while len(seen) < 29:
        steps.append([len(e.ids) for e in next(stream)])
        seen += steps[-1]
    assert sorted(seen[:29]) == list(range(1, 30)) and seen[:29] != sorted(seen[:29])
    assert all(30 < sum(step) <= 60 for step in steps)
    assert len(next(sft.steps_of([0], lambda n: sft.Example([9] * 99, [1] * 99), 60, 0))) == 1


def test_batches_hold_their_padding_within_the_budget():
    """Memory is rows times the longest row; a row too long for any batch still gets its turn. Where lengths
    jump, short rows would be computed at twice their length, though all fit."""
    lengths = (90, 20, 500, 21, 20, 80, 40)
    cut = sft.batches([sft.Example([9] * n, [1] * n) for n in lengths], 180)
    assert [[len(e.ids) for e in batch] for batch in cut] == [[20, 20, 21], [40], [80, 90], [500]]


@pytest.mark.parametrize("tokens", [1, 60, 10**6])
def test_any_split_gives_the_same_gradient(tokens):
    """Each token weighs the same in a step, however its rows are cut to fit the memory."""
    encode = partial(sft.example, Letters(), SHORT, END)
    step = [encode(row | {"documents": "d" * (3 * i)}) for i, row in enumerate(rows(6))]
    whole, parts = tiny_body(), tiny_body()
    for body in (whole, parts):
        body.adapter(SIMULATOR).data.add_(0.01)  # B = 0 would leave A without a gradient
    (-sft.completion_logps(whole, SIMULATOR, step).mean()).backward()
    sft.backward(parts, SIMULATOR, step, tokens)
    want, got = whole.adapter(SIMULATOR).grad, parts.adapter(SIMULATOR).grad
    assert torch.allclose(want, got, atol=1e-4 * want.abs().max())


# ------------------------------------------------------------------------------------------------------- rows

ROW = {"query": "q", "question": "Q", "answer": "a", "documents": "d", "quality": "noisy"}


def write_lines(path, *lines):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_rows_are_read(tmp_path):
    """Blank lines are nobody's row; earlier searches are optional."""
    file = write_lines(tmp_path / "rows.jsonl", ROW, "", ROW | {"earlier": [["x", "y"]]})
    assert read_rows(file) == [ROW, ROW | {"earlier": [["x", "y"]]}]
    assert rows_of.row_query(read_rows(file)[1]).earlier == (("x", "y"),)


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "line 3: "),
        ("[1]", "line 3: is not a JSON object"),
        ({"query": "q"}, "line 3: no text in the column question"),
        (ROW | {"documents": ["d"]}, "line 3: no text in the column documents"),
        (ROW | {"quality": "good"}, "line 3: quality is 'good'"),
        (ROW | {"label": 1}, "line 3: unknown columns: label"),
        (ROW | {"earlier": [["x"]]}, "line 3: earlier must be"),
        (ROW | {"earlier": 5}, "line 3: earlier must be"),
        (ROW | {"earlier": ["xy"]}, "line 3: earlier must be"),
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path, line, complaint):
    """One bad row in 100,000 must be found by its number, before the body is loaded."""
    file = write_lines(tmp_path / "rows.jsonl", ROW, "", line)
    with pytest.raises(ValueError, match=complaint):
        read_rows(file)


def test_an_empty_file_is_refused(tmp_path):
    """Nothing to learn is not a run that ends well."""
    with pytest.raises(ValueError, match="no rows"):
        read_rows(write_lines(tmp_path / "rows.jsonl"))


# ----------------------------------------------------------------------------------------------- command line


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `simulator.py ...` on the tiny body, in a directory of its own that holds rows.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "load", lambda *where: tiny_body())
    monkeypatch.setattr(setting, "Tokenizer", SimpleNamespace(load=lambda home: Letters()))
    write_lines(tmp_path / "rows.jsonl", *rows())
    save_words(SHORT, tmp_path / "short.json")

    def run(line):
        preparing.main([*line.split(), "--sim", "tiny"])

    return run


SFT = "sft --rows rows.jsonl --sim-prompt short.json --tokens 256 --lr 0.02 --every 2 --steps"


def adapter(path):
    body = tiny_body()
    weights.load_adapter(body, SIMULATOR, path)
    return body.adapter(SIMULATOR).detach()


def test_a_cut_run_goes_on_to_the_same_adapter(command, tmp_path, monkeypatch):
    """Whatever a crash leaves behind must be enough to end where the whole run ends."""
    command(f"{SFT} 6 --out whole")
    saved, save = [], preparing.disk.save_state

    def crash(*args):
        save(*args)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(preparing.disk, "save_state", crash)
    with pytest.raises(KeyboardInterrupt):
        command(f"{SFT} 6 --out cut")
    with pytest.raises(ValueError, match="another --seed"):
        command(f"{SFT} 6 --out cut --resume --seed 5")
    command(f"{SFT} 6 --out cut --resume")
    assert torch.equal(adapter("cut"), adapter("whole")) and adapter("cut").any()
    assert sorted(f.name for f in (tmp_path / "cut").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "sft.json",
        "sim_prompt.json",
    ]
    assert words_for("cut", None) == SHORT


def test_a_run_writes_over_nothing(command, tmp_path):
    """An adapter of yesterday must not become half an adapter of today."""
    command(f"{SFT} 2 --out a")
    with pytest.raises(ValueError, match="already holds"):
        command(f"{SFT} 2 --out a")
    with pytest.raises(ValueError, match="no unfinished run"):
        command(f"{SFT} 2 --out a --resume")
    with pytest.raises(ValueError, match="line 41"):
        write_lines(tmp_path / "rows.jsonl", *rows(), "{")
        command(f"{SFT} 2 --out b")
    assert not (tmp_path / "b").exists()


def test_held_out_questions_are_not_trained_on():
    """The same question asked in two rows would let the audit see what was learnt by heart."""
    many = [ROW | {"question": f"Q{i % 12}", "query": str(i)} for i in range(100)]
    exam, rest = preparing.split_by_question(many, 64, seed=1)
    assert len(exam) <= 10 and len(exam) + len(rest) == 100
    assert exam and not {r["question"] for r in exam} & {r["question"] for r in rest}
    assert preparing.split_by_question(many, 64, seed=1) == (exam, rest)
    assert preparing.split_by_question(many[:1] * 40, 64, seed=1) == ([], many[:1] * 40)


def test_figures_of_held_out_rows_before_and_after(command, tmp_path, capsys):
    """The loss of random names hardly moves: whether the switch works shows in the audit. A resumed run must
    not take the figures of half a training for those of before."""
    write_lines(tmp_path / "held.jsonl", *(row | {"query": "q9"} for row in rows(6)))
    flags = "--held-rows held.jsonl --audit 4 --sim-tokens 12 --temperature 0"
    command(f"{SFT} 30 --out a {flags}")
    result = json.loads((tmp_path / "a" / "sft.json").read_text())
    assert result["rows"] == 40 and result["held"] == 6
    assert result["after"]["loss"] < 0.1 < result["before"]["loss"]
    after = result["after"]["audit"]
    assert after["useful"]["words"] == 2 and after["noisy"]["words"] == 1  # "yes yes" and "no"
    out = capsys.readouterr().out
    assert "before useful" in out and "after noisy" in out and "held-out loss" in out
    command(f"{SFT} 4 --out b")
    assert "nothing was held out" in capsys.readouterr().out  # one question alone, and no --held-rows
    assert json.loads((tmp_path / "b" / "sft.json").read_text())["before"] == {}


def test_a_resumed_run_keeps_the_figures_of_before(command, tmp_path, monkeypatch):
    """After half of the training "before" is no longer to be measured."""
    write_lines(tmp_path / "held.jsonl", *rows(4))
    flags = "--held-rows held.jsonl --audit 0"
    save = preparing.disk.save_state

    def crash(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing.disk, "save_state", crash)
    with pytest.raises(KeyboardInterrupt):
        command(f"{SFT} 6 --out a {flags}")
    monkeypatch.setattr(preparing.disk, "save_state", save)
    command(f"{SFT} 6 --out a {flags} --resume")
    command(f"{SFT} 6 --out b {flags}")
    a, b = (json.loads((tmp_path / d / "sft.json").read_text()) for d in "ab")
    assert a["before"] == b["before"] and a["before"]["audit"] == {}
    assert a["after"]["loss"] == pytest.approx(b["after"]["loss"])


def test_the_audit_command_writes_a_table_and_a_file(command, tmp_path, capsys):
    """Both qualities are asked for, whatever quality a row has."""
    write_lines(tmp_path / "held.jsonl", *rows(6))
    command("audit --rows held.jsonl --limit 3 --sim-prompt short.json --sim-tokens 5 --json f.json")
    header, useful, noisy = capsys.readouterr().out.splitlines()
    assert (
        "distinct" in header and useful.startswith("asked for useful") and noisy.startswith("asked for noisy")
    )
    saved = json.loads((tmp_path / "f.json").read_text())
    assert saved["audit"]["useful"]["n"] == saved["audit"]["noisy"]["n"] == 3
    assert saved["flags"]["limit"] == 3
    write_lines(tmp_path / "questions.jsonl", *({"question": f"q{i}", "answer": "a"} for i in range(4)))
    command("audit --data questions.jsonl --sim-prompt short.json --sim-tokens 5")
    assert capsys.readouterr().out.splitlines()[1].split()[3] == "4"
    with pytest.raises(ValueError, match="--rows, or --data"):
        command("audit --rows held.jsonl --data questions.jsonl")


class Server:
    """A chat server: says at once what it was told to."""

    def __init__(self, says):
        self.says, self.asked = says, []

    def complete(self, *request):
        self.asked.append(request)
        answer = Future()
        answer.set_result(self.says)
        return answer


def test_a_simulator_on_a_server_is_asked_the_same():
    """A 14B simulator runs elsewhere: its prompt, its coin, and what is cut off must not differ from ours."""
    server = Server("Doc 1: a\n\nDoc 2: b\nDoc 3: c")
    search = Simulator(None, FULL, p_noise=1.0, server=server, limit=50)
    search = dataclasses.replace(search, words=dataclasses.replace(FULL, count=2))
    outputs = Engine({}, 1, 1).run([search(ask()), search(ask(address=(0, 1, 2, 3, 5))), search(ask())])
    assert outputs[0] == Documents("Doc 1: a\nDoc 2: b", noisy=True)
    (said, temperature, limit, seed, stops), other, again = server.asked
    assert said == messages(FULL, ask(), True) and (temperature, limit, stops) == (0.8, 50, ("Doc 3",))
    assert again == server.asked[0] and other[3] != seed  # the randomness has an address there too


def test_the_toy_worlds_body_is_asked_in_its_own_words(tmp_path, capsys):
    """With the words of real checkpoints the tiny body would write nothing that is a fact."""
    write_lines(tmp_path / "rows.jsonl", *texts.rows(3))
    preparing.main(f"audit --sim tiny --rows {tmp_path}/rows.jsonl".split())
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "1.000"  # well formed


def test_write_shows_both_qualities_side_by_side(command, capsys):
    """The quickest look at a simulator: does the switch change what it writes?"""
    command(f"{SFT} 30 --out a --every 30")
    capsys.readouterr()
    command("write --sim-adapter a --query q1 --question Q --answer a --sim-tokens 20 --temperature 0")
    lines = [[side.strip() for side in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    assert lines == [["USEFUL", "NOISY"], ["yes yes", "no"]]


def test_words_default_to_those_of_the_adapter():
    """A simulator asked in words that it was not trained on answers like one that was not trained."""
    assert words_for(None, None) is PROMPTED_WORDS
    assert words_for("nowhere", "sft") is SFT_WORDS
    with pytest.raises(ValueError, match=r"sim_prompt\.json does not exist"):
        words_for("nowhere", None)


@pytest.mark.parametrize("flags", ["--steps 0", "--steps 2 --every 0", "--steps 2 --stesp 3", ""])
def test_bad_flags_end_with_code_2(command, tmp_path, flags):
    """A run of no steps would save an untrained adapter as if it were one."""
    with pytest.raises(SystemExit) as exit:
        screen.run(lambda: command(f"sft --rows rows.jsonl {flags}" + (" --out a" if flags else "")))
    assert exit.value.code == 2 and not (tmp_path / "a").exists()


def test_the_audits_seats_hold_the_longest_prompt():
    """A seat as long as the shortest prompt would refuse the others, or cut what is written for them."""
    body, tok = tiny_body(), Letters()
    search = Simulator(tok, SHORT, limit=7)
    engine = simulator.engine_for(body, search, [ask("a"), ask("a" * 40)], seats=2)
    assert engine.pools[SIMULATOR].capacity == len(prompt(tok, SHORT, ask("a" * 40), False)) + 7 + 1
