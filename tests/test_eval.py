"""The scores against a second implementation written another way, question files, and whole evaluations.

The engine is scripted where the story counts, and a small random network where the command line does.
"""

import gzip
import json
import random

import pytest

import eval as evaluation
import model as models
import toy
from eval import evaluate, report, retrieval, summarise
from questions import cover_em, exact_match, f1, load_questions, normalise
from rollout import Documents, Limits, Question, Sampled, Stats, Words
from search import BM25

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
]  # fmt: skip


def random_text(rng):
    return rng.choice(["", " "]).join(rng.choice(PIECES) for _ in range(rng.randrange(6)))


def test_scores_equal_the_second_implementation():
    """A slip in lower-casing, punctuation, articles, spaces or multiplicity would show in 5,000 pairs."""
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


def test_no_answer_scores_zero_everywhere():
    """The paper's code crashes on None, and "" would be found in any text if emptiness were not looked at."""
    for answer in (None, "", "   ", "the", "?!"):
        for golds in (["Lima"], ["The The"], [""], []):
            assert f1(answer, golds) == exact_match(answer, golds) == cover_em(answer, golds) == 0.0


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
    assert load_questions(path, 2) == want[:2]
    zipped = tmp_path / "zipped.jsonl"  # told by its content, not by its name
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert load_questions(zipped) == want


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
    with pytest.raises(OSError, match=r"absent\.jsonl"):
        load_questions(tmp_path / "absent.jsonl")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-20])
    with pytest.raises(ValueError, match="damaged"):
        load_questions(cut)
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é", "answer": "x"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 1: "):
        load_questions(tmp_path / "latin.jsonl")


# ------------------------------------------------------------------------------------------------ evaluations


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text, special=False):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def chat(self, messages):
        return self.encode("".join(m["content"] for m in messages))


class Script:
    """An engine whose policy says what the script has for a question, turn by turn."""

    def __init__(self, script):
        self.script, self.temperatures = script, set()

    def run(self, generators, tell=None):
        results = []
        for generator in generators:
            results.append(self.play(generator))
            if tell:
                tell(len(results), len(self.script), Stats(seconds=1.0))
        return results

    def play(self, generator):
        turn, said = next(generator), 0
        lines = next(v for k, v in self.script.items() if k in Letters().decode(turn.ids))
        try:
            while True:
                self.temperatures.add(turn.temperature)
                ids = [ord(c) for c in lines[min(said, len(lines) - 1)]]
                said += 1
                turn = generator.send(Sampled(ids, [0.0] * len(ids), "stop"))
        except StopIteration as end:
            return end.value


def library(query):
    """A real engine that holds Peru's capital and nothing else."""
    return Documents("Doc 1: Lima is the capital of Peru." if "Peru" in query.text else "")
    yield


QUESTIONS = [
    Question("capital of Peru?", ("Lima",), "a", 1),
    Question("mayor of the capital of Peru?", ("Rafael",), "b", 2),
    Question("colour of nothing?", ("no colour", "none"), "c", 2),
]
SCRIPT = {
    "Q: capital of Peru": ["<search>Peru</search>", "<answer>Lima, I think</answer>"],
    "mayor": ["<search>Peru</search>", "<search>Lima</search>", "<answer>rafael</answer>"],
    "colour": ["I do not know"],
}
WORDS = Words("Q: {question}\n", "\n(use the tags)\n")
LIMITS = Limits(prompt=100, episode=2000, turn=200, observation=200, turns=3)


def test_evaluate_counts_every_question_once():
    """Defects 4 and 10: an episode without an answer crashed the scorer, the last batch was dropped, and
    evaluation sampled at temperature 1."""
    engine, told = Script(SCRIPT), []
    summary, trajectories = evaluate(
        engine, Letters(), QUESTIONS, library, LIMITS, WORDS, tell=lambda *a: told.append(a[:2])
    )
    assert [t.question for t in trajectories] == QUESTIONS
    assert [t.answer for t in trajectories] == ["Lima, I think", "rafael", None]
    assert engine.temperatures == {0.0}
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert summary == {
        "n": 3,
        "f1": pytest.approx((0.5 + 1 + 0) / 3),
        "em": pytest.approx(1 / 3),
        "cover_em": pytest.approx(2 / 3),
        "searches": pytest.approx(3 / 3),
        "found": pytest.approx(1 / 3),
        "ends": {"answer": 2, "turns": 1},
        "by_hop": {
            "1": {"n": 1, "f1": 0.5, "em": 0.0, "cover_em": 1.0, "searches": 1.0, "found": 1.0},
            "2": {"n": 2, "f1": 0.5, "em": 0.5, "cover_em": 0.5, "searches": 1.0, "found": 0.0},
        },
    }


def test_the_report_has_a_line_a_set_and_their_mean():
    """The paper averages over sets whatever their sizes: pooling would give the large sets more weight."""
    _, trajectories = evaluate(Script(SCRIPT), Letters(), QUESTIONS, library, LIMITS, WORDS)
    sets = {"one": summarise(trajectories[:1]), "rest": summarise(trajectories[1:])}
    lines = [line.split() for line in report(sets).splitlines()]
    assert lines[0] == ["n", "f1", "em", "cover_em", "searches", "found", "end:", "answer", "end:", "turns"]
    assert lines[1] == ["one", "1", "0.500", "0.000", "1.000", "1.000", "1.000", "1"]
    assert lines[3] == ["rest", "2", "0.500", "0.500", "0.500", "1.000", "0.000", "1", "1"]
    assert lines[5] == ["mean", "of", "sets", "3", "0.500", "0.250", "0.750", "1.000", "0.500"]


