"""The engine and the episode: scripted turns for the story, a small random network for the arithmetic."""

import random
import re
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType

import numpy as np
import pytest
import torch
from conftest import two_roles

import engine as engine_file
import kernels
import rollout
from engine import Engine, Pool, bucket
from eval import live
from evaluation.live import shown
from kernels import linear_logp
from model import POLICY, SIMULATOR, Config, Stack
from rollout import (
    DOCUMENTS,
    TOKENS,
    Documents,
    Limits,
    Question,
    Sampled,
    Turn,
    Words,
    coin,
    episode,
    fill,
    uniforms,
)


class Letters:
    """A tokenizer of one token a byte, without a chat template; token 0 ends a turn."""

    eos, vocab_size, has_template = frozenset({0}), 128, False

    def encode(self, text, special=False):
        return list(text.encode("ascii", "replace"))

    def decode(self, ids):
        return bytes(i for i in ids if i).decode()

    def token_bytes(self, i):
        return bytes([i])

    def chat(self, messages):
        return self.encode("".join(m["content"] for m in messages))


TOK = Letters()
WORDS = Words(prompt="Q: {question}\n", notice="\n(use the tags)\n")
LIMITS = Limits(prompt=100, episode=1000, turn=200, observation=120, turns=3)
QUESTION = Question("who wrote Emma", ("Jane Austen",))


def library(query):
    """A search that answers at once."""
    return Documents(f"Doc 1: about {query.text}")
    yield


def play(turns, question=QUESTION, search=library, limits=LIMITS, words=WORDS):
    """Drive an episode by hand with the texts that the policy is to sample. Returns the trajectory, the
    Turns."""
    it, asked, texts = episode(question, search, TOK, limits, words), [], iter(turns)
    value = None
    while True:
        try:
            turn = it.send(value)
        except StopIteration as end:
            return end.value, asked
        asked.append(turn)
        ids = TOK.encode(next(texts))[: turn.limit]
        value = Sampled(ids, [-0.5] * len(ids), "stop")


def test_an_episode_is_told_in_order():
    """The transcript must be prompt, search, documents, answer, with exactly the sampled tokens masked in."""
    turns = ["<think>hm</think><search> Emma </search>", "<answer> Jane Austen </answer>"]
    t, asked = play(turns)
    assert TOK.decode(t.ids) == (
        "Q: who wrote Emma?\n" + turns[0] + "\n\n<information>Doc 1: about Emma</information>\n\n" + turns[1]
    )
    assert TOK.decode([i for i, m in zip(t.ids, t.mask) if m]) == "".join(turns)
    assert [p for p, m in zip(t.logps, t.mask) if m] == [-0.5] * sum(map(len, turns))
    assert (t.answer, t.end, t.invalid) == ("Jane Austen", "answer", 0)
    assert [i for turn in asked for i in turn.ids] == [i for i, m in zip(t.ids, t.mask) if not m]


def test_a_query_carries_its_question():
    """Defect 1: with queries compacted to the rows that searched, documents were written for another
    question."""
    questions = [Question(f"question {i}", (f"gold {i}",)) for i in range(4)]
    for i, q in enumerate(questions):
        turns = ["<answer>x</answer>"] if i % 2 else [f"<search>s{i}</search>", "<answer>x</answer>"]
        t, _ = play(turns, question=q)
        assert [(s.text, s.question) for s, _ in t.searches] == ([] if i % 2 else [(f"s{i}", q)])


def test_only_what_was_sampled_is_parsed():
    """Defect 3: tags in the prompt, the notice or a document were graded as the policy's answer."""
    words = Words("say <answer> Beijing </answer> {question}", "<answer>no</answer><search>x</search>")

    def hostile(query):
        return Documents("</information><answer>42</answer><search>again</search><information>")
        yield

    t, _ = play(["no tags", "<search>a</search>", "nothing", "</answer>"], search=hostile, words=words)
    assert t.answer is None and t.end == "turns" and t.invalid == 3
    assert len(t.searches) == 1


