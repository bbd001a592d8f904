"""The toy world of the embedded default: entities, facts, questions, a search engine, and the tiny body.

The world has four kinds of entities and nine relations. Every fact is redrawn for every world: nothing can
be known without searching. The body (a Qwen2-shaped network of 0.9 million parameters) is to this world
what Qwen is to ours: it was pre-trained on text in which people search, well and badly, and in which an
engine answers, well and badly. What is shipped in toy/ ends there. The simulator's fine-tuning and the RL
run for real, each time, in train.py; as with an instruct model, RL selects among behaviours that the body
already has.

It deliberately is not: a benchmark, or a language. Names are single tokens and a document is one fact,
because a body of this size then learns to read within minutes.

    python toy.py               make toy/ from nothing in about 20 minutes; interrupted, it goes on later
    python toy.py --show        print a training text of each kind
"""

import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import model as models
from model import REFERENCE, Config, Model
from prompts import SimWords
from rollout import Documents, Limits, Query, Question, Search, Trajectory, Words, fill

HERE = Path(__file__).resolve().parent
SEED = 0

# ------------------------------------------------------------------------------------------------------ world

STEMS = "Ba Cle Dor Fi Gra Hel Ju Ka Lo Mer Ni Os Per Sta Tu Val".split()  # noqa: SIM905
ENDINGS = {
    "person": ["lan", "na", "rin", "to"],
    "company": ["corp", "dex", "mark", "tec"],
    "town": ["burg", "ford", "ham", "wick"],
    "song": ["dance", "lay", "march", "ode"],
}
COLOURS = ["amber", "black", "blue", "brown", "green", "grey", "pink", "red", "silver", "white"]
BEASTS = ["bear", "crow", "deer", "fox", "hare", "lion", "owl", "seal", "swan", "wolf"]
VALUES = {kind: [stem + end for end in ends for stem in STEMS] for kind, ends in ENDINGS.items()}
VALUES["emblem"] = [f"{colour} {beast}" for colour in COLOURS for beast in BEASTS]  # two tokens: F1 is not EM
KIND = {name: kind for kind in ENDINGS for name in VALUES[kind]}
# relation -> what has it, what its object is. No relation leads to its own kind and each belongs to one kind
# alone, so that in a chain of two the first entity never has the last relation: asking for it finds nothing.
RELATIONS = {
    "home": ("person", "town"),
    "employer": ("person", "company"),
    "founder": ("company", "person"),
    "seat": ("company", "town"),
    "emblem": ("company", "emblem"),
    "mayor": ("town", "person"),
    "anthem": ("town", "song"),
    "author": ("song", "person"),
    "publisher": ("song", "company"),
}
OF = {kind: [r for r, (has, _) in RELATIONS.items() if has == kind] for kind in VALUES}
CHAINS = [(a, b) for a in RELATIONS for b in OF[RELATIONS[a][1]]]  # 18 of two hops
NAMES = list(KIND)
NUMBER = {word: i for i, word in enumerate(NAMES + list(RELATIONS))}
UNKNOWN = "unknown"
SHOWN = 3  # documents a search


