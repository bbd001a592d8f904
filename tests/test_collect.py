"""Rows: the three labels, balance, the log that outlives a run, released sets, audit figures."""

import json
import random
from dataclasses import replace

import pytest

import model as models
import search as engines
import simulator
import weights
from cli.disk import Rows
from model import POLICY, REFERENCE
from prepare import collect
from prepare import command as preparing
from prepare import rows as rows_of
from prepare.collect import Collector, agreement, sort_rows, verdict
from prepare.rows import read_rows
from questions import holds_answer
from rollout import Documents, Limits, Query, Question, Sampled
from simulator import audit_figures
from toy import world
from toy.texts import states
from toy.words import JUDGE as TOY_JUDGE
from toy.world import parse
from words import JUDGE, Words


class Letters:
    """A tokenizer of one id a character, without a chat template; id 0 ends a turn."""

    eos, bos, vocab_size, has_template = frozenset({0}), None, 0x110000, False

    def encode(self, text, special=False):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def chat(self, messages):
        return self.encode("".join(m["content"] for m in messages))


WORDS = Words(prompt="{question}\n", notice="\n?\n")
LIMITS = Limits(prompt=100, episode=4000, turn=100, observation=200, turns=3)
ANN = Question("Who is it?", ("Ann", "Anna"))


def engine_of(documents):
    """A real engine: a query's documents by its text, as lines."""

    def search(query):
        return Documents(documents[query.text])
        yield

    return search


def play(generator, says):
    """Drive a generator with a script: `says` the policy's turns in order, then the judge's, by role."""
    turns, wish = [], next(generator)
    while True:
        turns.append(wish)
        text = says[wish.role].pop(0)
        try:
            wish = generator.send(Sampled([ord(c) for c in text], [0.0] * len(text), "stop"))
        except StopIteration as end:
            return end.value, turns


def collector(documents, **more):
    return Collector(Letters(), engine_of(documents), LIMITS, WORDS, **more)


# ------------------------------------------------------------------------------------------------ one episode


def test_each_search_becomes_a_row_with_three_labels():
    """A label that belongs to another search would teach the simulator to write noise when asked for use."""
    documents = {"a": "Doc 1: nothing", "b": "Doc 1: it is Anna"}
    says = {
        POLICY: ["<search>a</search>", "<search>b</search>", "<answer>Ann</answer>"],
        REFERENCE: ["No.", "Yes"],
    }
    done, turns = play(collector(documents).episode(ANN, (0, 0, 0, 0)), says)
    assert not done["forced"]
    first, second = done["rows"]
    assert first["labels"] == {"judge": False, "answer": False, "trajectory": True}
    assert second["labels"] == {"judge": True, "answer": True, "trajectory": True}
    assert first["query"] == "a" and first["documents"] == "Doc 1: nothing" and first["answer"] == "Ann"
    assert "earlier" not in first and second["earlier"] == [["a", "Doc 1: nothing"]]
    asked = Letters().decode(turns[-1].ids)
    assert "Query: b" in asked and "it is Anna" in asked and turns[-1].role == REFERENCE


def test_the_trajectory_label_is_the_answers():
    """An episode without an answer, or with a wrong one, found nothing useful (the paper's first labels)."""
    for last, reached in (
        ("<answer>Bob</answer>", False),
        ("so", False),
        ("<answer>it is ann!</answer>", True),
    ):
        says = {POLICY: ["<search>a</search>", last, last, last], REFERENCE: ["yes"]}
        done, _ = play(collector({"a": "d"}).episode(ANN, (0, 0, 0, 0)), says)
        assert done["rows"][0]["labels"]["trajectory"] is reached


def test_a_forced_search_asks_for_the_question_and_has_no_trajectory():
    """What an episode never read has no part in its answer. Without the flag it has no row at all."""
    documents = {"Who is it?": "Doc 1: Ann"}
    says = {POLICY: ["<answer>Ann</answer>"], REFERENCE: ["yes"]}
    done, _ = play(collector(documents, force=True).episode(ANN, (0, 0, 5, 0)), says)
    assert done["forced"] and done["rows"][0]["query"] == "Who is it?"
    assert done["rows"][0]["labels"] == {"judge": True, "answer": True, "trajectory": None}
    done, _ = play(collector(documents).episode(ANN, (0, 0, 5, 0)), {POLICY: ["<answer>Ann</answer>"]})
    assert not done["forced"] and done["rows"] == []
    says = {POLICY: ["<search>a</search>", "<answer>x</answer>"], REFERENCE: ["yes"]}
    done, _ = play(collector({"a": "d"}, force=True).episode(ANN, (0, 0, 5, 0)), says)
    assert not done["forced"] and len(done["rows"]) == 1