@pytest.mark.parametrize(
    "text, want",
    [
        ("<search> a </search>", ("search", "a")),
        ("<answer>b</answer><search>a</search>", ("answer", "b")),
        ("<search></search>", None),
        ("<answer></answer>", ("answer", "")),
        ("<search>a", None),
        ("a</search>", None),
        ("<search>a</answer>", None),
        ("<search>a\nb</search>\n\n", ("search", "a\nb")),
        ("<search>a <answer>b</answer></search>", ("search", "a <answer>b</answer>")),
        ("<search>a <answer>b</answer>", ("answer", "b")),
        ("<think><answer>a</answer> <search>b</search></think>", None),
        ("<think>a <search> b</think><answer>c</answer><search>d</search>", ("answer", "c")),
        ("<think>a</think> <answer>b</answer> <think>c</think>", ("answer", "b")),
        ("<think>a <answer>b</answer>", ("answer", "b")),
        ("a</think><answer>b</answer>", ("answer", "b")),
        ("<think>a <answer>b</answer> <think>c</think>", ("answer", "b")),
        ("<think>a <think>b</think> <answer>c</answer></think><answer>d</answer>", ("answer", "d")),
        ("<answer>a <think>b</think></answer>", ("answer", "a <think>b</think>")),
    ],
)
def test_the_first_whole_block_is_the_action(text, want):
    """A half-open block, an empty query, a second block or what a closed thought weighs must not be taken for
    the action; a thought that a base model never closes must not hide it."""
    assert rollout.action(text) == want


def test_the_last_generation_can_only_answer():
    """Defect 11: the last turn called the simulator and threw its documents away."""
    calls = []

    def counted(query):
        calls.append(query)
        return Documents("d")
        yield

    t, asked = play(["<search>a</search>"] * 4, search=counted)
    assert len(calls) == 3 and len(asked) == 4 and t.end == "turns" and t.answer is None


def test_earlier_searches_travel_with_the_query():
    """A simulator that cannot see what it said before contradicts itself."""
    t, _ = play(["<search>a</search>", "<search>b</search>", "<answer>x</answer>"])
    assert t.searches[1][0].earlier == (("a", "Doc 1: about a"),)
    assert t.searches[1][0].address[-1] == 1


def test_lengths_are_cut_so_that_tags_close_and_an_answer_fits():
    """Defect 9: cutting a rollout at one end lost the question, at the other the answer."""

    def long(query):
        return Documents("x" * 5000)
        yield

    for episode_limit in range(180, 700, 37):
        limits = Limits(prompt=100, episode=episode_limit, turn=60, observation=300, turns=9)
        t, asked = play(["<search>abc</search>"] * 12, search=long, limits=limits)
        text = TOK.decode(t.ids)
        assert len(t.ids) <= episode_limit and text.startswith("Q: who wrote Emma?")
        assert text.count("<information>") == text.count("</information>") == len(t.searches)
        assert asked[-1].limit >= 60 and t.end in ("turns", "tokens")


def test_a_query_that_is_not_closed_ends_with_its_turn():
    """A query with an answer block in it goes on to its own tag, but no token beyond the limit of the turn:
    those would be taken from the room of the answer."""
    text = "<search>who <answer>wrote</answer>"
    for more in (0, 3):
        limits = Limits(prompt=100, episode=1000, turn=len(text) + more, turns=0)
        t, asked = play([text, "xyz</search>"], limits=limits)
        assert [turn.limit for turn in asked] == [len(text) + more, more][: 1 + bool(more)]
        assert sum(t.mask) == len(text) + more


def test_a_prompt_over_the_limit_is_an_error():
    """A truncated question would be another question."""
    with pytest.raises(ValueError, match="tokens, over 100"):
        play([], question=Question("x" * 200, ("a",)))


def test_fill_looks_once():
    """A question that holds a placeholder must not pull the answer into the prompt."""
    assert fill("{question} {x} {answer}", question="{answer}", answer="7") == "{answer} {x} 7"


