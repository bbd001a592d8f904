"""The toy task: its facts, its engine, its texts, and the body that is shipped with it."""

import ast
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import model as models
import simulator
import tasks
import weights
from cli import flags
from prepare import rows as rows_of
from rollout import Documents, Limits, Query, Question, Trajectory, observation, prompt
from simulator import messages
from tokenizer import Tokenizer
from toy import make, texts, words
from toy.task import Task
from toy.world import (
    BEASTS,
    CHAINS,
    COLOURS,
    KIND,
    NAMES,
    RELATIONS,
    SHOWN,
    UNKNOWN,
    VALUES,
    World,
    fresh_questions,
    lookup_anywhere,
    number,
    parse,
    read,
    say,
)

LIMITS = Limits(*(Task.DEFAULTS[f"{name}-tokens"] for name in ("prompt", "episode", "turn", "observation")))
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    make.write_tokenizer(path)
    return Tokenizer.load(path)


def found(
    world: World, text: str, noise: float = 0.0, address: tuple[int, ...] = (0, 0, 0, 0, 0)
) -> Documents:
    """What the engine returns at once."""
    search = world.lookup(Query(text, Question("?", ("",)), address), noise)
    with pytest.raises(StopIteration) as end:
        next(search)
    return end.value.value


def test_facts_are_of_the_right_kind_and_another_seed_is_another_world():
    """Facts that survive a change of world could be learned by heart, and no search would be needed."""
    a, b = World(1), World(2)
    pairs = [(e, r) for r, (kind, _) in RELATIONS.items() for e in VALUES[kind]]
    assert all(a.fact(e, r) in VALUES[RELATIONS[r][1]] for e, r in pairs)
    assert sum(a.fact(e, r) == b.fact(e, r) for e, r in pairs) < 0.05 * len(pairs)
    assert a.fact(*pairs[0]) == World(1).fact(*pairs[0])


def test_the_first_entity_never_has_the_last_relation():
    """If it had, asking for it would be a valid query, and the simulator could not recognise the shortcut."""
    assert len(CHAINS) == 18
    for first, last in CHAINS:
        has, leads = RELATIONS[first]
        assert leads == RELATIONS[last][0] != has


def test_questions_are_distinct_and_answered_by_following_the_facts():
    """A question asked twice, or with a wrong gold, would bend every score."""
    world = World(3)
    questions = world.questions(300)
    assert len({q.text for q in questions}) == 300 == len(world.questions(300))
    assert 0.4 < sum(q.hops == 1 for q in questions) / 300 < 0.6
    for q in questions:
        entity, *relations = parse(q.text)
        assert len(relations) == q.hops and q.answers == (world.follow(entity, tuple(relations)),)
    with pytest.raises(ValueError, match="different questions"):
        world.questions(3000)


def test_lookup_states_the_fact_unless_it_is_noisy_or_cannot():
    """The real engine is what policies are judged by."""
    world, places = World(4), set()
    for i, q in enumerate(world.questions(60)):
        asked = parse(q.text)[:2]
        entity = asked[0]
        text = say(*asked)
        documents = found(world, text, address=(i,)).text
        assert read(documents, asked) == world.fact(*asked)
        assert len(documents.splitlines()) == SHOWN
        places.add([say(*asked) in line for line in documents.splitlines()].index(True))
        noisy = found(world, text, noise=1.0, address=(i,))
        assert noisy.noisy and entity not in noisy.text
        wrong = next(r for r in RELATIONS if RELATIONS[r][0] != KIND[entity])
        assert entity not in found(world, say(entity, wrong)).text
    assert places == {0, 1, 2}
    assert len(found(world, "what is going on?").text.splitlines()) == SHOWN
    assert found(world, "home Kalan", 0.5, (1,)) == found(world, "home Kalan", 0.5, (1,))


def test_a_collected_search_is_answered_in_its_questions_own_world():
    """Rows from one world would be learnt by heart; rows without a best-first order would not be learnt."""
    questions = fresh_questions(40, seed=5)
    assert questions == fresh_questions(40, seed=5) != fresh_questions(40, seed=6)
    assert len({q.id for q in questions}) == 40
    for q in questions:
        world, asked = World(int(q.id)), parse(q.text)
        assert q.answers == (world.follow(asked[0], asked[1:]),)
        query = Query(say(*asked[:2]), q, (0, 0, 1, 0, 0))
        useful, noisy = (_returned(lookup_anywhere(query, p)) for p in (0.0, 1.0))
        first = useful.text.splitlines()[0]
        assert first == f"Doc 1: {query.text} {world.fact(*asked[:2])}" and not useful.noisy
        assert noisy.noisy and asked[0] not in noisy.text
        ranked, shown = useful.text.splitlines(), found_in(world, query).text.splitlines()
        assert sorted(line[7:] for line in ranked) == sorted(line[7:] for line in shown)  # the same luck


def _returned(search) -> Documents:
    with pytest.raises(StopIteration) as end:
        next(search)
    return end.value.value