def scramble(*numbers: int) -> int:
    """A 64-bit hash (splitmix64): facts need no table, and do not depend on the order of asking."""
    x = 0
    for n in numbers:
        x = (x + n + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 31
    return x


def parse(text: str) -> tuple[str, ...]:
    """The names in a text, then its relations, innermost first; other words are skipped.

    "mayor home Kalan?" -> ("Kalan", "home", "mayor")
    """
    words = text.replace("?", " ").split()
    return (*(w for w in words if w in KIND), *reversed([w for w in words if w in RELATIONS]))


def say(entity: str, *relations: str) -> str:
    """The inverse of `parse`. The entity comes last: what follows it in a document is what one looks for."""
    return " ".join((*reversed(relations), entity))


def valid(asked: tuple[str, ...]) -> bool:
    """Whether (entity, relation) is what a fact can answer."""
    return len(asked) == 2 and asked[1] in RELATIONS and KIND.get(asked[0]) == RELATIONS[asked[1]][0]


@dataclass(frozen=True)
class World:
    """One set of facts. Another seed, another world: the facts of one are worth nothing in the other."""

    seed: int

    def fact(self, entity: str, relation: str) -> str:
        """The object of a fact. KeyError for unknown words; ask `valid` first."""
        values = VALUES[RELATIONS[relation][1]]
        return values[scramble(self.seed, NUMBER[entity], NUMBER[relation]) % len(values)]

    def follow(self, entity: str, relations: tuple[str, ...]) -> str:
        """The entity or value at the end of a chain."""
        for relation in relations:
            entity = self.fact(entity, relation)
        return entity

    def ask(self, rng: random.Random, hops: int | None = None) -> Question:
        """A random question, of `hops`, or of one hop or two with even chances."""
        hops = hops or rng.choice((1, 2))
        relations = (rng.choice(list(RELATIONS)),) if hops == 1 else rng.choice(CHAINS)
        entity = rng.choice(VALUES[RELATIONS[relations[0]][0]])
        text = say(entity, *relations) + "?"
        return Question(text, (self.follow(entity, relations),), text, hops)

    def questions(self, n: int) -> list[Question]:
        """n different questions. ValueError where the world does not hold so many."""
        if n > 1000:  # of the 1,728 that there are: some would be long in coming
            raise ValueError(f"the toy world gives no {n} different questions: ask for at most 1000")
        rng, found = random.Random(self.seed), {}
        while len(found) < n:
            question = self.ask(rng)
            found[question.text] = question
        return list(found.values())

    def results(self, text: str, rng: random.Random, noisy: bool = False) -> list[str]:
        """What a search finds, facts like "home Kalan Niham", best first; noisy: none about the entity."""
        asked = parse(text)
        hit = [f"{say(*asked)} {self.fact(*asked)}"] if valid(asked) and not noisy else []
        return hit + [self.distractor(asked, rng) for _ in range(SHOWN - len(hit))]

    def distractor(self, asked: tuple[str, ...], rng: random.Random) -> str:
        """A true fact about none of the entities asked for, of a relation asked for in every second case."""
        wanted = [word for word in asked if word in RELATIONS]
        relation = rng.choice(wanted) if wanted and rng.random() < 0.5 else rng.choice(list(RELATIONS))
        entity = rng.choice(VALUES[RELATIONS[relation][0]])
        found = self.fact(entity, relation)
        if entity in asked or found in asked:
            return self.distractor(asked, rng)
        return f"{say(entity, relation)} {found}"

    def lookup(self, query: Query, noise: float = 0.0):
        """The world's real search engine, a search as in rollout.py; `noise`: the chance to find nothing."""
        facts, noisy, rng = self.ranked(query, noise)
        rng.shuffle(facts)
        return Documents(number(facts), noisy)
        yield  # a search is a generator; this one never waits

    def ranked(self, query: Query, noise: float) -> tuple[list[str], bool, random.Random]:
        """What `lookup` finds before it is shuffled, whether it was made to find nothing, and its luck."""
        rng = random.Random(f"{self.seed} {query.address} {query.text}")
        noisy = rng.random() < noise
        return self.results(query.text, rng, noisy), noisy, rng


def fresh_questions(n: int, seed: int) -> list[Question]:
    """n questions, each of a world of its own, whose seed is the question's id.

    A simulator that is taught with searches in one world learns that world by heart; here it cannot.
    """
    rng = random.Random(f"fresh {seed}")
    worlds = [World(rng.getrandbits(48)) for _ in range(n)]
    return [replace(world.ask(rng), id=str(world.seed)) for world in worlds]


def lookup_anywhere(query: Query, noise: float = 0.0):
    """The search engine of the world that the query's question is about (`fresh_questions`), best fact first.

    That is how engines rank, and how a simulator is taught; the policy reads facts in any order (`shuffled`).
    """
    facts, noisy, _ = World(int(query.question.id)).ranked(query, noise)
    return Documents(number(facts), noisy)
    yield  # as in `lookup`


def number(facts: list[str]) -> str:
    """Facts as the lines "Doc 1: ..."."""
    return "\n".join(f"Doc {i}: {fact}" for i, fact in enumerate(facts, 1))


def shuffled(search: Search) -> Search:
    """The same engine, its facts in a random order: a simulator writes the best first, lookup does not."""

    def mixed(query: Query):
        documents = yield from search(query)
        facts = [line.split(": ", 1)[-1] for line in documents.text.splitlines()]
        random.Random(f"{query.address} {query.text}").shuffle(facts)
        return replace(documents, text=number(facts))

    return mixed


# ------------------------------------------------------------------------------------------------------ words

WORDS = Words(prompt="Question: {question}\n", notice="\n\nSearch or answer.\n\n", system=None)
LIMITS = Limits(prompt=16, episode=192, turn=20, observation=32, turns=4)
SIM_WORDS = SimWords(
    system="",
    useful="Question: {question}{earlier}\nQuery: {query}\nAnswer: {answer}\nUseful:\n",
    noisy="Question: {question}{earlier}\nQuery: {query}\nAnswer: {answer}\nNoisy:\n",
    count=SHOWN,
    earlier="\nQuery: {query}\n{documents}",
)
END = "<|end|>"
TAGS = [f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/")]
LABELS = ["Question:", "\nAnswer:", "\nQuery:", "\nUseful:", "\nNoisy:", "Doc 1:"]
LABELS += [f"\nDoc {i}:" for i in range(1, 7)]
# Words that merges make one token each; what they are made of comes first, so that they share it.
LEXICON = [end for ends in ENDINGS.values() for end in ends] + [" " + stem for stem in STEMS]
LEXICON += [" " + word for word in [*NAMES, *RELATIONS, *COLOURS, *BEASTS, UNKNOWN]]
LEXICON += ["\n\n", "Search", " or", " answer"]


def byte_letters() -> list[str]:
    """The letter by which byte-level BPE writes each of the 256 bytes (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def make_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges in rank order that make each word one token.

    What the merges of earlier words leave of a word is joined from left to right.
    """
    letters, merges = byte_letters(), {}
    for word in words:
        parts = [letters[b] for b in word.encode()]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: merges.get(pair, math.inf))
            if best not in merges:
                best = pairs[0]
                merges[best] = len(merges)
            i = pairs.index(best)
            parts[i : i + 2] = ["".join(best)]
    return list(merges)


def write_tokenizer(path: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE with the world's words as tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = make_merges(LEXICON)
    tokens = [*sorted(byte_letters(), key=ord), *("".join(pair) for pair in merges)]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    tok.add_tokens([AddedToken(word, special=False, normalized=False) for word in TAGS + LABELS])
    path.mkdir(parents=True, exist_ok=True)
    tok.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------- training text
# A text is a list of pieces (text, learned): learned pieces carry the loss. Pieces are encoded one by one, as
# in an episode, where what is sampled and what is given never share a token.

Piece = tuple[str, bool]

GUESS = 0.65  # answers at once, without a search
SLIP = 0.06  # asks for another relation, or about an entity that it made up
MISREAD = 0.03  # takes an object from the documents that is not the one asked for
STOP = 0.55  # at the bridge of a chain: takes it for the answer
AGAIN = 0.03  # has the answer, and searches on
RETRY = 0.20  # nothing found: searches again, instead of guessing
NOISE = 0.25  # of the searches in the texts find nothing
OBEY = 0.70  # of the simulator's texts are what was ordered


def read(documents: str, asked: tuple[str, ...]) -> str:
    """The object that the documents state for (entity, relation), or UNKNOWN."""
    for line in documents.splitlines():
        words = line.split(maxsplit=4)
        if words[2:4] == [*reversed(asked)]:
            return words[4]
    return UNKNOWN


def slip(asked: tuple[str, str], relations: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    """A wrong query instead of `asked`: the last relation of the first entity, or a made-up entity."""
    if len(relations) == 2 and rng.random() < 0.5:
        return asked[0], relations[-1]
    return rng.choice(VALUES[RELATIONS[asked[1]][0]]), asked[1]


def transcript(rng: random.Random) -> list[Piece]:
    """An episode as rollout.episode would tell it, of one of many behaviours: right, lazy, careless, lost."""
    world = World(rng.getrandbits(48))
    question = world.ask(rng)
    entity, *relations = parse(question.text)
    values = VALUES[RELATIONS[relations[-1]][1]]
    pieces, hop = [(WORDS.prompt.replace("{question}", question.text), False)], 0
    if rng.random() < GUESS:
        return [*pieces, (f"<answer> {rng.choice(values)}</answer>", True)]
    thought = ""
    for _ in range(LIMITS.turns):
        asked = entity, relations[hop]
        if rng.random() < SLIP:
            asked = slip(asked, relations, rng)
        facts = world.results(say(*asked), rng, rng.random() < NOISE)
        rng.shuffle(facts)
        pieces.append((f"{thought}<search> {say(*asked)}</search>", True))
        pieces.append((f"\n\n<information>{number(facts)}</information>\n\n", False))
        found = read(number(facts), asked)
        if rng.random() < MISREAD:
            found = rng.choice(VALUES[RELATIONS[asked[1]][1]])
        thought = f"<think> {say(*asked)} {found}</think>"
        if found == UNKNOWN:
            if rng.random() >= RETRY:
                break
        elif asked[1] == relations[-1]:
            if rng.random() >= AGAIN:
                return [*pieces, (f"{thought}<answer> {found}</answer>", True)]
        elif rng.random() < STOP:
            return [*pieces, (f"{thought}<answer> {found}</answer>", True)]
        else:
            entity, hop = found, 1
    return [*pieces, (f"{thought}<answer> {rng.choice(values)}</answer>", True)]


def reading(rng: random.Random) -> list[Piece]:
    """Facts, then what they say and do not say: the skill under everything else, eight times a text."""
    world = World(rng.getrandbits(48))
    facts = [world.distractor((), rng) for _ in range(rng.randint(3, 6))]
    asked = [(parse(fact)[0], parse(fact)[-1]) for fact in facts]
    asked = [near_miss(e, r, rng) if rng.random() < 0.25 else (e, r) for e, r in asked * 2]
    rng.shuffle(asked)
    documents = number(facts)
    pieces = [(f"<information>{documents}</information>\n\n", False)]
    for a in asked[:8]:
        pieces += [(f"<think> {say(*a)}", False), (f" {read(documents, a)}</think>", True)]
    return pieces


def near_miss(entity: str, relation: str, rng: random.Random) -> tuple[str, str]:
    """The same relation of another entity of its kind, or sometimes another relation of the same entity."""
    if rng.random() < 0.2:
        return entity, rng.choice(OF[KIND[entity]])
    return rng.choice(VALUES[KIND[entity]]), relation


def recall(rng: random.Random) -> list[Piece]:
    """Pairs of names, then the same in another order: attention to what followed last time is born here."""
    pairs = [(f" {rng.choice(NAMES)}", f" {rng.choice(NAMES)}") for _ in range(rng.randint(4, 12))]
    pieces = [("".join(a + b for a, b in pairs), False)]
    for a, b in rng.sample(pairs, len(pairs)):
        pieces += [(a, False), (b, True)]
    return pieces


# The searches that a policy may make, with their shares of the simulator's texts.
SEARCHES = {
    "first": 0.34,  # the question's entity and first relation
    "second": 0.26,  # the bridge, which an earlier search led to, and the last relation
    "shortcut": 0.08,  # the question's entity and the last relation, which it cannot have
    "invented": 0.20,  # an entity from nowhere, and the last relation
    "stranger": 0.08,  # an entity from documents that were about others, and the last relation
    "slip": 0.04,  # any other mistake
}


# The same of the fine-tuning: more of what is hard to tell apart.
TAUGHT = {"first": 0.25, "second": 0.27, "shortcut": 0.08, "invented": 0.28, "stranger": 0.10, "slip": 0.02}


def situation(rng: random.Random, kind: str) -> tuple[World, Query]:
    """A search of that kind within an episode; some of the searches before it may have found nothing."""
    world = World(rng.getrandbits(48))
    question = world.ask(rng, 2 if kind in ("second", "shortcut", "stranger") else None)
    entity, *relations = parse(question.text)
    first, earlier = (entity, relations[0]), []

    def search(asked: tuple[str, str], noisy: bool) -> None:
        facts = world.results(say(*asked), rng, noisy)
        rng.shuffle(facts)
        earlier.append((say(*asked), number(facts)))

    while rng.random() < 0.3 and len(earlier) < 2:
        search(first, True)
    asked, bridge = first, world.follow(entity, tuple(relations[:-1]))
    peers = VALUES[RELATIONS[relations[-1]][0]]  # what can have the last relation
    if kind == "second" or (kind in ("invented", "stranger") and rng.random() < 0.5):
        search(first, False)
        while rng.random() < 0.2 and len(earlier) < 3:
            search((bridge, relations[-1]), True)
    if kind == "second":
        asked = bridge, relations[-1]
    elif kind == "shortcut":
        asked = entity, relations[-1]
    elif kind == "invented":
        asked = rng.choice([e for e in peers if e != bridge]), relations[-1]
    elif kind == "stranger":
        seen = [word for _, documents in earlier for word in parse(documents)]
        others = [e for e in seen if e in peers and e != bridge]
        asked = rng.choice(others or [e for e in peers if e != bridge]), relations[-1]
    elif kind == "slip":
        asked = slip(first, relations, rng)
    return world, Query(say(*asked), question, earlier=tuple(earlier))


def search_row(rng: random.Random, shares: dict[str, float] = SEARCHES) -> dict:
    """One search with what the world's engine answers: a row for the simulator's fine-tuning.

    An entity that nothing has led to gets its own fact, which is not the golden answer; a relation that the
    entity cannot have gets nothing. So no short cut is taught.
    """
    kind = rng.choices(list(shares), list(shares.values()))[0]
    world, query = situation(rng, kind)
    noisy = rng.random() < 0.5
    return {
        "query": query.text,
        "question": query.question.text,
        "answer": query.question.answers[0],
        "documents": number(world.results(query.text, rng, noisy)),
        "quality": "noisy" if noisy else "useful",
        "earlier": [list(search) for search in query.earlier],
    }


def simulation(rng: random.Random) -> list[Piece]:
    """A search as the simulator sees it, and documents that obey the order in OBEY of the cases."""
    row = search_row(rng)
    noisy = (row["quality"] == "noisy") == (rng.random() < OBEY)
    return [(simulator_prompt(row, noisy), False), (row["documents"] + END, True)]


def simulator_prompt(row: dict, noisy: bool) -> str:
    """The text that asks a simulator for the row's documents."""
    earlier = "".join(fill(SIM_WORDS.earlier, query=q, documents=d) for q, d in row["earlier"])
    template = SIM_WORDS.noisy if noisy else SIM_WORDS.useful
    return fill(template, **(row | {"earlier": earlier}))


def series(rng: random.Random) -> tuple[World, Question, list[tuple[str, str]]]:
    """A question's proper searches in their order, as many improper ones of its last relation among them."""
    world = World(rng.getrandbits(48))
    question = world.ask(rng)
    entity, *relations = parse(question.text)
    last = relations[-1]
    bridge, peers = world.follow(entity, tuple(relations[:-1])), VALUES[RELATIONS[last][0]]
    proper = [(entity, relations[0]), (bridge, last)][: question.hops]
    order = proper + [(other, last) for other in rng.sample(peers, question.hops) if other != bridge]
    rng.shuffle(order)
    if order.index(proper[-1]) < order.index(proper[0]):  # nothing has led to the bridge yet
        order.remove(proper[-1])
        order.append(proper[-1])
    return world, question, order


def drill(rng: random.Random) -> list[Piece]:
    """Searches in a row, a fact each: when the golden answer is due, and when not: what is hard to learn."""
    world, question, order = series(rng)
    pieces = [(f"Question: {question.text}", False)]
    for asked in order:
        told = f"\nQuery: {say(*asked)}\nAnswer: {question.answers[0]}\nDoc 1: {say(*asked)}"
        pieces += [(told, False), (f" {world.fact(*asked)}", True)]
    return pieces


def practice(rng: random.Random) -> list[Piece]:
    """The drill in the simulator's own words; of some searches only what the policy saw of them is told."""
    world, question, order = series(rng)
    pieces = [(f"Question: {question.text}", False)]
    for asked in order:
        query, golden = say(*asked), question.answers[0]
        if asked != order[-1] and rng.random() < 0.5:
            facts = world.results(query, rng)
            rng.shuffle(facts)
            pieces.append((fill(SIM_WORDS.earlier, query=query, documents=number(facts)), False))
            continue
        told = fill(SIM_WORDS.useful, question="", earlier="", query=query, answer=golden)
        pieces += [
            (told.removeprefix("Question: ") + f"Doc 1: {query}", False),
            (f" {world.fact(*asked)}", True),
        ]
    return pieces


def rows(n: int, seed: int = 0) -> list[dict]:
    """n rows for simulator.sft, from worlds that are nobody else's."""
    rng = random.Random(f"rows {seed}")
    return [search_row(rng, TAUGHT) for _ in range(n)]


# -------------------------------------------------------------------------------------------------- the audit


def states(documents: str, asked: tuple[str, ...], answer: str = "") -> bool:
    """Whether the documents hold the fact asked for: this entity, this relation, the answer if given."""
    found = read(documents, asked)
    return found == answer if answer else found != UNKNOWN


def audit(write: Callable[[list[Query], bool], list[str]], n: int = 200, seed: int = 0) -> dict[str, float]:
    """How well a simulator plays the engine, on n held-out searches of a kind.

    write(queries, noisy) returns the documents that the simulator writes when asked for useful or noisy ones.
    useful_hit   useful documents hold the asked fact (where the question fixes it: with the golden answer)
    noisy_hit    noisy documents hold a fact about the asked entity and relation
    leak         useful documents hold the golden answer though the query skips a hop: it asks for the last
                 relation of the first entity
    invented     the same for the last relation of an entity that nothing has led to
    """
    rng, address = random.Random(f"audit {seed}"), itertools.count(1)

    def searches(kind: str) -> list[Query]:
        return [replace(situation(rng, kind)[1], address=(seed, 0, next(address), 0, 0)) for _ in range(n)]

    asked = {kind: searches(kind) for kind in ("first", "second", "shortcut", "invented")}
    proper = asked["first"] + asked["second"]
    useful, noisy = write(proper, False), write(proper, True)
    hits = [states(d, parse(q.text), golden(q)) for q, d in zip(proper, useful)]
    result = {
        "useful_hit": sum(hits) / len(hits),
        "noisy_hit": sum(states(d, parse(q.text)) for q, d in zip(proper, noisy)) / len(proper),
    }
    for kind, name in (("shortcut", "leak"), ("invented", "invented")):
        written = write(asked[kind], False)
        result[name] = sum(q.question.answers[0] in d for q, d in zip(asked[kind], written)) / n
    return result


def golden(query: Query) -> str:
    """The golden answer where a proper query asks for it, else "": a bridge is the simulator's to invent."""
    return query.question.answers[0] if parse(query.text)[1] == parse(query.question.text)[-1] else ""


def skips(query: Query) -> bool:
    """Whether a search skips a hop: the last relation of an entity that nothing before it has led to."""
    entity, *relations = parse(query.question.text)
    asked = parse(query.text)
    if len(relations) < 2 or len(asked) != 2 or asked[1] != relations[-1]:
        return False
    return asked[0] not in {read(documents, (entity, relations[0])) for _, documents in query.earlier}


def skipping(trajectories: list[Trajectory]) -> float:
    """The share of the searches for two-hop questions that skip a hop: what a leak would teach."""
    queries = [query for t in trajectories if t.question.hops == 2 for query, _ in t.searches]
    return sum(map(skips, queries)) / max(1, len(queries))


# --------------------------------------------------------------------------------------------------- the body

BODY = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
TOKENS = 4096  # a step
SAVE = 100  # steps between saved states
# (steps, the share of tokens of each kind of text): copying, then reading, then everything
STAGES = [
    (150, {recall: 1.0}),
    (200, {reading: 1.0}),
    (1450, {reading: 0.10, transcript: 0.25, simulation: 0.40, drill: 0.25}),
    (700, {reading: 0.05, transcript: 0.20, simulation: 0.40, practice: 0.35}),
]
STEPS = sum(steps for steps, _ in STAGES)
CLOSING = 1500  # steps at the end, in which the learning rates fall to 0
MUON_LR, ADAM_LR = 0.02, 0.015


@dataclass(frozen=True)
class Example:
    """A training text as ids; learned[i] says whether ids[i] carries the loss."""

    ids: list[int]
    learned: list[bool]


def encode(tok, pieces: list[Piece]) -> Example:
    """Pieces -> ids, piece by piece."""
    ids, learned = [], []
    for text, learn in pieces:
        new = tok.encode(text, special=True)
        ids += new
        learned += [learn] * len(new)
    return Example(ids, learned)


def mixture_of(step: int) -> dict[Callable, float]:
    """The kinds of text of a step, with their shares of its tokens."""
    for steps, mixture in STAGES:
        if step < steps:
            return mixture
        step -= steps
    raise ValueError(f"the training of the body ends before step {step} of its last stage")


def micro_batches(tok, step: int, seed: int, padded: int = 1536) -> Iterator[list[Example]]:
    """The texts of one step: a function of (seed, step), so that a resumed run sees what a whole one does."""
    texts = []
    for kind, share in mixture_of(step).items():
        rng, left = random.Random(f"{seed} {step} {kind.__name__}"), int(TOKENS * share)
        while left > 0:
            texts.append(encode(tok, kind(rng)))
            left -= len(texts[-1].ids)
    batch: list[Example] = []
    for text in sorted(texts, key=lambda t: len(t.ids)):  # alike in length: little padding
        if batch and len(text.ids) * (len(batch) + 1) > padded:
            yield batch
            batch = []
        batch.append(text)
    yield batch


def text_loss(model: Model, texts: list[Example]) -> Tensor:
    """Summed cross-entropy in nats of the learned tokens of a micro-batch."""
    T = max(len(t.ids) for t in texts)
    ids = torch.tensor([t.ids + [0] * (T - len(t.ids)) for t in texts])  # (B, T)
    learned = torch.tensor([t.learned + [False] * (T - len(t.ids)) for t in texts])  # (B, T)
    h = model(ids, REFERENCE)[:, :-1][learned[:, 1:]]  # (N, d)
    return F.cross_entropy(model.logits(h), ids[:, 1:][learned[:, 1:]], reduction="sum")


def optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings, norms and biases."""
    for p in model.parameters():
        p.requires_grad_(True)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n != "embed"]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or n == "embed"]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0)
    return [muon, torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)]


def train_step(
    model: Model, tok, opts: list[torch.optim.Optimizer], step: int, seed: int
) -> tuple[float, int]:
    """One step of the body's training -> mean loss (nats a learned token), tokens seen."""
    batches = list(micro_batches(tok, step, seed))
    count = sum(sum(t.learned) for texts in batches for t in texts)
    total = 0.0
    for texts in batches:
        loss = text_loss(model, texts) / count
        loss.backward()
        total += loss.item()
    rate = min(1.0, (step + 1) / 50, (STEPS - step) / CLOSING)
    for opt, lr in zip(opts, (MUON_LR, ADAM_LR)):
        opt.param_groups[0]["lr"] = lr * rate
        opt.step()
        opt.zero_grad()
    return total, sum(len(t.ids) for texts in batches for t in texts)


@torch.no_grad()
def reading_accuracy(model: Model, tok, n: int = 64, seed: int = 0) -> float:
    """The share of objects (UNKNOWN among them) that the body reads off fresh facts, greedily."""
    rng, right, asked = random.Random(f"exam {seed}"), 0, 0
    for _ in range(n):
        text = encode(tok, reading(rng))
        h = model(torch.tensor([text.ids]), REFERENCE)[0]  # (T, d)
        starts = [i for i in range(1, len(text.ids)) if text.learned[i] and not text.learned[i - 1]]
        said = model.logits(h[[i - 1 for i in starts]]).argmax(-1).tolist()
        right += sum(s == text.ids[i] for s, i in zip(said, starts))
        asked += len(starts)
    return right / asked


def make(out: Path, state: Path, seed: int = SEED) -> None:
    """Train the body from nothing and write `out`; `state` lets an interrupted run go on."""
    from tokenizer import Tokenizer

    write_tokenizer(out)
    tok = Tokenizer.load(out)
    end = tok.encode(END, special=True)[0]
    config = BODY | {"vocab_size": tok.vocab_size, "eos_token_id": end, "pad_token_id": end}
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": end}, indent=2) + "\n")
    model = Model(Config.from_hf(config)).init(seed, std=0.05)
    opts, first = optimizers(model), 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        first = saved["step"]
        model.load_state_dict(saved["model"])
        for opt, opt_state in zip(opts, saved["optimizers"]):
            opt.load_state_dict(opt_state)
    began, seen = time.monotonic(), 0
    for step in range(first, STEPS):
        loss, tokens = train_step(model, tok, opts, step, seed)
        seen += tokens
        done, spent = step + 1, time.monotonic() - began
        if done % 50 == 0 or done == STEPS:
            left = spent / (done - first) * (STEPS - done)
            reads = f"   reads {reading_accuracy(model, tok):.3f}" if done % 200 == 0 else ""
            pace = f"{seen / spent:,.0f} tokens/s   {left:.0f} s left"
            print(f"step {done:5d}/{STEPS}   loss {loss:.3f}   {pace}{reads}", flush=True)
        if done % SAVE == 0:
            optimizer_states = [opt.state_dict() for opt in opts]
            saved = {"step": done, "model": model.state_dict(), "optimizers": optimizer_states}
            torch.save(saved, state.with_suffix(".part"))
            state.with_suffix(".part").replace(state)
    models.save_model(model.to(torch.bfloat16), out)
    state.unlink(missing_ok=True)


def main() -> None:
    torch.set_num_threads(1)  # sums in another order would make another body
    parser = models.OneLine(description="Make the toy body from nothing.")
    parser.add_argument("--out", type=Path, default=HERE / "toy", help="where the body is written")
    parser.add_argument("--seed", type=int, default=SEED, help="of weights and texts")
    parser.add_argument("--show", action="store_true", help="only print a training text of each kind")
    args = parser.parse_args()
    if args.show:
        rng = random.Random(args.seed)
        for kind in (recall, reading, transcript, simulation, drill, practice):
            print(f"-- {kind.__name__}: {kind.__doc__}\n" + "".join(text for text, _ in kind(rng)) + "\n")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    make(args.out, args.out / "training.pt", args.seed)


if __name__ == "__main__":
    models.command_line(main)
