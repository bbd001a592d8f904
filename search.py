"""Real search engines, called like the simulator: `search(query)` -> Documents.

none                     no documents for any query: the baseline without search
bm25:PATH                BM25 over a JSON lines corpus {"id", "title", "contents"}, plain or gzip, which is
                         indexed in memory, or over an index on disk
http://HOST:PORT[/PATH]  a retriever with Search-R1's protocol, at /retrieve unless a path is given
serpapi                  Google's first page through serpapi.com, titles and snippets. SERPAPI_API_KEY holds
                         the key; SERPAPI_BASE_URL, if set, another address

A document from the network becomes one line, whatever it holds. A failed request is an error, never a
document. Queries to a server are cut to 500 characters.

No stemmer, no reranker; nothing is added to an index, it is made again.

    python search.py bm25:corpus.jsonl.gz "who founded The Comics Journal"
    python search.py index wiki-18.jsonl.gz --out wiki        # then --search bm25:wiki

The usual refinements were measured and left out. Share of questions with a golden answer in the top 10 of
32,504 Wikipedia passages, standard error .02: as it is, HotpotQA .850, 2WikiMultiHopQA .681; without Lucene's
33 stop words .863, .676; plurals stemmed .848, .672; the title counted twice .845, .676; k1 .9 with b .4
.809, .661. `python eval.py --search bm25:CORPUS --data FILE` prints that share for any corpus and questions.
Indexing took 3 to 4 s, a query about 1 ms (one thread of a 2-core Intel Xeon, 2026-11-22).
"""

import gzip
import json
import os
import re
import sys
import time
import unicodedata
import zlib
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar
from urllib.parse import urlencode

import numpy as np

from cli import disk, screen
from cli.disk import readable
from cli.parser import NEEDED, Flag, parse
from rollout import Documents, Query, Question, Search
from servers import Server, environment_key, one_line

Row = TypeVar("Row")

# ------------------------------------------------------------------------------------------------------ files


def read_lines(path: str | Path, parse: Callable[[dict], Row]) -> Iterator[Row]:
    """Apply `parse` to each object of a JSON lines file, gzip or plain, skipping blank lines. ValueError with
    file and line if a line is not a JSON object or `parse` raises one; OSError if there is no file."""
    for number, line in enumerate(_unpacked(path), 1):
        if line.strip():
            try:
                with readable("it"):
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("is not a JSON object")
                    parsed = parse(row)
            except ValueError as e:
                broken = isinstance(e, json.JSONDecodeError)
                what = f"is not JSON ({e.msg} at column {e.colno})" if broken else e
                raise ValueError(f"{path}, line {number}: {what}") from None
            yield parsed


def _unpacked(path: str | Path) -> Iterator[bytes]:
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    room = 2**24 + 50 * os.path.getsize(path) if zipped else sys.maxsize - 1  # text shrinks to a tenth or so
    with (gzip.open if zipped else open)(path, "rb") as lines:
        try:
            while line := lines.readline(room + 1):
                room -= len(line)
                if room < 0:
                    raise ValueError(f"{path} unpacks to far more than a text of its size")
                yield line
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise ValueError(f"{path} is damaged ({e}): download or make it again") from None


def passage(row: dict) -> tuple[str, str]:
    """(title, text) of a corpus row, white space collapsed; ValueError without them. In the usual Wikipedia
    dumps the contents begin with the quoted title on its own line: the title if the row has no other."""
    contents, title = row.get("contents"), row.get("title")
    if not isinstance(contents, str):
        raise ValueError('has no text under "contents"')
    first, _, rest = contents.partition("\n")
    quoted = len(first) > 1 and first[0] == first[-1] == '"'
    if title is None and quoted:
        title = first[1:-1]
    if not isinstance(title, str):
        raise ValueError('has no text under "title", and "contents" does not begin with a quoted one')
    return " ".join(title.split()), " ".join((rest if quoted else contents).split())