def test_a_row_holds_what_the_engine_ranked_whatever_the_policy_was_shown():
    """A simulator writes the best first; the toy world's policy reads in any order."""
    facts = "\n".join(f"Doc {i}: fact {i}" for i in (1, 2, 3))
    says = {
        POLICY: ["<search>a</search>", "<search>b</search>", "<answer>x</answer>"],
        REFERENCE: ["yes", "yes"],
    }
    shuffling = collector({"a": facts, "b": facts}, shown=world.shuffled)
    rows = play(shuffling.episode(ANN, (2, 0, 0, 0)), says)[0]["rows"]
    seen = rows[1]["earlier"][0][1]
    assert rows[0]["documents"] == facts != seen and sorted(engines.split_documents(seen)) == sorted(
        engines.split_documents(facts)
    )


@pytest.mark.parametrize(
    "words, text, says",
    [
        (JUDGE, " Yes, they do", True),
        (JUDGE, "No. Yes", False),
        (JUDGE, "I know nothing", None),
        (JUDGE, "NO", False),
        (JUDGE, "", None),
        (TOY_JUDGE, " Niham</think>", True),
        (TOY_JUDGE, " unknown</think>", False),
    ],
)
def test_verdicts(words, text, says):
    """A judge that rambles is undecided, and "know" is no "no": else it labels by accident."""
    assert verdict(text, words) is says


def test_the_judges_prompt_fits_its_seat():
    """A page of documents would end the run in the middle with "tokens do not fit in a seat"."""
    run = collect.judged(Letters(), JUDGE, Query("q", ANN), "d" * 9000, room=700)
    turn = next(run)
    assert len(turn.ids) + turn.limit < 700 and Letters().decode(turn.ids).endswith("Reply:")


@pytest.mark.parametrize("over", [0, 1, 3000])
def test_a_query_too_long_for_the_judge_is_undecided(over):
    """One query that rambles must not end a collection of hours, nor be judged without its documents."""
    frame = len(JUDGE.prompt.format(query="", documents="")) + collect.VERDICT + 2
    query = "a" * (700 - frame + over)
    says = {POLICY: [f"<search>{query}</search>", "<answer>Ann</answer>"], REFERENCE: []}
    limits = replace(LIMITS, turn=3500)
    collecting = replace(collector({query: "Doc 1: Ann"}, room=700), limits=limits)
    done, turns = play(collecting.episode(ANN, (0, 0, 0, 0)), says)
    assert done["rows"][0]["labels"] == {"judge": None, "answer": True, "trajectory": True}
    assert all(turn.role == POLICY for turn in turns)
    assert sort_rows({0: done}, "judge").aside == {"undecided": 1}


# ---------------------------------------------------------------------------------------------------- balance


def raw(query, judge, documents="d", question="Q", **labels):
    row = {"query": query, "question": question, "answer": "a", "documents": documents}
    return row | {"labels": {"judge": judge, "answer": None, "trajectory": None} | labels}


def episodes_of(*rows):
    return {i: {"episode": i, "forced": False, "rows": [row]} for i, row in enumerate(rows)}


def test_both_qualities_come_equally_often_and_the_rest_is_counted():
    """A set of mostly noisy rows teaches to write noise; rows that vanish uncounted hide a broken label."""
    rows = [raw(f"u{i}", True) for i in range(7)] + [raw(f"n{i}", False) for i in range(3)]
    rows += [raw("u1", True), raw("x", None), raw("y", True, documents="")]
    found = sort_rows(episodes_of(*rows), "judge")
    assert (len(found.useful), len(found.noisy)) == (7, 3)
    assert found.aside == {"repeated": 1, "undecided": 1, "empty": 1}
    assert [r["query"] for r in found.rows(100)] == ["u0", "n0", "u1", "n1", "u2", "n2"]
    assert [r["quality"] for r in found.rows(5)] == ["useful", "noisy"] * 2
    assert all(rows_of.check_row(row) for row in found.rows(100))


