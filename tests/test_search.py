"""BM25 against an obvious, slow implementation; corpora, whole and broken; the engines by name."""

import gzip
import json
import math
import os
import random
import re
import shutil

import numpy as np
import pytest

import search
from rollout import Documents, Query, Question
from search import index, open_search, tokenise

PEOPLE = [
    ("Ada Lovelace", "Ada Lovelace wrote the first program, for the Analytical Engine."),
    ("Charles Babbage", "Charles Babbage designed the Analytical Engine and never built it."),
    ("Zoë Ångström", "Zoë of Łódź played the naïve café owner."),
]


def slow_scores(passages, query, k1=1.2, b=0.75):
    """The formula, word by word and passage by passage, on lists."""
    split = [re.findall(r"[a-z0-9]+", f"{title} {text}".lower()) for title, text in passages]
    mean = sum(map(len, split)) / len(split)
    total = [0.0] * len(split)
    for word in re.findall(r"[a-z0-9]+", query.lower()):
        n = sum(word in words for words in split)
        idf = math.log(1 + (len(split) - n + 0.5) / (n + 0.5))
        for i, words in enumerate(split):
            f = words.count(word)
            total[i] += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * len(words) / mean))
    return total


def random_corpus(rng, size):
    words = [f"w{i}" for i in range(30)]
    return [
        (rng.choice(words), " ".join(rng.choices(words, k=rng.randrange(12)))) for _ in range(size)
    ]  # short and few words: repeated words, empty texts and equal scores all happen


def test_bm25_equals_the_slow_formula():
    """An error in the postings' order, a count, a length or the idf would show in one of 400 rankings."""
    rng = random.Random(0)
    for _ in range(40):
        passages = random_corpus(rng, rng.randrange(1, 60))
        made = index(passages)
        for _ in range(10):
            query = " ".join(
                rng.choices([f"w{i}" for i in range(35)], k=rng.randrange(5))
            )  # five are unknown
            want = slow_scores(passages, query)
            assert made.scores(query).tolist() == pytest.approx(want)
            count = rng.randrange(1, 12)
            # scores that differ only by rounding tie: the order is the corpus's
            ranked = sorted((i for i in range(len(want)) if want[i]), key=lambda i: (-round(want[i], 9), i))
            assert made.top(query, count) == ranked[:count]


def test_an_index_on_disk_ranks_like_one_in_memory(tmp_path, monkeypatch, capsys):
    """Words counted by blocks, lengths and passages found by offsets: one off by one moves a score to a
    neighbour. bm25s, another implementation, is the judge of both."""
    rng, where = random.Random(1), tmp_path / "words"
    passages = [*random_corpus(rng, 300), ("Zoë", 'a "quoted"\nname \ud83d'), ("", "")]
    monkeypatch.setattr(search, "BLOCK", 100)
    lines = ({"title": title, "contents": f'"{title}"\n{text}'} for title, text in passages)
    search.main(["index", str(corpus_file(tmp_path / "c.jsonl", *lines)), "--out", str(where)])
    assert capsys.readouterr().out.startswith("302 passages, 34 words, ")
    assert {p.name for p in tmp_path.iterdir()} == {"c.jsonl", "words"}
    memory, disk = index(passages), search.load(where)
    assert isinstance(disk.weight, np.memmap) and disk.passage(300) == ("Zoë", 'a "quoted" name \ud83d')
    words = [tokenise(f"{title} {text}") for title, text in passages]
    oracle = pytest.importorskip("bm25s").BM25(k1=1.2, b=0.75, dtype="float64")
    oracle.index(words, show_progress=False)
    for _ in range(100):
        query = rng.choices([f"w{i}" for i in range(31)], k=rng.randrange(1, 5))
        scores = disk.scores(" ".join(query))
        assert scores.tolist() == memory.scores(" ".join(query)).tolist()
        assert scores == pytest.approx(2.2 * oracle.get_scores(query), rel=1e-6)
        assert disk.top(" ".join(query), 9) == memory.top(" ".join(query), 9)
    texts = [found(open_search(f"bm25:{path}"), "w3 w4") for path in (where, tmp_path / "c.jsonl")]
    assert texts[0] == texts[1] and len(texts[0].text.splitlines()) == 5


def test_an_index_is_whole_or_not_there(tmp_path):
    """Half an index would answer for ever after with half of the passages."""
    corpus, out = corpus_file(tmp_path / "c.jsonl", *ROWS, "{"), tmp_path / "index"
    for argv, words in [
        ([str(corpus), "--out", str(out)], "line 5"),
        ([str(corpus), "--out", str(tmp_path)], "is there already"),
        ([str(corpus)], "index CORPUS --out DIR"),
        ([str(corpus), "more", "--out", str(out)], "index CORPUS --out DIR"),
        ([str(tmp_path), "--out", str(out)], "is a directory"),
        ([str(corpus), "--out", str(out / "in")], "there is no"),
    ]:
        with pytest.raises(ValueError, match=words):
            search.main(["index", *argv])
        assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]
    with pytest.raises(ValueError, match="is not an index"):
        open_search(f"bm25:{tmp_path}")