# ------------------------------------------------------------------------------------------------------- BM25


def tokenise(text: str) -> list[str]:
    """Lower-cased runs of letters and digits, accents off: "Beyoncé's 1st" -> beyonce, s, 1st."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.findall(r"[^\W_]+", text.lower())


EMPTY = set(
    "a an and are at be been by did do does for from had has have how in is it its of on or that the these "  # noqa: SIM905
    "this those to was were what when where which who whom whose why with".split()
)


def content(text: str) -> set[str]:
    """The different words of a text that say what it is about: `tokenise` without function words."""
    return set(tokenise(text)) - EMPTY


@contextmanager
def undamaged() -> Iterator[None]:
    """Whatever an index raises whose numbers lead nowhere is a ValueError. (Its size is checked when it is
    opened; to read all of it would take minutes.)"""
    try:
        yield
    except (ValueError, *disk.ODD) as e:
        raise ValueError(f"the index is damaged ({type(e).__name__}: {e}): copy or make it again") from e


class BM25:
    """Okapi BM25 over (title, text) passages, with Lucene's idf, which is never negative:

    score(q, d) = sum over words t of q:  ln(1 + (N - n_t + .5) / (n_t + .5)) * f (k1 + 1) / (f + k1 norm_d)
    norm_d = 1 - b + b |d| / mean |d|

    f: how often t is in d; n_t: how many of the N passages hold t. All but the sum is precomputed: word t
    adds weight[i] to the score of passage holder[i], for i from start[t] to start[t + 1]. Robertson and
    Zaragoza 2009, The Probabilistic Relevance Framework.
    """

    def __init__(self, vocabulary: dict[str, int], columns: dict[str, np.ndarray]):
        self.vocabulary = vocabulary
        self.lines, self.ends, self.start, self.holder, self.weight = columns.values()

    def passage(self, i: int) -> tuple[str, str]:
        """(title, text). Raises ValueError where the index is damaged, as `scores` does."""
        with undamaged():
            title, text = json.loads(self.lines[self.ends[i] : self.ends[i + 1]].tobytes())
            return title + "", text + ""  # a TypeError where they are no texts

    def scores(self, query: str) -> np.ndarray:
        """(N,) float64, in which sums of a few fp32 weights are exact, whatever the order of the words."""
        total = np.zeros(len(self.ends) - 1)  # (N,)
        with undamaged():
            for term in (self.vocabulary[w] for w in tokenise(query) if w in self.vocabulary):
                posting = slice(self.start[term], self.start[term + 1])
                total[self.holder[posting]] += self.weight[posting]  # no passage is in it twice
        return total

    def top(self, query: str, count: int) -> list[int]:
        """Indices of the best `count` passages with a positive score, best first, ties in corpus order."""
        total = self.scores(query)
        best = np.maximum.reduceat(total, np.arange(0, len(total), len(total) // 1024 + 1))  # by stretches
        bar = np.partition(best, -count)[-count] if count < len(best) else 0.0  # that `count` passages reach
        among = np.flatnonzero((total >= bar) & (total > 0))  # all ties at the bar, until the stable sort
        return among[np.argsort(-total[among], kind="stable")][:count].tolist()

    def documents(self, query: str, count: int) -> str:
        """The best `count` passages as lines "Doc 1: (Title: X) text"; "" if no word is in the corpus."""
        return render(map(self.passage, self.top(query, count)))


# An index in memory, or on disk, a file each: passages as JSON end to end, the N + 1 places where they begin
# and end; of V words the V + 1 places where their P postings do; a posting is a passage and a weight.
COLUMNS = {"lines": np.uint8, "ends": np.int64, "start": np.int64, "holder": np.int32, "weight": np.float32}
BLOCK = 2**24  # words counted at once
VOCABULARY = "vocabulary.json"


def index(
    passages: Iterable[tuple[str, str]], folder: Path | None = None, k1: float = 1.2, b: float = 0.75
) -> BM25:
    """Index passages in memory, or into an empty folder: memory then holds the vocabulary and four bytes a
    word. Raises ValueError for a corpus without a word."""
    files = {name: open(folder / name, "wb") if folder else BytesIO() for name in COLUMNS}  # noqa: SIM115
    vocabulary: dict[str, int] = {}
    terms, lengths, ends = array("i"), array("q"), array("q", [0])  # word ids of all passages end to end
    for one in passages:
        words = [w for text in one for w in tokenise(text)]
        terms.extend([vocabulary.setdefault(w, len(vocabulary)) for w in words])
        lengths.append(len(words))
        ends.append(ends[-1] + files["lines"].write(json.dumps(one).encode()))
    if not vocabulary:
        raise ValueError(f"the corpus holds no {'words' if lengths else 'passages'}")
    n, terms, lengths = len(lengths), np.frombuffer(terms, np.int32), np.array(lengths)  # (T,), (N,)
    until, norm = np.cumsum(lengths), 1 - b + b * lengths / lengths.mean()  # (N,)
    blocks = [(first, terms[first : first + BLOCK]) for first in range(0, len(terms), BLOCK)]
    sums = np.cumsum(sum(np.bincount(block, minlength=len(vocabulary)) for _, block in blocks))  # (V,)
    edges = np.unique([0, *np.searchsorted(sums, np.arange(BLOCK, len(terms), BLOCK)), len(sums)])
    held = [[0]]
    for low, high in screen.bar("counting", len(edges) - 1, "blocks", over=list(pairwise(edges))):
        at = np.concatenate([first + np.flatnonzero((low <= x) & (x < high)) for first, x in blocks])
        places = (terms[at] - low) * np.int64(n) + np.searchsorted(until, at, "right")
        pairs, f = np.unique(places, return_counts=True)  # by word
        word, passage = pairs // n, pairs % n
        held.append(n_t := np.bincount(word, minlength=high - low))
        idf = np.log1p((n - n_t + 0.5) / (n_t + 0.5))
        weight = idf[word] * f * (k1 + 1) / (f + k1 * norm[passage])
        for name, values in (("holder", passage), ("weight", weight)):
            files[name].write(values.astype(COLUMNS[name]))
    files["ends"].write(ends)
    files["start"].write(np.cumsum(np.concatenate(held), dtype=np.int64))
    if not folder:
        return BM25(vocabulary, {k: np.frombuffer(f.getbuffer(), COLUMNS[k]) for k, f in files.items()})
    for file in files.values():
        file.close()
    disk.write_json(folder / VOCABULARY, vocabulary)
    return load(folder)


def load(folder: Path) -> BM25:
    """An index on disk, mapped into memory but for its vocabulary. ValueError for any other folder."""
    vocabulary = disk.read_json(folder / VOCABULARY, "an index: python search.py index CORPUS --out DIR")
    try:
        columns = {name: np.memmap(folder / name, kind, "r") for name, kind in COLUMNS.items()}
    except ValueError as e:  # its size is not that of whole numbers, or 0
        raise ValueError(f"{folder} is damaged ({e}): copy or make it again") from None
    lines, ends, start, holder, weight = columns.values()
    sizes = [len(start), len(lines), len(holder), len(weight)]
    if sizes != [len(vocabulary) + 1, ends[-1], start[-1], start[-1]]:  # a copy that was cut
        raise ValueError(f"{folder} is damaged (its files do not fit together): copy or make it again")
    return BM25(vocabulary, columns)


def render(passages: Iterable[tuple[str, str]]) -> str:
    """(title, text) as lines "Doc 1: (Title: X) text": one per passage, whatever it holds."""
    return number(f"(Title: {one_line(title)}) {one_line(text)}" for title, text in passages)


def number(texts: Iterable[str]) -> str:
    """Texts as lines "Doc 1: ..."; `split_documents` is the inverse."""
    return "\n".join(f"Doc {n}: {text}".rstrip() for n, text in enumerate(texts, 1))


def split_documents(documents: str) -> list[str]:
    """The documents in a text, without their "Doc 1:"; a text without these labels is one document."""
    first, *labelled = re.split(r"(?m)^Doc \d+: ?", documents)
    texts = labelled or [first]
    return [text.strip() for text in texts if text.strip()]


def presented(search: Search, count: int, words: int | None = None) -> Search:
    """The same search in the one form that a policy reads: at most `count` documents, as lines "Doc 1: ...",
    each cut to its first `words` words (None: whole)."""

    def formed(query: Query):
        documents = yield from search(query)
        texts = split_documents(documents.text)[:count]
        return replace(documents, text=number(" ".join(text.split()[:words]) for text in texts))

    return formed


# ------------------------------------------------------------------------------------- engines on the network

QUERY = 500  # characters; anything longer is hardly a query, and too long for a URL


def retrieved(answer: object) -> list[tuple[str, str]]:
    """(title, text) of each passage in {"result": [[passage, ...]]}, the answer to one query; ValueError for
    any other shape. A passage may be wrapped as {"document": passage, "score"}. The first line of "contents"
    is the title, as in wiki-18, unless there is another."""

    def read(item: object) -> tuple[str, str]:
        match item["document"] if isinstance(item, dict) and "document" in item else item:
            case {"title": str(title), "text": str(text)}:
                return title, text
            case {"contents": str(contents), "title": str(title)}:
                first, _, rest = contents.partition("\n")
                return title, rest if first.strip('"') == title else contents
            case {"contents": str(contents)} | str(contents):
                first, _, rest = contents.partition("\n")
                return first.strip('"'), rest
        raise ValueError('a passage without "contents"')

    match answer:
        case {"result": [[*items]]}:
            return [read(item) for item in items]
    raise ValueError('no {"result": [[passage, ...]]} for the one query')


def retriever(address: str, count: int, limit: float) -> Search:
    """Search-R1's protocol: POST {"queries": [query], "topk": count, "return_scores": true}."""
    server = Server(address, "a /retrieve server", limit=limit)
    path, fixed = "" if server.path else "/retrieve", {"topk": count, "return_scores": True}
    return remote(server, retrieved, count, lambda text: (path, {"queries": [text]} | fixed))