def test_randomness_has_an_address():
    """Two runs, or one run with other seats, must draw the same numbers; two addresses different ones."""
    a = uniforms((0, 1, 2, 3, 0, TOKENS), 5)
    assert np.array_equal(a, uniforms((0, 1, 2, 3, 0, TOKENS), 9)[:5])
    others = [
        (0, 1, 2, 3, 1, TOKENS),
        (0, 1, 2, 3, 0, DOCUMENTS),
        (1, 1, 2, 3, 0, TOKENS),
        (0, 1, 3, 2, 0, TOKENS),
    ]
    assert all(not np.array_equal(a, uniforms(o, 5)) for o in others)
    assert 0.4 < np.mean([coin((0, s, q, 0, 0)) for s in range(20) for q in range(20)]) < 0.6


# ------------------------------------------------------------------------------------------------- the engine

SHAPE = Config("qwen2", vocab=128, d=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, context=512)


@pytest.fixture(scope="module")
def body():
    """A random body whose two roles differ."""
    return two_roles(SHAPE)


def writer(query):
    """A simulator: documents by the same body, in the other role."""
    sampled = yield Turn(
        TOK.encode(f"D {query.text}:"), SIMULATOR, 12, 0.8, (";",), (*query.address, DOCUMENTS)
    )
    return Documents(TOK.decode(sampled.ids))


def wanderer(n, rng_seed, log=None):
    """A multi-turn generator with turns of forced kinds: random prompts, searches, its own seat."""
    rng, ids, logps, given = random.Random(rng_seed), [], [], TOK.encode("the same prompt for all siblings ")
    context = object()
    for call in range(3):
        address = (0, 0, n, 0, call)
        sampled = yield Turn(given, POLICY, rng.randint(3, 20), 1.0, ("e", "ab"), (*address, TOKENS), context)
        ids, logps = ids + given + sampled.ids, logps + [None] * len(given) + sampled.logps
        query = rollout.Query(f"{n}.{call}", QUESTION, address)
        documents = (yield from writer(query)).text if rng.random() < 0.7 else "none"
        given = TOK.encode(f"[{documents}]")
    return ids, logps


def roam(body, seats, n=12, **more):
    engine = Engine({POLICY: (body, TOK), SIMULATOR: (body, TOK)}, seats, 400, **more)
    return engine.run([wanderer(i, i) for i in range(n)]), engine.stats


def test_seats_change_no_result(body):
    """Continuous batching, swaps of rows and shared prompts are only speed: any number of seats must give the
    same trajectories (fp32)."""
    want, stats = roam(body, 64)
    assert stats.shared > 0
    for seats, prefill in ((2, 8192), (3, 16), (7, 100)):
        got, _ = roam(body, seats, prefill=prefill)
        assert [g[0] for g in got] == [w[0] for w in want]


@pytest.mark.parametrize("seats", [1, 3, 64])
@pytest.mark.parametrize("shared", [True, False])
def test_turns_of_siblings_are_the_same_in_any_company(body, monkeypatch, seats, shared):
    """Several turns of one seat each, prompts lent to siblings or not: ids and log-probs (fp32)."""

    def talker(n):
        context, given, out = object(), TOK.encode("the same prompt for all siblings "), []
        for call in range(3):
            turn = Turn(given, POLICY, 4 + 5 * (n * call % 4), 1.0, ("e",), (n, call, TOKENS), context)
            out.append((yield turn))
            given = TOK.encode(f"[{call}]")
        return [i for s in out for i in s.ids], [logp for s in out for logp in s.logps]

    def talk(seats):
        engine = Engine({POLICY: (body, TOK)}, seats, 200)
        return engine.run(map(talker, range(9))), engine.stats.shared

    want, copied = talk(64)
    assert copied > 0
    if not shared:
        monkeypatch.setattr(Pool, "prefixes", lambda pool, seat: [])
    got, copied = talk(seats)
    assert [g[0] for g in got] == [w[0] for w in want] and (copied > 0) == (shared and seats > 1)
    assert max(abs(a - b) for g, w in zip(got, want) for a, b in zip(g[1], w[1])) < 1e-4


def test_one_seat_is_enough_for_one_role(body):
    """With a single seat episodes come one after the other: what they sample must not depend on company."""

    def alone(n):
        sampled = yield Turn(TOK.encode("said alone"), POLICY, 9, 1.0, (), (n, TOKENS))
        return sampled.ids

    one, many = (Engine({POLICY: (body, TOK)}, seats, 64).run(map(alone, range(5))) for seats in (1, 64))
    assert one == many and len(set(map(tuple, one))) > 1


