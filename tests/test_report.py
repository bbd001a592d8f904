"""Intervals and tests by resampling against arithmetic, tables, the paper's figures, rows kept on disk."""

import json
import math
import random

import numpy as np
import pytest

from cli.disk import Rows
from eval import answered_before, kept
from evaluation import report
from evaluation.report import compare, figures, interval, p_value, papers, resampled, results
from questions import SETS
from rollout import Question, Trajectory


def row(score, of="q", number=0, **more):
    """An answered question whose three scores are the same."""
    base = {"set": of, "id": str(number), "question": f"question {number}", "hops": 0, "end": "answer"}
    base["golden_answers"] = ["x"]
    scores = {"f1": score, "em": score, "cover_em": score, "searches": 1, "found": 1.0, "seconds": 0.5}
    return base | scores | more


def rows_of(scores, of="q"):
    return [row(float(s), of, i) for i, s in enumerate(scores)]


def width(line):
    low, high = line["intervals"]["f1"]
    return high - low


def test_an_interval_is_as_wide_as_theory_says():
    """Resampling without replacement, or another count than n, would make each too narrow or too wide."""
    drawn = resampled(np.array([[0.0], [1.0]] * 200), 0, 4000)  # 400 coins: standard error .025
    ((low, high),) = interval(drawn)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)