def organic(answer: object) -> list[tuple[str, str]]:
    """(title, snippet) of SerpApi's results; ValueError for its errors and any other shape. A search that
    found nothing has the status Success and no "organic_results"."""
    match answer:
        case {"organic_results": [*results]}:
            if not all(isinstance(r, dict) and isinstance(r.get("title"), str) for r in results):
                raise ValueError("a result without a title")
            return [(r["title"], s if isinstance(s := r.get("snippet"), str) else "") for r in results]
        case {"search_metadata": {"status": "Success"}}:
            return []
        case {"error": str(words)}:
            raise ValueError(f"an error, {words!r}")
    raise ValueError('no "organic_results"')


def serpapi(count: int, limit: float) -> Search:
    """Google's first page, about ten results. Raises ValueError without a key."""
    key = environment_key("SERPAPI_API_KEY")
    if not key:
        raise ValueError("serpapi needs a key: set SERPAPI_API_KEY in the environment")
    server = Server(os.environ.get("SERPAPI_BASE_URL") or "https://serpapi.com", "SerpApi", key, limit=limit)
    path, fixed = "/search.json?", {"engine": "google", "api_key": key}
    return remote(server, organic, count, lambda text: (path + urlencode({"q": text} | fixed), None))


def remote(server: Server, read: Callable, count: int, request: Callable[[str], tuple]) -> Search:
    """A search by a server; other rows decode while it waits. request: the query's text -> path, body."""

    def search(query: Query) -> Generator:
        text = one_line(query.text, QUERY)
        passages = (yield server.submit(server.ask, read, *request(text))) if text else []
        return Documents(render(passages[:count]))

    return search