def test_shared_prompts_change_no_result(body, monkeypatch):
    """A sibling's copy of a prompt must be what its own prefill would have made."""
    want, _ = roam(body, 5)
    monkeypatch.setattr(Pool, "prefixes", lambda pool, seat: [])
    got, stats = roam(body, 5)
    assert stats.shared == 0 and [g[0] for g in got] == [w[0] for w in want]


@pytest.mark.parametrize("seats", [3, 64])
@pytest.mark.parametrize("page", [1, 4])
def test_prompts_that_begin_alike_are_fed_once(body, monkeypatch, page, seats):
    """The simulator's prompts differ at their ends alone. Two of them in one call, of which one may begin the
    other, or one whose lender has gone: each must read what it would have been fed."""
    stem = TOK.encode("Write documents that answer the query. ")

    def asker(n):
        given = stem + TOK.encode(["", "Who?", "Who? And who?", "When?"][n % 4])
        said = yield Turn(given, POLICY if n % 3 else SIMULATOR, 3 + n % 7, 1.0, (), (n, TOKENS))
        more = yield Turn(stem[: 9 + n], SIMULATOR, 4, 1.0, (), (n, DOCUMENTS), object())
        return said.ids + more.ids

    def ask():
        engine = Engine({POLICY: (body, TOK), SIMULATOR: (body, TOK)}, seats, 100)
        said = engine.run(map(asker, range(17)))
        pool = engine.pools[POLICY]
        assert not pool.prompts, "who has gone cannot lend"
        return said, engine.stats

    _, whole = ask()  # no prompt has a page of 64
    monkeypatch.setattr(engine_file, "PAGE", page)
    got, stats = ask()
    monkeypatch.setattr(Pool, "prefixes", lambda pool, seat: [])
    want, all_fed = ask()
    assert got == want and stats.prefilled + stats.shared == all_fed.prefilled
    assert stats.shared > whole.shared


@pytest.mark.parametrize("seats", [9, 64])
@pytest.mark.parametrize("patience", [1, 2])
def test_turns_that_wait_for_company_say_the_same(body, monkeypatch, patience, seats):
    """On a GPU turns are fed when there are enough of them. The last one must not wait for ever, and nobody
    may say anything else for it."""
    (want, alone), fed, extend = roam(body, seats, n=24), [], Pool.extend
    monkeypatch.setattr(Pool, "extend", lambda pool, *a: (fed.append(1), extend(pool, *a)))
    at_once = roam(body, seats, n=24) and len(fed)
    monkeypatch.setattr(kernels, "compiled", lambda x: True)
    monkeypatch.setattr(engine_file, "PATIENCE", patience)
    monkeypatch.setattr(Pool, "replay", lambda pool, n: pool.decode(n, pool.capacity, pool.role[:n]))
    fed.clear()
    got, together = roam(body, seats, n=24)
    assert [g[0] for g in got] == [w[0] for w in want] and len(fed) < at_once
    assert together.decoded == alone.decoded and together.steps >= alone.steps


def test_a_freed_row_is_empty(body, monkeypatch):
    """A CUDA graph also computes rows that are not busy: with the length of whoever sat there, attention
    reads thousands of keys for nothing."""
    step = Pool.step

    def checked(pool, stats):
        ended = step(pool, stats)
        assert not pool.numbers[:, pool.busy :].any() and pool.length[: pool.busy].all()
        return ended

    monkeypatch.setattr(Pool, "step", checked)
    assert len(roam(body, 5)[0]) == 12