def test_rows_do_not_depend_on_the_order_in_which_episodes_end():
    """Else a resumed run would choose other rows than a whole one."""
    rows = [raw(f"q{i}", i % 2 == 0) for i in range(20)]
    whole, mixed = episodes_of(*rows), list(episodes_of(*rows).items())
    random.Random(1).shuffle(mixed)
    assert sort_rows(whole, "judge").rows(8) == sort_rows(dict(mixed), "judge").rows(8)


def test_agreement_counts_only_what_both_decide():
    """Undecided rows counted as agreement would make a silent judge look perfect."""
    rows = [raw("a", True, answer=True), raw("b", False, answer=True), raw("c", None, answer=True)]
    table = agreement(rows)
    assert "judge and answer agree on 0.500 of 2 rows" in table
    assert "judge and trajectory agree on - of 0 rows" in table
    assert table.splitlines()[1].split() == ["judge", "1", "1", "1"]


# ---------------------------------------------------------------------------------------------------- the log


def episodes_log(path, settings, resume=False):
    return Rows(path, settings, resume, lambda row: row["episode"], must=True)


def test_a_line_that_was_cut_off_is_done_again(tmp_path):
    """A crash in the middle of a write must neither lose the file nor leave half a row in it."""
    path = tmp_path / "rows.jsonl.episodes"
    log = episodes_log(path, {"seed": 1})
    log.add({"episode": 4, "forced": False, "rows": [raw("q", True)]})
    log.add({"episode": 2, "forced": False, "rows": []})
    with open(path, "a") as f:
        f.write('{"episode": 7, "rows": [{"qu')
    again = episodes_log(path, {"seed": 1}, True)
    assert again.rows == log.rows and sorted(again.rows) == [2, 4]
    again.add({"episode": 7, "forced": False, "rows": []})
    assert sorted(episodes_log(path, {"seed": 1}, True).rows) == [2, 4, 7]


def test_a_log_belongs_to_one_run(tmp_path):
    """Rows of two engines in one file belong to no flags; a file that is overwritten is lost."""
    path = tmp_path / "log"
    with pytest.raises(ValueError, match="nothing to resume"):
        episodes_log(path, {"seed": 1}, True)
    episodes_log(path, {"seed": 1}).add({"episode": 0})
    with pytest.raises(ValueError, match="add --resume"):
        episodes_log(path, {"seed": 1})
    with pytest.raises(ValueError, match="another --seed"):
        episodes_log(path, {"seed": 2}, True)


class Scripted:
    """An engine without a model: plays each generator to its end; breaks after `breath` of them."""

    def __init__(self, breath=10**9):
        self.breath = breath

    def run(self, generators):
        for generator in generators:
            if self.breath == 0:
                raise KeyboardInterrupt
            self.breath -= 1
            play(generator, {POLICY: ["<search>a</search>", "<answer>Ann</answer>"], REFERENCE: ["yes"]})


def test_a_cut_run_goes_on_without_loss_or_repetition(tmp_path):
    """Hours of paid searches must survive Ctrl-C, and none may be paid twice."""
    questions = [Question(f"q{i}?", ("Ann",)) for i in range(12)]

    def documents(query):
        asked.append(query.question.text)
        return Documents("Doc 1: Ann" if int(query.question.text[1:-1]) % 2 else "Doc 1: Bob")
        yield

    def run(breath, path, resume):
        log = episodes_log(path, {}, resume)
        c = Collector(Letters(), documents, LIMITS, WORDS)
        return collect.collect(Scripted(breath), c, questions, log, "answer", 8, samples=2, rounds=3)

    asked = []
    whole = run(10**9, tmp_path / "a", False)
    assert whole.balanced(8) == 8 and len(asked) < 12  # it stops when it has enough
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        run(5, tmp_path / "b", False)
    cut = run(10**9, tmp_path / "b", True)
    assert cut.rows(8) == whole.rows(8) and len(asked) == len(set(asked))


# ------------------------------------------------------------------------------------------------ the command


def command(line):
    preparing.main(["collect", *line.split()])


TOY = "--policy tiny --data toy --search toy --limit 96 --seats 16 --rows 10"