def test_an_interval_without_a_width_is_none():
    """Five questions that all score alike would be printed as certain: .3, and nothing else is possible."""
    assert interval(resampled(np.array([[0.3]] * 9), 0, 50)) == [None]
    assert interval(resampled(np.array([[0.1], [0.3 - 0.2]]), 0, 50)) == [None]  # 0.1, but for rounding
    assert interval(resampled(np.array([[0.0, 0.0], [0.0, 1.0]]), 0, 50)) == [None, [0.0, 1.0]]
    text = results(figures(rows_of([1, 1, 1]) + rows_of([0, 1], "other"), 50), {}).splitlines()
    assert text[1].split()[:6] == ["q", "3", "1.000", "(-)", "1.000", "(-)"]
    assert text[2].split()[:4] == ["other", "2", "0.500", "(0.00-1.00)"]


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Swapped percentiles or 2.5 read as a share would show: 95 % of intervals must hold the mean they
    estimate."""
    rng, held = np.random.default_rng(0), 0
    for stream in range(200):
        ((low, high),) = interval(resampled(rng.random((60, 1)) ** 2, stream, 400))  # mean 1/3
        held += low <= 1 / 3 <= high
    assert 180 <= held <= 198


def test_figures_are_those_of_the_sets_and_of_their_mean():
    """Pooling would give large sets more weight than the paper does; resampling sets together would count
    questions that are not in them."""
    large, small = rows_of([0, 1] * 200, "large"), rows_of([1, 1, 0, 1] * 25, "small")
    whole = figures(large + small, 2000)
    assert whole["f1"] == pytest.approx((0.5 + 0.75) / 2) and whole["n"] == 500
    assert whole["sets"]["small"]["em"] == 0.75 and whole["sets"]["large"]["ends"] == {"answer": 400}
    assert whole["sets"]["small"]["seconds"] == 50 and whole["seconds"] == 250
    errors = [math.sqrt(p * (1 - p) / n) for p, n in ((0.5, 400), (0.75, 100))]
    assert width(whole) == pytest.approx(2 * 1.96 * math.hypot(*errors) / 2, rel=0.1)
    assert figures(large, 2000)["sets"]["large"] == whole["sets"]["large"]  # and the same at every call


@pytest.mark.parametrize(
    "differences, p",
    [
        ([0.2] * 5, 2 / 32),  # and not 2 / 10,001, as if five questions could say so much
        ([-0.2] * 5 + [0.0] * 400, 2 / 32),  # those that do not differ say nothing
        ([1.0] * 10 + [-1.0], 2 * (1 + 11) / 2048),  # of one size: the sign test
        ([0.4, 0.3, -0.1], 4 / 8),  # .6 and .8, either way; not .2 and 0
        ([0.1, 0.2, -0.3], 1.0),  # 0, but for rounding
        ([1.0] * 12, 2 / 4096),
        ([], 1.0),
        ([0.0] * 99, 1.0),
    ],
)
def test_a_p_value_by_hand(differences, p):
    """One-sided, blind to how few questions differ, or tripped by rounding, it would claim more than the
    questions say."""
    assert p_value(np.array(differences), 0) == pytest.approx(p)


def test_drawn_patterns_of_signs_agree_with_all_of_them(monkeypatch):
    """Beyond 12 questions patterns are drawn: p must stay what it was, and never be 0."""
    for n in range(5):
        differences = np.random.default_rng(n).random(12) - 0.3
        exact = p_value(differences, n)
        with monkeypatch.context() as patch:
            patch.setattr(report, "EXACT", 11)
            assert p_value(differences, n) == pytest.approx(exact, abs=4 * math.sqrt(exact / report.DRAWS))
    assert p_value(np.ones(60), 0, 999) == p_value(-np.ones(60), 0, 999) == 1 / 1000


def files(tmp_path, left, right):
    for name, rows in (("a", left), ("b", right)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"questions": rows}))
    return str(tmp_path / "a.json"), str(tmp_path / "b.json")


def test_runs_are_compared_question_by_question(tmp_path):
    """A small steady gain drowns in the spread between questions unless each is compared with itself, by what
    it is and not by where it stands in the file."""
    scores = [random.Random(i).random() * 0.8 for i in range(80)]
    left, right = rows_of(scores), rows_of([s + 0.1 for s in scores])
    random.Random(0).shuffle(right)
    lines = compare(*files(tmp_path, left, right), 500)
    assert lines["q f1"]["B - A"] == pytest.approx(0.1) and lines["q f1"]["95 %"] is None
    assert (
        lines["q em"]["p"] < 0.01
        and lines["q em"]["n"] == 80
        and set(lines) == {"q f1", "q em", "q cover_em"}
    )
    assert lines["q f1"]["A"] == pytest.approx(np.mean(scores))


def test_each_score_has_its_own_interval(tmp_path):
    """The interval of one score beside the mean of another would look as sound as its own."""
    rng = random.Random(0)
    left = [row(0.0, number=n) for n in range(40)]
    right = [old | {"f1": rng.uniform(0.1, 0.3), "cover_em": rng.uniform(0.6, 0.9)} for old in left]
    lines = compare(*files(tmp_path, left, right), 200)
    for score in ("f1", "cover_em"):
        low, high = lines[f"q {score}"]["95 %"]
        assert low < lines[f"q {score}"]["B - A"] < high


def test_chance_alone_is_not_found_significant(tmp_path):
    """Two runs that differ by luck must differ at p < .05 in about one case of twenty."""
    small = 0
    for n in range(60):
        rng = random.Random(n)
        pair = [rows_of([rng.random() < 0.4 for _ in range(100)]) for _ in range(2)]
        small += compare(*files(tmp_path, *pair), 200)["q f1"]["p"] < 0.05
    assert small <= 9


def test_the_mean_of_sets_is_compared_too(tmp_path):
    """Sets count alike: ten questions worse in one set outweigh a hundred slightly better ones in another."""
    left = rows_of([0.5] * 100, "large") + rows_of([0.9] * 10, "small")
    right = rows_of([0.6] * 100, "large") + rows_of([0.5] * 10, "small")
    lines = compare(*files(tmp_path, left, right), 100)
    assert lines["large f1"]["B - A"] == pytest.approx(0.1)
    assert lines["mean of sets f1"]["B - A"] == pytest.approx((0.1 - 0.4) / 2)
    text = report.comparison(lines).splitlines()
    assert text[0].split() == ["n", "A", "B", "B", "-", "A", "95", "%", "p"]
    assert text[1].split()[:7] == ["large", "f1", "100", "0.500", "0.600", "+0.100", "-"]


def test_the_same_question_twice_is_two_pairs(tmp_path):
    """A set that repeats a question would lose a pair if rows were keyed by their text alone."""
    twice = [row(0.0, number=1), row(1.0, number=1)]
    assert compare(*files(tmp_path, twice, twice), 20)["q f1"]["n"] == 2


@pytest.mark.parametrize(
    "right, what",
    [
        (rows_of([1, 1]), "1 questions are in .*a.json alone, the first is 'question 2' of q"),
        (rows_of([1, 1, 1, 1]), "b.json alone, the first is 'question 3'"),
        (rows_of([1, 1, 1], "other"), "3 questions are in .*a.json alone"),
        ([], "b.json holds no answered questions"),
        ({"q": 1}, "b.json holds no answered questions"),
    ],
)
def test_other_questions_cannot_be_compared(tmp_path, right, what):
    """Means of different questions differ for reasons of their own."""
    with pytest.raises(ValueError, match=what):
        compare(*files(tmp_path, rows_of([0, 1, 0]), right))


def test_a_file_that_is_no_result(tmp_path):
    """A corpus or a missing file must be named, not end in a traceback."""
    (tmp_path / "x.json").write_text("{")
    for path in ("x.json", "absent.json"):
        with pytest.raises(ValueError, match=path):
            compare(str(tmp_path / path), str(tmp_path / path))


def test_the_papers_figures_are_copied_right():
    """A slip of the pen in one of 48 figures: each row's average is that of its seven sets."""
    for body, (*sets, mean) in report.TRAINED.items():
        assert len(sets) == len(SETS) and sum(sets) / 7 == pytest.approx(mean, abs=0.006), body