@pytest.mark.parametrize("more", [2, 64])
def test_rows_that_are_not_on_change_nothing(body, monkeypatch, more):
    """On a GPU a step takes more rows than are busy, whole seats, and a role a row, as a CUDA graph wants its
    shapes fixed. The rows beyond are other episodes' histories: writing there would change what they say.
    64 more are every seat, at every step: the batch is not kept compact."""
    want, _ = roam(body, 7)
    sizes = set()

    def replay(pool, n):
        n = min(bucket(n + more), len(pool.rows))
        sizes.add(n - pool.busy)
        pool.decode(n, pool.capacity, pool.role[:n], pool.on[:n])

    monkeypatch.setattr(kernels, "compiled", lambda x: True)
    monkeypatch.setattr(Pool, "replay", replay)
    got, _ = roam(body, 7)
    assert [g[0] for g in got] == [w[0] for w in want] and max(sizes) > 1


def test_buckets_are_few_and_close():
    """Too coarse ones waste a GPU's time on rows that are not there, too fine ones record a graph a step."""
    sizes = {bucket(n) for n in range(1, 321)}
    assert len(sizes) < 32 and all(n <= bucket(n) < 1.25 * n for n in range(1, 321))


def test_sampled_logps_are_those_of_a_full_pass(body):
    """Defects 5 and 7: text was tokenised again before training, and sampled from a truncated distribution.
    Either makes a gap between sampling and training log-probs, and every ratio wrong."""
    for ids, logps in roam(body, 5)[0]:
        x = torch.tensor(ids)
        with torch.no_grad():
            want, _ = linear_logp(body(x[None], POLICY)[0, :-1], body.head, x[1:])
        for i, logp in enumerate(logps):
            if logp is not None:
                assert abs(logp - want[i - 1].item()) < 1e-4


def test_no_history_is_fed_twice(body):
    """Defect 11: the whole history was prefilled again at every turn. A turn must cost what is new in it."""

    def talk(n):
        context, total = object(), 0
        for call in range(5):
            ids = TOK.encode(f"turn {call} of {n} " * 3)
            sampled = yield Turn(ids, POLICY, 7, 1.0, (), (n, call, TOKENS), context)
            total += len(ids) + len(sampled.ids)
        return total

    engine = Engine({POLICY: (body, TOK)}, 4, 400)
    held = sum(engine.run([talk(n) for n in range(6)]))
    fed = engine.stats.prefilled + engine.stats.decoded
    assert engine.stats.shared == 0 and held - 6 * 5 <= fed <= held + 6 * 5


def test_stops_limits_and_ends(body):
    """Decoding that ran past the closing tag, or stopped before it, would feed the policy nonsense."""
    ends = set()

    def one(n, stops):
        sampled = yield Turn(TOK.encode("hello"), POLICY, 40, 1.0, stops, (0, 0, n, 0, 0, TOKENS))
        return sampled

    engine = Engine({POLICY: (body, TOK)}, 8, 100)
    for stops in (("e",), ("ab",), ("q>",), ()):
        for s in engine.run([one(n, stops) for n in range(30)]):
            text = TOK.decode(s.ids)
            ends.add(s.end)
            assert len(s.ids) == len(s.logps) <= 40
            assert not any(x in text[:-1] for x in stops) and 0 not in s.ids[:-1]
            if s.end == "stop":
                assert text.endswith(stops)
            assert (s.end == "eos") == (s.ids[-1] == 0) and (s.end != "limit" or len(s.ids) == 40)
    assert ends == {"stop", "eos", "limit"}


class Merged(Letters):
    """As in real vocabularies, tags share tokens with what stands around them."""

    pieces = MappingProxyType(dict(enumerate(("h>\n\n", "></", "r></", "k><", "h>.", "answe", "thin"), 1)))

    def encode(self, text, special=False):
        ids = {piece: i for i, piece in self.pieces.items()}
        longest = "|".join(sorted(map(re.escape, ids), key=len, reverse=True))
        return [ids.get(p) or ord(p) for p in re.findall(f"{longest}|.", text, re.DOTALL)]

    def decode(self, ids):
        return "".join(self.pieces.get(i, chr(i)) for i in ids if i)

    def token_bytes(self, i):
        return self.decode([i]).encode()