def found_in(world: World, query: Query) -> Documents:
    """What the world's own engine returns for the same query."""
    return _returned(world.lookup(query))


def test_every_word_is_one_token(tok):
    """A body of this size does not learn to copy names of several tokens."""
    names = [" " + w for w in [*NAMES, *RELATIONS, *COLOURS, *BEASTS, UNKNOWN]]
    assert all(len(tok.encode(w)) == 1 for w in [*names, *words.TAGS, *words.LABELS])
    assert tok.vocab_size < 900 and not tok.has_template
    assert tok.eos == {tok.encode(words.END, special=True)[0]}
    for text in ("Kalan, \u00e9t\u00e9 \n\n\n<think> x</think>  12", bytes(range(256)).decode("latin-1")):
        assert tok.decode(tok.encode(text)) == text


def test_transcripts_are_what_an_episode_would_write(tok):
    """A body pre-trained on other tokens than those of an episode would fail without an error."""
    rng, seen = random.Random(0), set()
    for _ in range(200):
        pieces = texts.transcript(rng)
        question = Question(pieces[0][0].removeprefix("Question: ").strip(), ("",))
        example = make.encode(tok, pieces)
        assert tok.encode(pieces[0][0]) == prompt(question, tok, words.WORDS)
        assert len(example.ids) <= LIMITS.episode and len(tok.encode(pieces[0][0])) <= LIMITS.prompt
        for text, sampled in pieces[1:]:
            ids = tok.encode(text)
            if sampled:
                assert len(ids) <= LIMITS.turn and text.endswith(("</search>", "</answer>"))
            else:
                documents = text.removeprefix("\n\n<information>").removesuffix("</information>\n\n")
                assert ids == observation(tok, documents, LIMITS.observation)
        seen.add(sum(not sampled for _, sampled in pieces[1:]))
    assert seen >= {0, 1, 2}  # searches


def test_the_simulators_texts_are_its_prompts(tok):
    """As above, for the other role; and OBEY = 1 is what the fine-tuning rows show."""
    rng = random.Random(0)
    for row in texts.rows(50):
        rows_of.check_row(row)
        order = words.SIM_WORDS, rows_of.row_query(row), row["quality"] == "noisy"
        asked = simulator.prompt(tok, *order)
        assert asked == tok.encode(messages(*order)[1]["content"])
        assert len(asked) + len(tok.encode(row["documents"])) < LIMITS.episode
        if row["quality"] == "noisy":
            assert parse(row["query"])[0] not in row["documents"]
    given, documents = texts.simulation(rng)
    assert not given[1] and documents[1] and documents[0].endswith(words.END)


def test_audit_tells_an_honest_simulator_from_one_that_always_gives_the_answer():
    """The figures are there to be believed: each must see what it is named after."""

    def honest(queries, noisy):
        # the world of the audit's searches is not known here: state some fact, golden only where it is proper
        return [number([f"{q.text} {texts.golden(q) or 'Kalan'}"] if not noisy else []) for q in queries]

    def leaky(queries, noisy):
        return [number([f"{q.text} {q.question.answers[0]}"]) for q in queries]

    good, bad = texts.audit(honest, 20), texts.audit(leaky, 20)
    assert good["useful_hit"] == 1 and good["noisy_hit"] == 0
    assert bad["leak"] == 1 and bad["noisy_hit"] == 1


def test_steps_of_the_bodys_training_depend_on_seed_and_step_alone(tok):
    """Else a run that was interrupted would end in another body."""
    step = make.STEPS - 1
    a, b = (list(make.texts_of(tok, step, 3)) for _ in range(2))
    assert a == b != list(make.texts_of(tok, step, 4))
    assert sum(len(t.ids) for t in a) >= make.TOKENS


