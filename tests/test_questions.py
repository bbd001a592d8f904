"""Question files, and the scores against a second implementation that is written another way."""

import gzip
import json
import random

import pytest

from questions import cover_em, exact_match, f1, load_questions, normalise
from rollout import Question

ASCII_PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def plain_words(text):
    """The SQuAD definition, character by character and word by word, without regular expressions."""
    kept = "".join(c for c in text.lower() if c not in ASCII_PUNCTUATION)
    # An article goes where no word character touches it, so "the–a" (en dash) is two articles, "thea" none.
    spaced, word = [], ""
    for c in kept + " ":
        if c.isalnum():
            word += c
        else:
            spaced.append(" " if word in ("a", "an", "the") else word)
            spaced.append(c)
            word = ""
    return "".join(spaced).split()


def plain_f1(answer, gold):
    """Precision and recall by striking out matched words one by one."""
    left, common = list(gold), 0
    for word in answer:
        if word in left:
            left.remove(word)
            common += 1
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / len(gold)
    return 2 * precision * recall / (precision + recall)


PIECES = [
    "the", "The", "a", "A", "an", "AN", "yes", "no", "No", "noanswer", "Ljubljana", "ljubljana", "Zoë",
    "Łódź", "東京", "naïve", "1994", "1,994", "U.S.", "well-known", "theatre", "another", "Æ", "İstanbul",
    "ß", "—", "–a–", "'", "?!", "«a»", "²", "٣", "", " ", "\t", "\n", "\u00a0", "e\u0301",
    "a\u0301", "\u200b", "_a_", "a_b", "The,", "(an)", "ﬁn", "ΣΑΣ", "ﷺ", "\U0001f600", "\u3000", "\u2028",
    "\x85", "\x1c", "Ⅳ", "½",
]  # fmt: skip


def random_text(rng):
    """Up to five pieces, joined or apart; one in ten is any character there is."""
    pieces = [rng.choice(PIECES) for _ in range(rng.randrange(6))]
    pieces = [p if rng.random() < 0.9 else chr(rng.randrange(0x110000)) for p in pieces]
    return rng.choice(["", " "]).join(pieces)


def test_scores_equal_the_second_implementation():
    """A slip in lower-casing, punctuation, articles, spaces or multiplicity, in any script, would show in
    5,000 pairs."""
    rng = random.Random(0)
    for _ in range(5000):
        answer = rng.choice([None, random_text(rng), random_text(rng)])
        golds = [random_text(rng) for _ in range(rng.randrange(1, 4))]
        said, meant = plain_words(answer or ""), [plain_words(g) for g in golds]
        joined = " ".join(said)
        where = f"{answer!r} {golds!r}"
        assert f1(answer, golds) == pytest.approx(max(plain_f1(said, g) for g in meant)), where
        assert exact_match(answer, golds) == float(said != [] and said in meant), where
        assert cover_em(answer, golds) == float(any(g and " ".join(g) in joined for g in meant)), where


def test_normalise_by_example():
    """Each case is one rule of the SQuAD normalisation; a changed order of the rules would break one."""
    assert normalise("The  Comics\tJournal!") == "comics journal"
    assert normalise("U.S. well-known A.") == "us wellknown"
    assert normalise("theatre another Anna") == "theatre another anna"
    assert normalise("a-ha") == "aha"
    assert normalise("«The» Łódź—") == "« » łódź—"
    assert normalise(" the a AN ") == ""


def test_normalising_twice_changes_nothing():
    """A gold that was normalised before it was stored must score as the raw one does."""
    rng = random.Random(1)
    for text in [random_text(rng) for _ in range(2000)]:
        assert normalise(normalise(text)) == normalise(text), text