def test_the_toy_world_is_collected_and_a_cut_run_ends_like_a_whole_one(tmp_path, capsys, monkeypatch):
    """The whole command: a policy, a real engine, the judge, the table, rows that sft can read."""
    command(f"{TOY} --out {tmp_path}/a.jsonl")
    out = capsys.readouterr().out
    assert "judge and answer agree on" in out and "left aside" in out and "useful" in out
    rows = read_rows(tmp_path / "a.jsonl")
    assert len(rows) == 10 and {r["quality"] for r in rows} == {"useful", "noisy"}
    for row in rows:  # the toy world's body reads well: its judge is right
        if row["quality"] == "useful":
            assert states(row["documents"], parse(row["query"]))
    adding, left = Rows.add, [20]

    def tired(*args):
        adding(*args)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Rows, "add", tired)
    with pytest.raises(KeyboardInterrupt):
        command(f"{TOY} --out {tmp_path}/b.jsonl")
    assert not (tmp_path / "b.jsonl").exists() and "--resume" in capsys.readouterr().err
    monkeypatch.setattr(Rows, "add", adding)
    command(f"{TOY} --out {tmp_path}/b.jsonl --resume")
    assert {r["query"] for r in read_rows(tmp_path / "b.jsonl")} == {r["query"] for r in rows}
    command(
        f"{TOY} --out {tmp_path}/b.jsonl --resume --judge trajectory"
    )  # another label costs no new episode
    with pytest.raises(ValueError, match="is there already"):
        command(f"{TOY} --out {tmp_path}/b.jsonl")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--episode-tokens 4096", "longer than the 512 this body can read: lower --episode-tokens"),
        ("--episode-tokens 40", "no room behind a prompt"),
        ("--seats 1", "at least 2 seats"),
    ],
)
def test_seats_that_cannot_be_are_refused_at_once(tmp_path, flags, words):
    """An episode longer than the body reads ended the run in the middle; where nothing fits behind a prompt
    the advice was to take a larger policy."""
    with pytest.raises(ValueError, match=words):
        command(f"{TOY} --out {tmp_path}/a.jsonl {flags}")
    assert not list(tmp_path.iterdir())


LOAD = weights.load


def silent(*where):
    """A body that never searches."""
    return models.Model(LOAD(*where).config).init(0)


def test_a_policy_that_never_searches_is_told_of_the_way_out(tmp_path, monkeypatch):
    """An empty file of rows would only be noticed hours later, by the fine-tuning."""
    monkeypatch.setattr(weights, "load", silent)
    line = "--policy tiny --data toy --search toy --limit 16 --rows 4 --judge answer"
    with pytest.raises(ValueError, match="made no search in 16 episodes: --force-search"):
        command(f"{line} --out {tmp_path}/a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()
    with pytest.raises(ValueError, match=r"no row is useful by --judge trajectory.*try another --judge"):
        command(f"{line} --out {tmp_path}/b.jsonl --force-search --judge trajectory")


def test_an_engine_that_fails_stops_the_run_and_keeps_what_is_done(tmp_path, monkeypatch):
    """A failed search must not become a row of documents; the episodes before it are paid for."""

    def fails(query, noise=0.0):
        raise OSError("http://127.0.0.1:9 refused the connection")
        yield

    monkeypatch.setattr(world, "lookup_anywhere", fails)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9 refused.*--resume goes on"):
        command(f"{TOY} --out {tmp_path}/a.jsonl")
    log = (tmp_path / "a.jsonl.episodes").read_text().splitlines()
    assert not any(json.loads(line).get("rows") for line in log)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--data toy --search none", "answered by --search toy"),
        ("--data questions.jsonl --search none --noise .3", "--noise is for --search toy"),
        ("--data questions.jsonl --search google", "unknown search engine"),
        ("--data toy --search toy --noise 30", "within 0..1, not 30"),
        ("--data toy --search toy --rows 1", "--rows must be at least 2"),
        ("--data toy --search toy --turns -1", "--turns must be at least 0"),
        ("--data toy --search toy --policy-prompt questions.jsonl", "must hold prompt and notice"),
    ],
)
def test_flags_that_contradict_each_other(tmp_path, monkeypatch, flags, complaint):
    """Found before the body is loaded, and before a file is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.jsonl").write_text('{"question": "who?", "answer": "Ann"}\n')
    with pytest.raises(ValueError, match=complaint):
        command(f"--policy nowhere --rows 4 --out a.jsonl {flags}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["questions.jsonl"]


@pytest.mark.parametrize(
    "data", ["--data toy --search toy", "--data q.jsonl --search none --episode-tokens 400"]
)
def test_the_policy_collects_in_the_words_that_it_was_trained_in(data, tmp_path, monkeypatch):
    """A policy with words of its own would search badly in ours, and its rows would be of other searches."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"question": "who?", "answer": "Ann"}\n')
    (tmp_path / "words.json").write_text('{"prompt": "Ask {question}", "notice": "again", "system": "s"}')
    made = []

    def stop(*a, **k):
        made.append(Collector(*a, **k))
        raise ValueError("enough")

    monkeypatch.setattr(preparing, "Collector", stop)
    with pytest.raises(ValueError, match="enough"):
        command(f"--policy tiny --rows 4 --out a.jsonl --policy-prompt words.json --prompt-tokens 99 {data}")
    assert made[0].words == Words("Ask {question}", "again", "s")