def test_the_papers_figures_stand_beside_their_own_model_alone():
    """A 0.5B model beside the paper's 3B, or base beside instruct, would mislead."""
    assert papers("3b", "agent")["nq"] == pytest.approx(0.414)
    assert papers("3b-base", "agent")["nq"] == pytest.approx(0.430)
    assert papers("meta-llama/Llama-3.2-3B", "agent")["bamboogle"] == pytest.approx(0.1528)
    assert papers("/data/models/Qwen2.5-7B-Instruct", "agent")["mean of sets"] == pytest.approx(0.3908)
    assert papers("0.5b", "agent") == papers("tiny", "agent") == papers("7b", "rag") == {}
    assert papers("3b", "rag") == {"mean of sets": 0.2509}


def test_a_table_has_a_line_a_set_and_the_papers_column_where_it_has_one():
    """The paper's mean of seven sets beside ours of two would compare different things."""
    two = figures(rows_of([0, 1], "nq") + rows_of([1, 1], "mine"), 50)
    lines = [line.split() for line in results(two, papers("3b", "agent")).splitlines()]
    head = ["n", "f1", "em", "cover_em", "paper", "searches", "found", "seconds", "ends"]
    assert lines[0] == head
    assert lines[1][:2] == ["nq", "2"] and "0.414" in lines[1] and "0.414" not in lines[2]
    assert lines[3][:4] == ["mean", "of", "sets", "4"] and "0.317" not in lines[3]
    assert lines[-1][0] == "paper:"
    seven = figures([r for name in SETS for r in rows_of([0, 1], name)], 50)
    assert "0.317" in results(seven, papers("3b", "agent")).splitlines()[8]
    assert "paper" not in results(two, {}) and "paper" not in results(two, papers("0.5b", "agent"))


def test_what_no_question_of_a_set_tells_is_a_dash():
    """A set of yes / no questions has no share of documents that hold the answer: 0 would blame the engine,
    and pull down the mean of sets."""
    yes_no = [row(1.0, "asks", i, found=None) for i in range(3)]
    whole = figures([*yes_no, *rows_of([1, 0], "q"), row(1.0, "q", 2, found=None)], 50)
    assert whole["sets"]["asks"]["found"] is None and whole["sets"]["q"]["found"] == whole["found"] == 1.0
    lines = results(whole, {}).splitlines()[1:4]
    assert [line.split()[-4] for line in lines[:2]] == ["-", "1.000"] and lines[2].split()[-2] == "1.000"
    assert figures([*yes_no, row(1.0, "too", found=None)], 50)["found"] is None