def test_scores_are_shares_that_agree_with_each_other():
    """An exact match that F1 or cover-EM does not see, or a score over 1, would make one table contradict
    itself."""
    rng = random.Random(2)
    for _ in range(2000):
        answer, golds = random_text(rng), [random_text(rng) for _ in range(2)]
        exact, cover, overlap = (s(answer, golds) for s in (exact_match, cover_em, f1))
        assert 0 <= exact <= min(cover, overlap) and max(cover, overlap) <= 1, (answer, golds)
        assert f1(answer, golds) == f1(answer, golds[::-1])


def test_no_answer_scores_zero_everywhere():
    """The paper's code crashes on None, and "" would be found in any text if emptiness were not looked at."""
    for answer in (None, "", "   ", "the", "?!"):
        for golds in (["Lima"], ["The The"], [""], []):
            assert f1(answer, golds) == exact_match(answer, golds) == cover_em(answer, golds) == 0.0
    assert f1("Lima", []) == exact_match("Lima", []) == cover_em("Lima", []) == 0.0


def test_exact_is_strict_and_cover_is_not():
    """The paper's "EM" rewards a long answer that holds the gold somewhere: only cover_em may do so."""
    long = "It may be Lima, Quito, Bogotá or La Paz"
    assert exact_match(long, ["Quito"]) == 0.0
    assert cover_em(long, ["Quito"]) == 1.0
    assert f1(long, ["Quito"]) == pytest.approx(2 / 10)
    assert cover_em("nothing", ["no"]) == 1.0
    assert cover_em("Lima", ["Lima, Peru"]) == 0.0


def test_yes_and_no_are_plain_words():
    """A special case for yes / no would make the reward differ from the paper's F1."""
    assert f1("Yes.", ["yes"]) == exact_match("Yes.", ["yes"]) == 1.0
    assert f1("yes, it is", ["yes"]) == pytest.approx(0.5)
    assert f1("no", ["yes"]) == f1("noanswer", ["no answer"]) == 0.0


def test_the_best_golden_answer_counts():
    """Averaging over golds, or taking the first, would punish data sets that list aliases."""
    assert f1("NYC", ["New York City", "NYC"]) == exact_match("NYC", ["New York", "nyc"]) == 1.0
    assert f1("New York", ["York", "New York City"]) == pytest.approx(4 / 5)