class Script:
    """A network that says a fixed text: the next token depends on how many tokens came before."""

    device, dtype, config = torch.device("cpu"), torch.float32, SHAPE
    cos = torch.zeros(512, 4)

    def __init__(self, says, prompt):
        self.says, self.prompt = says, prompt

    def pack(self, rows):
        pass

    def stacked(self, old):
        return Stack([], [1.0, 1.0], torch.ones(2), torch.arange(1, 3))

    def __call__(self, ids, role, window, lora):
        at = window.start + (1 if window.lens is None else window.lens) - self.prompt
        return at[:, None, None].float()

    def logits(self, h):
        return (
            torch.nn.functional.one_hot(torch.tensor([self.says[int(i)] for i in h[:, 0]]), 128).float() * 99
        )


def test_a_closing_tag_merged_with_newlines_stops():
    """In Qwen's vocabulary `>` and the newlines after it are one token: a fixed id of `</search>` never
    comes."""
    says = [*TOK.encode("ok <search>x</searc"), 1, *TOK.encode("more and more")]
    tok = Merged()

    def one():
        return (yield Turn(TOK.encode("abc"), POLICY, 60, 1.0, ("</search>",), (0,)))

    (s,) = Engine({POLICY: (Script(says, 3), tok)}, 2, 100).run([one()])
    assert tok.decode(s.ids) == "ok <search>x</search>\n\n" and s.end == "stop"


SAID = [  # what a policy says up to where its turn must end, and its action
    ("<think>I need not <search> again.</think><answer>Jane</answer>", ("answer", "Jane")),
    ("<think>to <search> or <answer>Emma</answer>?</think> <answer>Jane</answer>", ("answer", "Jane")),
    ("<think>to <search> or <answer>Emma</answer></think><answer>Jane</answer>", ("answer", "Jane")),
    ("<think>to <search>?</think><search> <answer>b</answer></search>\n\n", ("search", "<answer>b</answer>")),
    ("<think>I never close <answer>Jane</answer>", ("answer", "Jane")),
    ("<think>nor <search>a</search>\n\n", ("search", "a")),
    ("<search>a <answer>b</answer></search>\n\n", ("search", "a <answer>b</answer>")),
    ("<search>a <answer>b</answer></answer></search>.", ("search", "a <answer>b</answer></answer>")),
    ("<think>a</think></search>.", None),
]


@pytest.mark.parametrize("text, want", SAID)
@pytest.mark.parametrize("tok", [TOK, Merged()], ids=["letters", "merged"])
@pytest.mark.parametrize("token_by_token", [False, True])
def test_a_turn_ends_with_its_action(text, want, tok, token_by_token):
    """A thought that named <search> disabled </answer>, and a tag begun before an answer block that a query
    holds was looked for in what came after it alone: either way the turn went on to its limit, and what was
    said there could be taken for the action. eval.py's live mode must end where the engine ends."""
    text = text if isinstance(tok, Merged) else text.rstrip("\n.")
    says, prompt = tok.encode(text), tok.encode("Q")
    script = Script(says + tok.encode(" and on <answer>Emma</answer></search>" * 3), 1)

    def one():
        context = object()
        return (yield from rollout.whole(Turn(prompt, POLICY, 120, 0.0, rollout.STOPS, (0,), context), tok))

    run = live(one(), tok, lambda ids, sampled: None) if token_by_token else one()
    (s,) = Engine({POLICY: (script, tok)}, 1, 200).run([run])
    assert (s.ids, s.end) == (says, "stop") and len(s.logps) == len(says)
    assert rollout.action(tok.decode(s.ids)) == want


def test_a_greedy_turn_needs_no_randomness(body):
    """Temperature 0 must be the argmax at every address."""

    def one(n):
        return (yield Turn(TOK.encode("hello"), POLICY, 10, 0.0, (), (n, 0)))

    runs = Engine({POLICY: (body, TOK)}, 4, 100).run([one(n) for n in range(5)])
    assert all(r.ids == runs[0].ids for r in runs)


def test_futures_let_the_others_decode(body):
    """A slow real engine must delay only the rows that wait for it; its failure must come through."""
    with ThreadPoolExecutor(2) as pool:

        def slow(n):
            text = yield pool.submit(lambda: f"future {n}")
            return (yield Turn(TOK.encode(text), POLICY, 5, 1.0, (), (n, TOKENS)))

        def broken():
            yield pool.submit(lambda: 1 / 0)

        engine = Engine({POLICY: (body, TOK)}, 4, 100)
        assert len(engine.run([slow(n) for n in range(6)])) == 6
        with pytest.raises(ZeroDivisionError):
            engine.run([slow(1), broken()])
        assert len(engine.run([slow(n) for n in range(3)])) == 3  # and the engine is usable again