# ----------------------------------------------------------------------------------------------- rows on disk

QUESTIONS = [Question(f"question {i}", ("x",), str(i)) for i in range(4)]
FLAGS = {"policy": "tiny", "episode_tokens": 9}


def ledger(path, resume=False, flags=FLAGS):
    return Rows(f"{path}.part", flags, resume, key=lambda row: (row["set"], row["number"]))


def test_what_was_answered_survives_a_cut(tmp_path):
    """Hours of a 3B body's answers must outlive a kill, the half line that was being written excepted."""
    path = tmp_path / "out.json"
    book = ledger(path)
    for number in (2, 0):
        book.add(row(1.0, "q", number) | {"number": number, "answer": "Łódź \ud800\n\x85\u2028"})
    with open(book.path, "a") as file:
        file.write('{"set": "q", "numb')
    again = ledger(path, resume=True)
    assert answered_before(again, "q", QUESTIONS) == {0, 2}
    assert answered_before(again, "other", QUESTIONS) == set()
    again.add(row(0.0, "q", 1) | {"number": 1})
    whole = ledger(path, resume=True).rows
    assert sorted(whole) == [("q", 0), ("q", 1), ("q", 2)]
    assert whole["q", 2]["answer"] == "Łódź \ud800\n\x85\u2028"


def test_seconds_add_up(tmp_path, monkeypatch):
    """Episodes overlap: only the time between rows can be summed, over a resumption too."""
    times = iter([11.0, 14.0, 101.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))

    def ended(question):
        return Trajectory(question, end="answer")
        yield

    for first, began, numbers in ((True, 10.0, (0, 1)), (False, 100.0, (2,))):
        book, clock = ledger(tmp_path / "x", resume=not first), [began]
        for number in numbers:
            list(kept(ended(QUESTIONS[number]), book, "q", number, clock))
    assert [r["seconds"] for r in ledger(tmp_path / "x", resume=True).rows.values()] == [1.0, 3.0, 1.5]


def test_only_the_same_run_is_resumed(tmp_path):
    """Rows of another policy, other limits or other questions would be reported as this one's."""
    path = tmp_path / "out.json"
    ledger(path).add(row(1.0, "q", 1) | {"number": 1})
    with pytest.raises(ValueError, match="unfinished run: add --resume"):
        ledger(path)
    with pytest.raises(ValueError, match="another --episode-tokens"):
        ledger(path, True, FLAGS | {"episode_tokens": 8})
    for questions in (QUESTIONS[:1], QUESTIONS[::-1]):
        with pytest.raises(ValueError, match="other questions in q"):
            answered_before(ledger(path, True), "q", questions)
    for text in ("{}\n", "[]\n", '{"flags": {"policy": "tiny", "episode_tokens": 9}}\n{}\n', "x\n"):
        (tmp_path / "out.json.part").write_text(text)
        with pytest.raises(ValueError, match="not an unfinished run"):
            ledger(path, True)


def test_several_seeds_are_compared_by_their_mean_over_each_question(tmp_path):
    """Three seeds of one question are not three questions: taken as such, any difference looks certain."""
    ones, halves = rows_of([1, 1, 0, 0]), rows_of([0, 1, 0, 1])
    a, b = files(tmp_path, ones, halves)
    lines = compare(f"{a},{b}", a, 100)
    assert lines["q f1"]["n"] == 4 and lines["q f1"]["A"] == pytest.approx(0.5)
    assert lines["q f1"]["B - A"] == 0.0 and lines["q f1"] == compare(f"{b},{a}", a, 100)["q f1"]
    (tmp_path / "c.json").write_text(json.dumps({"questions": rows_of([1, 0])}))
    with pytest.raises(ValueError, match="2 questions are in"):
        compare(f"{a},{tmp_path / 'c.json'}", b)