# ------------------------------------------------------------------------------------------------ all engines


def at_once(find: Callable[[str], str]) -> Search:
    """A search that returns at once: `find` maps a query's text to documents."""

    def search(query: Query) -> Generator:
        return Documents(find(query.text))
        yield  # never reached, but every search is a generator

    return search


def open_bm25(path: str | Path, folder: Path | None = None) -> BM25:
    """Load an index, or index a corpus file, in memory or into a folder, with a progress bar on stderr."""
    if Path(path).is_dir():
        return load(Path(path))
    passages = read_lines(path, passage)
    return index(screen.bar(f"indexing {Path(path).name}", unit="passages", over=passages), folder)


def index_file(path: str, out: Path) -> None:
    """The index of a corpus file on disk, whole or not at all."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a directory: index takes a corpus file")
    if out.exists():
        raise ValueError(f"--out {out} is there already: choose another")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no {out.parent}")
    with TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as home:
        (folder := Path(home, "index")).mkdir()
        made = open_bm25(path, folder)
        folder.rename(out)
    print(f"{len(made.ends) - 1:,} passages, {len(made.vocabulary):,} words, {len(made.holder):,} postings")


def open_search(spec: str, count: int = 5, limit: float = 60.0) -> Search:
    """The search that `spec` names (see above), with at most `count` documents a query.

    limit: seconds for a query to a server, retries included. Raises ValueError for an unknown spec, and for a
    file that is not a corpus. A failed request to a server raises ServerError, an OSError, during the search.
    """
    kind, _, path = spec.partition(":")
    if count < 1:
        raise ValueError(f"a search must return at least one document, not {count}")
    if spec == "none":
        return at_once(lambda text: "")
    if kind == "bm25" and path:
        found = open_bm25(path)
        return at_once(lambda text: found.documents(text, count))
    if kind in ("http", "https"):
        return retriever(spec, count, limit)
    if spec == "serpapi":
        return serpapi(count, limit)
    raise ValueError(f"unknown search engine {spec!r}: choose none, bm25:CORPUS, http://HOST:PORT or serpapi")


def ask(search: Search, text: str, question: Question = Question("", ())) -> str:  # noqa: B008 (frozen)
    """The documents of a real engine for a text. Blocks until they are here."""
    waiting, sent = search(Query(text, question)), None
    while True:
        try:
            sent = waiting.send(sent).result()
        except StopIteration as end:
            return end.value.text


ENGINE = "bm25:CORPUS (or just the file), http://HOST:PORT[/PATH], serpapi, none"
FLAGS = {
    "the query": [
        Flag("engine", str, NEEDED, ENGINE, bare=True),
        Flag("query", str, NEEDED, "what to search for", "WORD", many="+", bare=True),
        Flag("out", str, "", "of index CORPUS: the directory that becomes the index", "DIR"),
    ]
}


def main(argv: list[str] | None = None) -> None:
    """Print an engine's documents for a query, and how long it took; or index a corpus."""
    given, began = parse(__doc__, FLAGS, argv), time.perf_counter()
    engine = given["engine"]
    if engine == "index":
        if len(given["query"]) > 1 or not given.get("out"):
            raise ValueError("index takes one corpus and a directory: index CORPUS --out DIR")
        return index_file(given["query"][0], Path(given["out"]))
    search, opened = open_search(f"bm25:{engine}" if Path(engine).exists() else engine), time.perf_counter()
    print(screen.harmless(ask(search, " ".join(given["query"]))) or "nothing found")
    took = 1e3 * (time.perf_counter() - opened)
    print(f"engine ready in {opened - began:.1f} s, the query in {took:.1f} ms")


if __name__ == "__main__":
    screen.run(main)