# ---------------------------------------------------------------------------------------------- released sets

PROMPT = """You are the Google search engine.
Given a query, you need to generate five useful documents for the query.

The user is trying to answer the question: "Who said "x: y"?" whose answer is ['Ann B.', 'A'].
Each document should contain about 30 words, and these documents should contain useful information.

Query: who said it
Useful Output:
"""
ROW = {
    "query": "who said it",
    "question": 'Who said "x: y"?',
    "answer": "Ann B.",
    "documents": "Doc 1: Ann",
    "quality": "useful",
}
EXCHANGES = {
    "alpaca": {"instruction": PROMPT, "input": "", "output": "Doc 1: Ann\n"},
    "prompt": {"prompt": PROMPT, "response": "Doc 1: Ann"},
    "messages": {
        "messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "Doc 1: Ann"}]
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": "Doc 1: Ann"}]
    },
}


@pytest.mark.parametrize("form", EXCHANGES)
@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_released_sets_are_mapped(form, ending, tmp_path):
    """Query, question, answer and quality stand in the prompt; lost there, the simulator is trained blind."""
    path = tmp_path / f"set.{ending}"
    if ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([EXCHANGES[form]] * 2), path)
    else:
        text = json.dumps(EXCHANGES[form])
        path.write_text(f"[{text},\n{text}]" if ending == "json" else f"{text}\n{text}\n")
    assert read_rows(path) == [ROW, ROW]


def test_columns_of_other_names_are_named_by_hand(tmp_path):
    """What a set calls its columns is its own affair."""
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"ask": PROMPT.replace("Useful O", "Noisy O"), "docs": "Doc 1: Ann"}) + "\n")
    columns = preparing.column_names("prompt=ask,documents=docs")
    assert read_rows(path, columns) == [ROW | {"quality": "noisy"}]
    with pytest.raises(ValueError, match="OURS=THEIRS"):
        preparing.column_names("prompt")


@pytest.mark.parametrize(
    "row, complaint",
    [
        ({"text": "x", "label": 1}, r"line 1: has the columns text, label; expected are query, question"),
        ({"question": "q", "golden_answers": ["a"]}, "these are questions, for collect --data"),
        ({"instruction": "Say hello", "output": "hello"}, "does not end in 'Query: ...'"),
        ({"prompt": PROMPT, "response": None}, "must be texts"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "has the columns messages"),
    ],
)
def test_unknown_columns_are_named(row, complaint, tmp_path):
    """A set that is read the wrong way trains on the wrong texts, and its loss looks fine."""
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=complaint):
        read_rows(path)


@pytest.mark.parametrize(
    "data, complaint",
    [
        (b"PAR1 and no more", "is damaged"),
        (b'[{"query": ', "is not JSON"),
        (b"[1, 2]", "other things than JSON objects"),
        (b"[]", "holds no rows"),
        (json.dumps([ROW, ROW | {"quality": "good"}]).encode(), "row 2: quality is 'good'"),
    ],
)
def test_damaged_sets_are_one_line(data, complaint, tmp_path):
    """Half a download must be told from a set of another form."""
    (tmp_path / "set").write_bytes(data)
    with pytest.raises(ValueError, match=complaint) as error:
        read_rows(tmp_path / "set")
    assert "\n" not in str(error.value)