def test_many_episodes_few_seats_do_not_deadlock(body):
    """If episodes could take every seat, all would wait for documents that no seat is left to write."""
    got, _ = roam(body, 2, n=9)
    assert len(got) == 9
    with pytest.raises(ValueError, match="at least 2 seats"):
        roam(body, 1)


class Enough(Exception):
    """The test has seen what it wants."""


def calls_a_step(monkeypatch, n, fetch, early=None, steps=12):
    """What rollout.py calls from one decode step to the next while n episodes wait, and how many it begins.

    fetch: each starts with a future; four are done at the start, and three more at each step. early: how many
    are begun before there is a seat, if not as many as usual.
    """
    counts, begun, asked = [0], [], deque()

    def talker(i):
        begun.append(i)
        if fetch:
            future = Future()
            asked.append(future)
            if len(begun) <= 4:
                asked.pop().set_result(None)
            yield future
        context = object()
        for call in range(3):
            yield Turn(TOK.encode(f"{i % 9}"), POLICY, 1 + (i + call) % 3, 0.0, (), (0,), context)
            yield Turn(TOK.encode("Doc"), POLICY, 2, 0.0, (), (0,))

    def count(frame, event, arg):
        caller = {"c_call": frame, "call": frame.f_back}.get(event)
        counts[-1] += caller is not None and caller.f_code.co_filename == engine_file.__file__

    def step(pool, stats, plain=Pool.step):
        counts.append(0)
        for _ in range(min(3, len(asked))):
            asked.popleft().set_result(None)
        if len(counts) > steps:
            raise Enough
        return plain(pool, stats)

    script = Script([97] * 200, 1)
    engine = Engine({POLICY: (script, TOK), SIMULATOR: (script, TOK)}, 5, 64)
    engine.early = early or engine.early
    with monkeypatch.context() as patch, pytest.raises(Enough):
        patch.setattr(Pool, "step", step)
        sys.setprofile(count)
        try:
            engine.run(map(talker, range(n)))
        finally:
            sys.setprofile(None)
    return counts[1:-1], len(begun)


@pytest.mark.parametrize("fetch", [False, True])
def test_a_step_costs_the_same_however_many_wait(monkeypatch, fetch):
    """Sorting the whole queue at each step, or looking at every future, took 30 ms a step with PopQA's 14,267
    questions waiting; and a prompt made, or a search sent, for each of them at once is memory and a flood."""
    few, many = (calls_a_step(monkeypatch, n, fetch) for n in (300, 10_000))
    assert few == many and 0 < few[1] < 200
    few, many = (calls_a_step(monkeypatch, n, fetch, early=n) for n in (300, 3_000))
    assert few[0] == many[0] and (few[1], many[1]) == (300, 3_000)