@pytest.fixture
def small(monkeypatch):
    """Four steps of a body of one layer, saved after the second."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    monkeypatch.setattr(make, "BODY", make.BODY | shape)
    monkeypatch.setattr(make, "TOKENS", 256)
    stages = [(2, {texts.recall: 1.0}), (2, {texts.reading: 0.5, texts.transcript: 0.5})]
    monkeypatch.setattr(make, "STAGES", stages)
    monkeypatch.setattr(make, "STEPS", 4)
    monkeypatch.setattr(make, "SAVE", 2)


def interrupted(monkeypatch, out) -> None:
    """A run that is interrupted in its fourth step, the second after its state was saved."""
    real = make.train_step

    def tired(model, tok, opts, step, seed):
        if step == 3:
            raise KeyboardInterrupt
        return real(model, tok, opts, step, seed)

    with monkeypatch.context() as patch:
        patch.setattr(make, "train_step", tired)
        with pytest.raises(KeyboardInterrupt):
            make.make(out)


def test_an_interrupted_training_goes_on_to_the_same_body(small, tmp_path, monkeypatch):
    """Interruptible and step-bound: the body must not depend on the machine's speed or on luck.

    Compared in fp32, before the file is rounded to bf16: lost moments change little in four steps.
    """
    trained, save = [], weights.save_model
    monkeypatch.setattr(
        weights, "save_model", lambda model, out: (trained.append(model.state_dict()), save(model, out))
    )
    monkeypatch.setattr(models.Model, "to", lambda self, dtype: self)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make.make(whole)
    interrupted(monkeypatch, broken)
    assert (broken / "training.safetensors").exists()
    make.make(broken)
    a, b = trained
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for out in (whole, broken):
        assert not [f for f in out.iterdir() if "training" in f.name]


def test_a_state_of_another_seed_is_refused(small, tmp_path, monkeypatch):
    """A body begun with one seed and ended with another could not be made again."""
    interrupted(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="has --seed 0"):
        make.make(tmp_path, seed=1)


def test_the_tokenizer_that_is_written_is_the_shipped_one(tmp_path):
    """The shipped body knows its ids: another order of merges would scramble everything that it reads."""
    make.write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / "toy" / "body" / name).read_bytes()


def test_the_task_is_light():
    """Asking the task for questions must not import the script that made the body."""
    for path in (ROOT / "toy").glob("*.py"):
        if path.stem != "make":
            tree = ast.walk(ast.parse(path.read_text()))
            modules = [n.module for n in tree if isinstance(n, ast.ImportFrom)]
            modules += [a.name for n in tree if isinstance(n, ast.Import) for a in n.names]
            assert not {"torch", "toy.make"} & set(modules), path.name


def test_the_shipped_body_reads_and_guesses():
    """The shipped body must be what `python -m toy.make` makes: it reads nearly all facts, and knows none."""
    body, tok = weights.load("tiny"), Tokenizer.load(weights.resolve("tiny"))
    assert make.reading_accuracy(body, tok, 24, seed=1) > 0.95
    assert body.config.family == "qwen2" and replace(body.config).tied


def test_a_search_that_skips_a_hop_is_seen():
    """If RL lived off the simulator's leak, this figure would have to show it."""
    question = Question("mayor home Kalan?", ("Niham",), hops=2)
    first = ("home Kalan", "Doc 1: home Kalan Lowick\nDoc 2: home Tulan Merford")
    proper = Query("mayor Lowick", question, earlier=(first,))
    assert not texts.skips(proper) and not texts.skips(Query("home Kalan", question))
    assert texts.skips(Query("mayor Kalan", question)) and texts.skips(Query("mayor Lowick", question))
    assert texts.skips(Query("mayor Merford", question, earlier=(first,)))
    assert read("Doc 1: home Kalan", ("Kalan", "home")) == UNKNOWN  # cut off by a limit of tokens
    t = Trajectory(
        question, searches=[(proper, Documents("")), (Query("mayor Kalan", question), Documents(""))]
    )
    assert texts.skipping([t]) == 0.5 and texts.skipping([]) == 0


def test_a_copy_of_the_folder_is_another_task(tmp_path, monkeypatch):
    """A teacher who copies toy/ and changes the copy must not go on with the original, in any part of it."""
    shutil.copytree(ROOT / "toy", tmp_path / "zoo")
    world = tmp_path / "zoo" / "world.py"
    world.write_text(world.read_text().replace("SHOWN = 3", "SHOWN = 2"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tasks, "NAMES", ["toy", "zoo"])
    a = flags.settle("train", {"data": "zoo", "eval-questions": 3})
    assert (a.task, a.policy, a.data, a.steps) == ("zoo", "zoo/body", "zoo", 64)
    task = tasks.kind("zoo")(a)
    questions, held, engine = task.to_train()
    assert len(questions) == 1000 and len(held) == 3
    with pytest.raises(StopIteration) as end:
        next(engine(Query("home Kalan", questions[0])))
    assert len(end.value.value.text.splitlines()) == 2 == task.sim_words.count
    from zoo import make

    assert str(tmp_path / "zoo" / "body") in {f.default for group in make.FLAGS.values() for f in group}
    assert tasks.named("train", {"policy": "tiny"}) == "toy" and tasks.named("eval", {}) == "toy"


def test_another_body_is_made_from_the_finished_one(small, tmp_path, monkeypatch):
    """A variant of the world in minutes; in the shipped body's place it would spoil every other run."""
    home, out = tmp_path / "body", tmp_path / "hasty"
    make.make(home)
    monkeypatch.setattr(make, "HOME", home)
    monkeypatch.setattr(texts, "RETRY", texts.RETRY)
    seen, real = [], make.train_step
    monkeypatch.setattr(make, "train_step", lambda *a: (seen.append((a[3], texts.RETRY)), real(*a))[1])
    make.main(["--again", "1", "--retries", "0", "--out", str(out)])
    assert seen == [(3, 0.0)]  # the last step alone, with other texts
    old, new = (weights.load(path).state_dict() for path in (home, out))
    far = max((old[k].float() - new[k].float()).abs().max().item() for k in old)
    assert 0 < far < 0.2
    before = (home / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="needs a place of its own"):
        make.main(["--again", "1", "--out", str(home)])
    assert (home / "model.safetensors").read_bytes() == before