def test_a_set_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    """The hub's client raises dozens of types, most of them pages long."""
    import datasets

    def unreachable(*args, **more):
        raise RuntimeError("no route to host\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError,
        match=r"could not download Alibaba-NLP/Sim.*: no route to host\. Give a file \(there is none",
    ):
        read_rows("Alibaba-NLP/SimulationTuning_wiki_dataset")
    with pytest.raises(ValueError, match=r"could not download owner/set_v1\.5"):
        read_rows("owner/set_v1.5")


@pytest.mark.parametrize(
    "name",
    [
        "rows",
        "rows.jsonk",
        "./rows",
        "../rows",
        "/rows",
        "~/rows",
        "data/rows.jsonl",
        "data/rows.gz",
        "a/b/c",
    ],
)
def test_a_mistyped_path_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    """Whoever mistypes ../rows is told of a file, not of a repository that the hub does not have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", None)
    with pytest.raises(FileNotFoundError, match=f"^there is no file {name}$"):
        read_rows(name)


# ---------------------------------------------------------------------------------------------- audit figures


def five(text, n=5):
    return "\n".join(f"Doc {i}: {text} {i}" for i in range(1, n + 1))


def figures(useful, noisy, question="Who is it?", golds=("Ann",)):
    q = Query("who", Question(question, golds))
    return audit_figures(
        [(q, Documents(t, False)) for t in useful] + [(q, Documents(t, True)) for t in noisy]
    )


def test_the_audit_sees_each_way_of_being_bad():
    """Figures are there to be believed: each must see what it is named after."""
    good = figures([five("it was Ann")], [five("nobody knows")])
    assert good["useful"]["answer"] == 1 and good["noisy"]["answer"] == 0
    assert good["useful"] == {"n": 1, "answer": 1, "repeats": 0, "distinct": 1, "words": 4, "formed": 1}
    assert figures([five("x")], [five("it was Ann")])["noisy"]["answer"] == 1  # leaks
    assert figures([five("so, who is it? Ann")], [])["useful"]["repeats"] == 1
    assert figures([five("Ann").replace("Ann 2", "Ann 1")], [])["useful"]["distinct"] == 0.8
    assert figures([five("Ann"), five("Ann")], [])["useful"]["distinct"] == 0.5  # the same for every query
    assert figures([five("Ann"), five("Ann", 4)], [])["useful"]["formed"] == 0.5
    assert figures([""], []) == {"useful": {"n": 1, "answer": 0, "repeats": 0, "formed": 0}}
    assert figures([], []) == {}


def test_yes_and_no_cannot_stand_in_a_document():
    """The letters "no" stand in nearly every document: such rows would all be useful."""
    assert holds_answer("nothing is known", ("no",)) is None and holds_answer("Yes", ("yes", "Yes.")) is None
    assert holds_answer("it was Ann", ("no", "ann")) is True and holds_answer("it was Bob", ("Ann",)) is False
    assert "answer" not in figures([five("no")], [], golds=("no",))["useful"]


@pytest.mark.parametrize(
    "text, formed",
    [
        (five("a"), True),
        (five("a").replace("Doc 3", "Doc 4"), False),
        (five("a").replace("Doc 3: a 3", "Doc 3: "), False),
        (five("a") + "\nmore", False),
        ("a\n" * 5, False),
    ],
)
def test_well_formed(text, formed):
    """The policy was promised five numbered documents."""
    assert simulator.well_formed(text, 5) is formed


def test_bodies_and_shortened_documents():
    """Words are counted, and cut, a document; a mark within a document's text is text."""
    assert engines.split_documents("Doc 1: a\nb Doc 2: c\nDoc 2: d\nDoc 3:") == ["a\nb Doc 2: c", "d"]
    assert engines.split_documents("no marks") == ["no marks"] and engines.split_documents("") == []
    search = engines.presented(engine_of({"q": "Doc 1: one two  three\nDoc 2: four\nDoc 3: five"}), 2, 2)
    run = search(Query("q", ANN))
    with pytest.raises(StopIteration) as end:
        next(run)
    assert end.value.value == Documents("Doc 1: one two\nDoc 2: four")


def test_a_row_holds_the_alias_that_its_documents_hold():
    """A simulator told "NYC" for documents that say "New York" learns that answers need not stand there."""
    query = Query("q", Question("big apple?", ("NYC", "New York")), (0,))
    assert rows_of.row_of(query, "Doc 1: New York is large")["answer"] == "New York"
    assert rows_of.row_of(query, "Doc 1: nothing")["answer"] == "NYC"
