"""The toy world: entities, facts about them, questions, and the search engine that looks facts up.

A world's seed determines every fact, so nothing can be answered without searching. Names are single tokens
and a document is one fact, so that a small body learns to read within minutes. Not a benchmark, and not
English: a question is "mayor home Kalan?", a document "home Kalan Niham".
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce

from rollout import Documents, Query, Question, Search
from search import number, split_documents

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
KIND = {name: kind for kind, names in VALUES.items() for name in names}
NAMES = list(KIND)
VALUES["emblem"] = [f"{colour} {beast}" for colour in COLOURS for beast in BEASTS]  # two tokens: F1 is not EM
# kind -> its relations -> the kind of their objects. No relation leads to its own kind and each belongs
# to one kind only, so in a two-hop question the first entity never has the last relation.
LINKS = {
    "person": {"home": "town", "employer": "company"},
    "company": {"founder": "person", "seat": "town", "emblem": "emblem"},
    "town": {"mayor": "person", "anthem": "song"},
    "song": {"author": "person", "publisher": "company"},
}
RELATIONS = {r: (kind, to) for kind, links in LINKS.items() for r, to in links.items()}
CHAINS = [(a, b) for a in RELATIONS for b in LINKS.get(RELATIONS[a][1], ())]  # the 18 of two hops
NUMBER = {word: i for i, word in enumerate(NAMES + list(RELATIONS))}
UNKNOWN = "unknown"
SHOWN = 3  # documents per search


def scramble(*numbers: int) -> int:
    """A 64-bit hash (splitmix64): facts need no table, and the order of asking does not matter."""
    x = 0
    for n in numbers:
        x = (x + n + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 31
    return x


def parse(text: str) -> tuple[str, ...]:
    """The names, then the relations, innermost first: "mayor home Kalan?" -> ("Kalan", "home", "mayor")."""
    words = text.replace("?", " ").split()
    return (*(w for w in words if w in KIND), *reversed([w for w in words if w in RELATIONS]))


def say(entity: str, *relations: str) -> str:
    """The inverse of `parse`. The entity comes last: in a document the object follows it directly."""
    return " ".join((*reversed(relations), entity))


def read(documents: str, asked: tuple[str, ...]) -> str:
    """The object that the documents state for (entity, relation), or UNKNOWN."""
    for line in documents.splitlines():
        words = line.split(maxsplit=4)
        if words[2:4] == [*reversed(asked)] and words[4:]:
            return words[4]
    return UNKNOWN


@dataclass(frozen=True)
class World:
    """One set of facts. A world of another seed has other facts."""

    seed: int

    def fact(self, entity: str, relation: str) -> str:
        """The object of a fact. KeyError for unknown words."""
        values = VALUES[RELATIONS[relation][1]]
        return values[scramble(self.seed, NUMBER[entity], NUMBER[relation]) % len(values)]

    def follow(self, entity: str, relations: Iterable[str]) -> str:
        """The entity or value at the end of a chain."""
        return reduce(self.fact, relations, entity)

    def ask(self, rng: random.Random, hops: int | None = None) -> Question:
        """A random question of `hops` hops; None: one or two with equal probability."""
        hops = hops or rng.choice((1, 2))
        relations = (rng.choice(list(RELATIONS)),) if hops == 1 else rng.choice(CHAINS)
        entity = rng.choice(VALUES[RELATIONS[relations[0]][0]])
        text = say(entity, *relations) + "?"
        return Question(text, (self.follow(entity, relations),), text, hops)

    def questions(self, n: int) -> list[Question]:
        """n different questions, drawn one by one. ValueError where the world seems to have fewer."""
        rng, found, again = random.Random(self.seed), {}, 0
        while len(found) < n:
            question, before = self.ask(rng), len(found)
            found[question] = None  # a set that keeps its order
            again = 0 if len(found) > before else again + 1
            if again == 1000:
                raise ValueError(f"this world has about {before} different questions, not {n}: ask for fewer")
        return list(found)

    def documents(self, text: str, rng: random.Random, noisy: bool = False, ranked: bool = False) -> str:
        """What a search finds, in random order or, if ranked, best first; noisy: nothing about the entity."""
        asked = parse(text)
        hit = not noisy and len(asked) == 2 and asked[1] in LINKS.get(KIND.get(asked[0]), ())
        facts = [f"{say(*asked)} {self.fact(*asked)}"] if hit else []
        facts += [self.distractor(asked, rng) for _ in range(SHOWN - len(facts))]
        if not ranked:
            rng.shuffle(facts)
        return number(facts)

    def distractor(self, asked: tuple[str, ...], rng: random.Random) -> str:
        """A true fact about another entity; half of the time with a relation that was asked for."""
        wanted = [word for word in asked if word in RELATIONS]
        relation = rng.choice(wanted if wanted and rng.random() < 0.5 else list(RELATIONS))
        entity = rng.choice(VALUES[RELATIONS[relation][0]])
        found = self.fact(entity, relation)
        again = entity in asked or found in asked
        return self.distractor(asked, rng) if again else f"{say(entity, relation)} {found}"

    def lookup(self, query: Query, noise: float = 0.0, ranked: bool = False):
        """The world's search engine, a search as in rollout.py; noise: probability that it finds nothing."""
        rng = random.Random(f"{self.seed} {query.address} {query.text}")
        noisy = rng.random() < noise
        return Documents(self.documents(query.text, rng, noisy, ranked), noisy)
        yield  # a search is a generator; this one never waits


def fresh_questions(n: int, seed: int) -> list[Question]:
    """n questions, each about a world of its own, so that no simulator can memorise them; id: its seed."""
    rng = random.Random(f"fresh {seed}")
    worlds = [World(rng.getrandbits(48)) for _ in range(n)]
    return [replace(world.ask(rng), id=str(world.seed)) for world in worlds]


def lookup_anywhere(query: Query, noise: float = 0.0):
    """A search in the question's own world (`fresh_questions`); best fact first, as simulators learn it."""
    return (yield from World(int(query.question.id)).lookup(query, noise, ranked=True))


def shuffled(search: Search) -> Search:
    """The same engine with its facts in random order, as the policy is to read them."""

    def mixed(query: Query):
        documents = yield from search(query)
        facts = split_documents(documents.text)
        random.Random(f"{query.address} {query.text}").shuffle(facts)
        return replace(documents, text=number(facts))

    return mixed