@pytest.mark.parametrize("seats", [2, 5, 9])
@pytest.mark.parametrize("first", ["episode", "documents"])
def test_the_order_of_seating_is_that_of_all_begun_at_once(monkeypatch, seats, first):
    """Who sits with whom decides the last bit of a log-prob: what is begun late must not be seated late."""

    def talker(i):
        context = object()
        if first == "documents":  # as in --mode rag
            yield Turn(TOK.encode("Doc"), POLICY, 1 + i % 4, 0.0, (), (0,))
        for call in range(3):
            yield Turn(TOK.encode(f"{i % 9}"), POLICY, 1 + (i + call) % 3, 0.0, (), (0,), context)
            yield Turn(TOK.encode("Doc"), SIMULATOR, 1 + i % 2, 0.0, (), (0,))

    def seating(early):
        script, log = Script([97] * 200, 1), []
        engine = Engine({POLICY: (script, TOK), SIMULATOR: (script, TOK)}, seats, 64)
        engine.early = early

        def take(pool, stats, plain=Pool.take):
            taken = plain(pool, stats)
            log.extend((engine.stats.steps, s.row, s.job.index, s.turn.role) for s in taken)
            return taken

        with monkeypatch.context() as patch:
            patch.setattr(Pool, "take", take)
            engine.run(map(talker, range(60)))
        return log

    log, at_first = seating(seats), seats if first == "documents" else seats - max(1, 2 * seats // 5)
    assert log == seating(60) and sum(step == 0 for step, *_ in log) == at_first


@pytest.mark.parametrize("seats, episodes", [(2, 1), (5, 3), (10, 6)])
def test_two_seats_of_five_are_kept_for_documents(body, seats, episodes):
    """With a single one all episodes would queue for it, and decode one row at a time."""
    engine, seated = Engine({POLICY: (body, TOK), SIMULATOR: (body, TOK)}, seats, 100), []

    def one(n):
        for call in range(2):
            yield Turn(TOK.encode("hello"), POLICY, 5, 1.0, (), (n, call, TOKENS), n)
            seated.append(len(engine.pools[POLICY].seated))
            yield Turn(TOK.encode("D:"), SIMULATOR, 5, 1.0, (), (n, call, DOCUMENTS))

    engine.run(map(one, range(12)))
    assert max(seated) == episodes


def test_an_engine_tells_what_it_does(body):
    """Progress and rates on the screen come from here: done counts up to all, and seconds are of this run."""
    engine, told = Engine({POLICY: (body, TOK)}, 2, 100), []

    def one(n):
        yield Turn(TOK.encode("hello"), POLICY, n + 1, 1.0, (), (n, TOKENS))

    for _ in range(2):
        began = time.perf_counter()
        engine.run(map(one, range(4)), lambda *a: told.append((*a[:2], a[2].seconds)))
        assert 0 < told[-1][2] <= engine.stats.seconds <= time.perf_counter() - began
        assert engine.stats.steps <= engine.stats.decoded <= 1 + 2 + 3 + 4
    assert sorted({done for done, _, _ in told}) == [1, 2, 3, 4] and {of for _, of, _ in told} == {4}


def test_what_does_not_fit_a_seat_is_an_error(body):
    """Writing past the end of a seat would corrupt its neighbour."""

    def one(n):
        return (yield Turn(TOK.encode("x" * n), POLICY, 50, 1.0, (), (n, TOKENS)))

    engine = Engine({POLICY: (body, TOK)}, 2, 100)
    assert len(engine.run([one(60)])[0].ids) == 40
    with pytest.raises(ValueError, match="do not fit in a seat of 100"):
        engine.run([one(100)])
    with pytest.raises(ValueError, match="longer than the 512"):
        Engine({POLICY: (body, TOK)}, 2, 1000)


def test_the_picture_of_the_mask():
    """What the policy sampled must be told from what it was given at a glance."""
    t, _ = play(["<answer>Jane</answer>"])
    assert shown(t, TOK, colour=False) == "[Q: who wrote Emma?\n]<answer>Jane</answer>"


def test_logits_that_are_not_finite_end_the_run(monkeypatch):
    """NaN log-probs would be trained on; the cause is the type, and the error says so."""
    script = Script([97] * 9, 1)
    plain = script.logits
    monkeypatch.setattr(script, "logits", lambda h: plain(h) * float("nan"))

    def one():
        yield Turn(TOK.encode("a"), POLICY, 3, 1.0, (), (0,))

    with pytest.raises(ValueError, match="not finite"):
        Engine({POLICY: (script, TOK)}, 1, 64).run([one()])


@pytest.mark.parametrize(
    "said, found",
    [
        ("<think>a <think>b</think> I might <search> it</think><answer>Jane</answer>", ("answer", "Jane")),
        ("<think>a <think>b</think> <answer>Jane</answer>", ("answer", "Jane")),
        ("</think><think>x</think></think><search>q</search>", ("search", "q")),
        ("<think><think></think></think> <search> open", None),
    ],
)
def test_inner_thoughts_are_part_of_the_outer_one(said, found):
    """The end of an inner thought is not the end of the outer one: what follows it is still thought."""
    assert rollout.action(said) == found