def test_retrieval_measures_the_engine_alone():
    """A miss of the engine must show as its own, not as the policy's."""
    passages = [("Lima", "the capital of Peru"), ("Quito", "the capital of Ecuador"), ("Rafael", "a mayor")]
    questions = [
        Question("capital of Ecuador", ("quito",)),
        Question("capital", ("Ecuador",)),  # a tie: the second passage
        Question("unheard of", ("Rafael",)),
    ]
    figures = retrieval(BM25(passages), questions, depths=(1, 2))
    assert figures.pop("ms") > 0
    assert figures == {"n": 3, "top 1": pytest.approx(1 / 3), "top 2": pytest.approx(2 / 3)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random body with the toy world's tokenizer: it answers nothing, so every figure is known."""
    path = tmp_path_factory.mktemp("body")
    toy.write_tokenizer(path)
    vocabulary = json.loads((path / "tokenizer.json").read_text())
    size = len(vocabulary["model"]["vocab"]) + len(vocabulary["added_tokens"])
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    rest = {"intermediate_size": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
    config = {"model_type": "qwen2", "vocab_size": size, "tie_word_embeddings": True} | shape | rest
    models.save_model(models.Model(models.Config.from_hf(config)).init(0), path)
    return str(path)


CORPUS_ROWS = [{"title": "Lima", "contents": "Lima is the capital of Peru."}]


def test_the_command_line_scores_a_checkpoint(checkpoint, tmp_path, capsys):
    """The flags and the names in the JSON file are what other programs rely on."""
    rows = [{"id": str(i), "question": f"q{i}", "answer": "Lima", "hops": 1 + i % 2} for i in range(5)]
    data, corpus = lines_file(tmp_path / "q.jsonl", *rows), lines_file(tmp_path / "c.jsonl", *CORPUS_ROWS)
    prompt = lines_file(tmp_path / "words.json", {"prompt": "{question}", "notice": " "})
    body = models.load(checkpoint)
    body.add_role(models.POLICY, 2, 4.0, 0)
    models.save_adapter(body, models.POLICY, tmp_path / "adapter")
    out = tmp_path / "out.json"
    flags = (
        f"--policy {checkpoint} --adapter {tmp_path}/adapter --data {data} --limit 4 --json {out} --seats 3"
    )
    flags += f" --search bm25:{corpus} --episode-tokens 200 --turns 1 --policy-prompt {prompt} --device cpu"
    evaluation.main(flags.split())
    result = json.loads(out.read_text())
    want = {"n": 4, "f1": 0.0, "em": 0.0, "cover_em": 0.0, "searches": 0.0}
    assert {k: result[k] for k in want} == want
    assert sum(result["ends"].values()) == 4 and set(result["by_hop"]) == {"1", "2"}
    assert [q["id"] for q in result["questions"]] == ["0", "1", "2", "3"]
    assert result["flags"]["limit"] == 4 and set(result["sets"]) == {"q"}
    assert capsys.readouterr().out.split()[:2] == ["n", "f1"]


@pytest.mark.parametrize("engine", ["toy", "none", "sim"])
def test_the_toy_world_needs_no_file(checkpoint, capsys, engine):
    """The embedded default: each engine answers the toy world's questions with nothing else on the disk."""
    flags = f"--policy {checkpoint} --search {engine} --limit 3 --seats 4 --device cpu"
    evaluation.main(flags.split())
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["toy", "3"]


def test_without_a_policy_the_engine_is_measured(tmp_path, capsys):
    """The share of answers found is the acceptance figure of an engine: it must need no checkpoint."""
    data = lines_file(tmp_path / "q.jsonl", {"question": "capital of Peru", "answer": "lima"})
    corpus = lines_file(tmp_path / "c.jsonl", *CORPUS_ROWS)
    evaluation.main(["--data", str(data), "--search", f"bm25:{corpus}"])
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["q", "1", "1.000"]


@pytest.mark.parametrize(
    "flags, what",
    [
        ("--search none", "needs a --policy"),
        ("--policy X --search google", "unknown search engine"),
        ("--policy X --search none --noise .5", "--noise is for"),
        ("--policy X --search toy --noise 1.5", "within 0..1"),
        ("--policy X --search none --sim X", "are for --search sim"),
        ("--policy X --search none --limit 0", "--limit must be at least 1"),
        ("--policy X --search none --seats 0", "--seats must be at least 1"),
        ("--policy X --search none --turns -1", "--turns must be at least 0"),
        ("--policy X --search none --json absent/x.json", "directory that exists"),
        ("--policy X --search none --data absent.jsonl", "absent.jsonl"),
        ("--policy absent --search none", "absent"),
        ("--policy X --search none --adapter absent", "absent"),
        ("--policy X --search none --data D,D", "names q twice"),
        ("--policy X --search none --data D --policy-prompt D", "must hold prompt and notice"),
        ("--policy X --search none --data D --episode-tokens 2", "the prompt of question"),
        ("--policy X --search none --data D --episode-tokens 9999", "longer than"),
    ],
)
def test_bad_flags_are_one_clear_line(checkpoint, tmp_path, flags, what):
    """Each would else end in a traceback, or in a figure of something else than was asked for."""
    data = lines_file(tmp_path / "q.jsonl", GOOD)
    words = [{"X": checkpoint, "D": str(data), "D,D": f"{data},{data}"}.get(w, w) for w in flags.split()]
    with pytest.raises((ValueError, OSError)) as error:
        evaluation.main([*words, "--device", "cpu"])
    assert what in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_flag_is_one_line_and_exit_code_2(capsys):
    """argparse's own three lines of usage hide the one that matters."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--search", "none", "--polcy", "x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


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