def test_a_damaged_index_is_not_searched(tmp_path):
    """Postings that a copy cut off would be missed for ever, without a word."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    search.main(["index", str(corpus_file(tmp_path / "c.jsonl", *ROWS)), "--out", str(whole)])
    for name in search.COLUMNS:
        size = (whole / name).stat().st_size
        for left in (0, size - 1, size - 8, size + 8):
            shutil.copytree(whole, cut)
            os.truncate(cut / name, left)
            with pytest.raises(ValueError, match="cut is damaged"):
                open_search(f"bm25:{cut}")
            shutil.rmtree(cut)


def test_ties_are_broken_by_the_order_of_the_corpus():
    """An unstable sort, or a cut among equals before the sort, would make two runs differ."""
    made = index([("Title", "one two three")] * 50 + [("Title", "one one one")])
    assert made.top("one", 4) == [50, 0, 1, 2]
    assert made.top("two", 3) == [0, 1, 2]
    assert made.top("two three", 5) == made.top("three two", 5)


def test_tokens_ignore_case_accents_and_punctuation():
    """A policy that writes "Zoe of Lodz" or "ZOË" must find Zoë; a query of punctuation finds nothing."""
    assert tokenise("Zoë's 1st CAFÉ, naïve_well-known") == [
        "zoe",
        "s",
        "1st",
        "cafe",
        "naive",
        "well",
        "known",
    ]
    assert tokenise("東京 2020") == ["東京", "2020"]
    made = index(PEOPLE)
    for query in ("zoe angstrom", "ZOË ÅNGSTRÖM", "naive cafe"):
        assert made.top(query, 1) == [2]
    assert made.top("?! _", 5) == made.top("", 5) == made.top("unheard", 5) == []


def test_documents_are_numbered_lines_best_first():
    """The form is a contract: the policy learns to read it and the simulator to write it."""
    assert index(PEOPLE).documents("who designed the Analytical Engine", 2) == (
        "Doc 1: (Title: Charles Babbage) Charles Babbage designed the Analytical Engine and never built it.\n"
        "Doc 2: (Title: Ada Lovelace) Ada Lovelace wrote the first program, for the Analytical Engine."
    )
    assert index(PEOPLE).documents("unheard", 2) == ""


def corpus_file(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def found(engine, text):
    """Run a search that answers at once."""
    with pytest.raises(StopIteration) as done:
        next(engine(Query(text, Question("q", ("a",)), (0, 0, 0, 0, 0))))
    return done.value.value


ROWS = [
    {"id": "0", "title": "Lima", "contents": '"Lima"\nLima is the capital\n\n of Peru.'},
    {"id": 1, "contents": '"Quito (city)"\nQuito is the capital of Ecuador.'},
    "",
    {"title": "Bogotá", "contents": "The capital of Colombia."},
]


def test_open_search_reads_every_usual_corpus(tmp_path):
    """The quoted title must neither be doubled in a document nor be lost where it is the only one."""
    path = corpus_file(tmp_path / "c.jsonl", *ROWS)
    zipped = tmp_path / "c.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, zipped):
        engine = open_search(f"bm25:{file}", count=1)
        assert found(engine, "capital of Peru") == Documents(
            "Doc 1: (Title: Lima) Lima is the capital of Peru."
        )
        assert found(engine, "quito").text == "Doc 1: (Title: Quito (city)) Quito is the capital of Ecuador."
        assert found(engine, "bogota").text == "Doc 1: (Title: Bogotá) The capital of Colombia."
    assert len(found(open_search(f"bm25:{path}"), "capital").text.splitlines()) == 3


def test_no_engine_gives_nothing():
    """The baseline is honest only if nothing stands between the information tags: not even an excuse."""
    assert found(open_search("none"), "capital of Peru") == Documents("")


@pytest.mark.parametrize(
    "line, what",
    [
        ('{"id": "1", "title": ', "is not JSON"),
        ("3", "not a JSON object"),
        ({"id": "1", "title": "Lima"}, '"contents"'),
        ({"id": "1", "title": "Lima", "contents": None}, '"contents"'),
        ({"id": "1", "contents": "no title anywhere"}, '"title"'),
        ({"id": "1", "title": 3, "contents": "text"}, '"title"'),
    ],
)
def test_a_broken_corpus_line_is_named_by_its_number(tmp_path, line, what):
    """One broken line among millions must be found at once, not skipped and not a traceback."""
    path = corpus_file(tmp_path / "c.jsonl", ROWS[0], "", line, ROWS[1])
    with pytest.raises(ValueError, match=f"c.jsonl, line 3: .*{what}"):
        open_search(f"bm25:{path}")


def test_other_bad_engines(tmp_path):
    """Each is one clear line; an unknown name must not fall back to another engine."""
    for spec in ("google", "bm25", "bm25:", "none:x", ""):
        with pytest.raises(ValueError, match="unknown search engine"):
            open_search(spec)
    with pytest.raises(ValueError, match="no passages"):
        open_search(f"bm25:{corpus_file(tmp_path / 'empty.jsonl', '')}")
    with pytest.raises(ValueError, match="no words"):
        open_search(f"bm25:{corpus_file(tmp_path / 'mute.jsonl', {'title': '?', 'contents': '!'})}")
    with pytest.raises(OSError, match=r"absent\.jsonl"):
        open_search(f"bm25:{tmp_path / 'absent.jsonl'}")
    with pytest.raises(ValueError, match="at least one document"):
        open_search("none", count=0)
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode() * 50)[:-20])
    with pytest.raises(ValueError, match="damaged"):
        open_search(f"bm25:{cut}")


def test_the_command_shows_documents_and_times(tmp_path, capsys):
    """The one-line demonstration in the file's opening must run as written."""
    search.main([str(corpus_file(tmp_path / "c.jsonl", *ROWS)), "capital", "of", "Peru"])
    shown = capsys.readouterr().out
    assert shown.startswith("Doc 1: (Title: Lima)") and "engine ready in" in shown