def lines_file(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


GOOD = {"id": 7, "question": "Capital of Peru?", "golden_answers": ["Lima", "Ciudad de los Reyes"], "hops": 1}


def test_load_questions_reads_every_usual_form(tmp_path):
    """A field under its other name, a bare answer, gzip or a blank line must not cost a question."""
    rows = [GOOD, "", {"question": "q", "answer": "x"}, {"id": "b", "question": "q?", "answers": ["x", " "]}]
    path = lines_file(tmp_path / "q.jsonl", *rows)
    want = [
        Question("Capital of Peru?", ("Lima", "Ciudad de los Reyes"), "7", 1),
        Question("q", ("x",), "", 0),
        Question("q?", ("x",), "b", 0),
    ]
    assert load_questions(path) == want
    zipped = tmp_path / "zipped.jsonl"  # told by its content, not by its name
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert load_questions(zipped) == want


def test_a_limit_draws_the_same_questions_every_time(tmp_path):
    """A file may be sorted by kind: its first 500 are no sample. Two runs that are compared need the same
    ones, and a larger run should hold those of the smaller."""
    path = lines_file(
        tmp_path / "q.jsonl", *[{"id": i, "question": f"q{i}", "answer": "x"} for i in range(100)]
    )
    some, more = ([int(q.id) for q in load_questions(path, limit)] for limit in (20, 50))
    assert some == [int(q.id) for q in load_questions(path, 20)] == sorted(some)
    assert set(some) < set(more) and len(set(some)) == 20 and len(set(more)) == 50
    assert some != list(range(20)) and max(some) > 60
    assert len(load_questions(path, 500)) == 100
    five = [int(q.id) for q in load_questions(path, 5)]
    assert five == [5, 33, 49, 53, 97]  # tables of old runs name these


def test_parquet_files_are_read(tmp_path):
    """The authors' and Search-R1's sets are parquet files: told by their content, rows counted from 1."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [GOOD | {"metadata": {"source": "x"}}, {"id": 8, "question": "q?", "golden_answers": ["x"]}]
    path = tmp_path / "q.data"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    assert load_questions(path) == [
        Question("Capital of Peru?", ("Lima", "Ciudad de los Reyes"), "7", 1),
        Question("q?", ("x",), "8", 0),
    ]
    parquet.write_table(pa.Table.from_pylist([*rows, {"question": "who?", "golden_answers": []}]), path)
    with pytest.raises(ValueError, match=r"q\.data, row 3: has no answer"):
        load_questions(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"q\.data is damaged"):
        load_questions(path)


@pytest.mark.parametrize(
    "line, what",
    [
        ('{"question": "q", "golden_answers": ["x"]', "is not JSON"),
        ('["q", "x"]', "not a JSON object"),
        ({"golden_answers": ["x"]}, 'no text under "question"'),
        ({"question": " ", "golden_answers": ["x"]}, 'no text under "question"'),
        ({"question": "q"}, "no answer"),
        ({"question": "q", "golden_answers": []}, "no answer"),
        ({"question": "q", "golden_answers": ["", " "]}, "no answer"),
        ({"question": "q", "golden_answers": [None]}, "list of texts"),
        ({"question": "q", "golden_answers": {"text": ["x"]}}, "list of texts"),
        ({"question": "q", "golden_answers": ["x"], "hops": "two"}, '"hops"'),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line, what):
    """Without the number nobody finds one broken line among 90,000; skipping it would change the score."""
    path = lines_file(tmp_path / "q.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(ValueError, match=f"q.jsonl, line 3: .*{what}"):
        load_questions(path)


def test_other_bad_question_files(tmp_path):
    """An empty file would end in a division by zero, a cut download in a traceback."""
    with pytest.raises(ValueError, match="holds no questions"):
        load_questions(lines_file(tmp_path / "empty.jsonl", "", ""))
    with pytest.raises(FileNotFoundError, match=r"^there is no file \S*absent\.jsonl$"):
        load_questions(tmp_path / "absent.jsonl")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-20])
    with pytest.raises(ValueError, match="damaged"):
        load_questions(cut)
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é", "answer": "x"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 1: "):
        load_questions(tmp_path / "latin.jsonl")


@pytest.mark.parametrize(
    "name, more", [("./hotpotqa", ""), ("hotpot", r", and no such set \(nq, .*bamboogle\)")]
)
def test_a_mistyped_name_is_told_as_what_it_was_meant(name, more, tmp_path, monkeypatch):
    """A mistyped name of a set must list the sets, not only say that there is no such file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", None)
    with pytest.raises(FileNotFoundError, match=f"^there is no file {name}{more}$"):
        load_questions(name)


def test_sets_by_name_come_from_the_hub(monkeypatch):
    """`--policy 3b` without --data trains on nq and hotpotqa: their *training* questions, and says so plainly
    where there is no network."""
    asked = []

    def hub(repository, name, split):
        asked.append((name, split))
        if name == "musique":
            raise ConnectionError("no route\nto host")
        return [{"id": "1", "question": "who?", "golden_answers": ["me"], "metadata": {}}]

    monkeypatch.setattr("datasets.load_dataset", hub)
    assert load_questions("nq", train=True) == [Question("who?", ("me",), "1")]
    assert load_questions("hotpotqa", 1)[0].answers == ("me",)
    assert asked == [("nq", "train"), ("hotpotqa", "dev")]
    with pytest.raises(ValueError, match="bamboogle has no questions to train on"):
        load_questions("bamboogle", train=True)
    with pytest.raises(ValueError, match=r"could not download musique .*: no route\. Give a question file"):
        load_questions("musique")
