"""Real search engines behind the call that the simulator answers too: `search(query)` -> Documents.

none                     nothing for any query: an empty information block, the honest baseline
bm25:PATH                BM25 in memory over a JSON lines corpus {"id", "title", "contents"}, plain or gzip
http://HOST:PORT[/PATH]  a retriever that speaks Search-R1's protocol, at /retrieve if no path is given
serpapi                  Google's first page through serpapi.com, titles and snippets. The key is in
                         SERPAPI_API_KEY, another address in SERPAPI_BASE_URL

A document from the network is data: one line, whatever it holds. A failure there is an error (servers.py),
never a document. Queries to a server are cut after 500 characters.

Not an engine for all of Wikipedia (BM25 suits up to a million passages); no stemmer, no reranker, no cache on
disk: indexing takes seconds.

    python search.py bm25:corpus.jsonl.gz "who founded The Comics Journal"

Words are lower-cased runs of letters and digits without accents; title and text count once each. Other usual
steps were measured and left out. Share of questions with a golden answer in the top 10, 32,504 Wikipedia
passages, 466 and 454 questions (yes/no excluded), standard error .02: HotpotQA .850, 2WikiMultiHopQA .681 as
it is; without Lucene's 33 stop words .863, .676; plurals stemmed .848, .672; the title counted twice .845,
.676; k1 .9 with b .4 .809, .661. `python eval.py --search bm25:CORPUS --data FILE`, without a policy, prints
that share for any corpus and questions. Indexing took 3 to 4 s, a query 1.4 and .8 ms (2-core Intel Xeon, no
GPU, one thread, 2026-11-22).
"""

import gzip
import json
import os
import re
import time
import unicodedata
import zlib
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlencode

import numpy as np

from cli import screen
from cli.parser import NEEDED, Flag, parse
from rollout import Documents, Query, Question, Search
from servers import Server, environment_key, one_line

Row = TypeVar("Row")
WORD = re.compile(r"[^\W_]+")

# ------------------------------------------------------------------------------------------------------ files


def read_lines(path: str | Path, parse: Callable[[dict], Row]) -> Iterator[Row]:
    """`parse` of each object of a JSON lines file, gzip or plain; blank lines are skipped.

    Raises ValueError with file and line where a line is not a JSON object or `parse` raises one; OSError
    where the file cannot be opened.
    """
    for number, line in enumerate(_unpacked(path), 1):
        if line.strip():
            try:
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
    with (gzip.open if zipped else open)(path, "rb") as lines:
        try:
            yield from lines
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise ValueError(f"{path} is damaged ({e}): fetch or make it again") from None


def passage(row: dict) -> tuple[str, str]:
    """(title, text) of a corpus row, white space collapsed.

    In the usual Wikipedia dumps the contents begin with the quoted title on a line of its own: it is not part
    of the text, and serves as title where the row has none. Raises ValueError without a text or a title.
    """
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
    return WORD.findall(text.lower())


class BM25:
    """Okapi BM25 over (title, text) passages, with Lucene's idf, which is never negative:

    score(q, d) = sum over words t of q:  ln(1 + (N - n_t + .5) / (n_t + .5)) * f (k1 + 1) / (f + k1 norm_d)
    norm_d = 1 - b + b |d| / mean |d|

    f: how often t is in d; n_t: how many of the N passages hold t. All but the sum is known in advance: each
    word has a slice of passages and weights, and a query adds up the slices of its words. Robertson and
    Zaragoza 2009, The Probabilistic Relevance Framework. Raises ValueError for a corpus without passages.
    """

    def __init__(self, passages: Iterable[tuple[str, str]], k1: float = 1.2, b: float = 0.75):
        self.passages: list[tuple[str, str]] = []
        self.vocabulary: dict[str, int] = {}
        terms, lengths = array("i"), array("i")
        for title, text in passages:
            words = tokenise(title) + tokenise(text)
            terms.extend([self.vocabulary.setdefault(w, len(self.vocabulary)) for w in words])
            lengths.append(len(words))
            self.passages.append((title, text))
        if not self.passages:
            raise ValueError("the corpus holds no passages")
        self._post(np.array(terms, np.int64), np.array(lengths, np.int64), k1, b)

    def _post(self, terms: np.ndarray, lengths: np.ndarray, k1: float, b: float) -> None:
        """Words of all passages in a row (T,), words per passage (N,) -> postings (P,) by word."""
        n = len(lengths)
        holder = np.repeat(np.arange(n), lengths)  # (T,)
        pairs, f = np.unique(terms * n + holder, return_counts=True)  # (P,)
        self.holder = (pairs % n).astype(np.int32)  # (P,)
        n_t = np.bincount(pairs // n, minlength=len(self.vocabulary))  # (V,)
        self.start = np.concatenate([[0], np.cumsum(n_t)])  # (V + 1,)
        idf = np.repeat(np.log1p((n - n_t + 0.5) / (n_t + 0.5)), n_t)  # (P,)
        norm = 1 - b + b * lengths / max(lengths.mean(), 1)  # (N,)
        self.weight = idf * f * (k1 + 1) / (f + k1 * norm[self.holder])  # (P,)

    def scores(self, query: str) -> np.ndarray:
        """(N,) float64. Words are added in the order of their ids, so their order changes no rounding."""
        total = np.zeros(len(self.passages))  # (N,)
        for term in sorted(self.vocabulary[w] for w in tokenise(query) if w in self.vocabulary):
            posting = slice(self.start[term], self.start[term + 1])
            total[self.holder[posting]] += self.weight[posting]
        return total

    def top(self, query: str, count: int) -> list[int]:
        """Indices of the best `count` passages, best first, ties in corpus order; none that scores 0."""
        total = self.scores(query)
        bar = np.partition(total, -count)[-count] if count < len(total) else 0.0
        among = np.flatnonzero((total >= bar) & (total > 0))  # all ties at the bar, until the stable sort
        return among[np.argsort(-total[among], kind="stable")][:count].tolist()

    def documents(self, query: str, count: int) -> str:
        """The best `count` passages as lines "Doc 1: (Title: X) text"; "" if the corpus knows no word."""
        return render(self.passages[i] for i in self.top(query, count))


def render(passages: Iterable[tuple[str, str]]) -> str:
    """(title, text) as lines "Doc 1: (Title: X) text": one a passage, whatever it holds."""
    lines = (f"(Title: {one_line(title)}) {one_line(text)}" for title, text in passages)
    return "\n".join(f"Doc {n}: {line}".rstrip() for n, line in enumerate(lines, 1))


DOCUMENT = re.compile(r"^Doc (\d+): ?", re.MULTILINE)


def split_documents(documents: str) -> list[str]:
    """The documents one by one, without "Doc 1:"; a text without such marks is one document."""
    parts = DOCUMENT.split(documents)
    texts = parts[2::2] if len(parts) > 1 else parts
    return [text.strip() for text in texts if text.strip()]


def shortened(search: Search, words: int) -> Search:
    """The same engine, each of its documents cut after so many words."""

    def short(query: Query):
        documents = yield from search(query)
        texts = (" ".join(text.split()[:words]) for text in split_documents(documents.text))
        return replace(documents, text="\n".join(f"Doc {i}: {text}" for i, text in enumerate(texts, 1)))

    return short


# ------------------------------------------------------------------------------------- engines on the network

QUERY = 500  # characters; what is longer is no query, and too long for an address


def retrieved(answer: object) -> list[tuple[str, str]]:
    """(title, text) of each passage in {"result": [[passage, ...]]}, the answer to one query.

    A passage may be wrapped as {"document": passage, "score"}. Raises ValueError for another shape.
    """
    match answer:
        case {"result": [[*items]]}:
            return [_retrieved(item) for item in items]
    raise ValueError('no {"result": [[passage, ...]]} for the one query')


def _retrieved(item: object) -> tuple[str, str]:
    """(title, text). The first line of "contents" is the title, as in wiki-18, unless there is another."""
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


def retriever(address: str, count: int, limit: float = 60.0) -> Search:
    """Search-R1's protocol: POST {"queries": [query], "topk": count, "return_scores": true}."""
    server = Server(address, "a /retrieve server", limit=limit)
    path, fixed = "" if server.path else "/retrieve", {"topk": count, "return_scores": True}
    return elsewhere(server, retrieved, count, lambda text: (path, {"queries": [text]} | fixed))


def organic(answer: object) -> list[tuple[str, str]]:
    """(title, snippet) of SerpApi's results. Raises ValueError where it failed, or for another shape.

    A search that found nothing has the status Success, and no "organic_results".
    """
    match answer:
        case {"organic_results": [*results]}:
            return [_organic(result) for result in results]
        case {"search_metadata": {"status": "Success"}}:
            return []
        case {"error": str(words)}:
            raise ValueError(f"an error, {words!r}")
    raise ValueError('no "organic_results"')


def _organic(result: object) -> tuple[str, str]:
    match result:
        case {"title": str(title)}:
            return title, snippet if isinstance(snippet := result.get("snippet"), str) else ""
    raise ValueError("a result without a title")


def serpapi(count: int, limit: float = 60.0) -> Search:
    """Google's first page, about ten results. Raises ValueError where there is no key."""
    key = environment_key("SERPAPI_API_KEY")
    if not key:
        raise ValueError("serpapi needs a key: put it into SERPAPI_API_KEY in the environment")
    server = Server(os.environ.get("SERPAPI_BASE_URL") or "https://serpapi.com", "SerpApi", key, limit=limit)

    fixed = {"engine": "google", "api_key": key}
    return elsewhere(
        server, organic, count, lambda text: ("/search.json?" + urlencode({"q": text} | fixed), None)
    )


Request = Callable[[str], tuple[str, dict | None]]


def elsewhere(server: Server, read: Callable, count: int, request: Request) -> Search:
    """A search that waits for a server while other rows decode. request: the query's text -> path, body."""

    def search(query: Query) -> Generator:
        text = one_line(query.text, QUERY)
        passages = (yield server.ask(read, *request(text))) if text else []
        return Documents(render(passages[:count]))

    return search


# ------------------------------------------------------------------------------------------------ all engines


def at_once(find: Callable[[str], str]) -> Search:
    """A search that returns at once: `find` maps a query's text to documents."""

    def search(query: Query) -> Generator:
        return Documents(find(query.text))
        yield  # never reached, but every search is a generator

    return search


def open_bm25(path: str | Path) -> BM25:
    """Index a corpus file; from the third second on, stderr shows passages done and passages a second."""
    passages = read_lines(path, passage)
    return BM25(screen.bar(f"indexing {Path(path).name}", unit="passages", over=passages))


def open_search(spec: str, count: int = 5, limit: float = 60.0) -> Search:
    """The search that `spec` names (see above), with at most `count` documents a query.

    limit: seconds of a query to a server, retries included. Raises ValueError for another spec, and for a
    file that is not a corpus. A search of a server raises ServerError, an OSError, when it fails.
    """
    kind, _, path = spec.partition(":")
    if count < 1:
        raise ValueError(f"a search must return at least one document, not {count}")
    if spec == "none":
        return at_once(lambda text: "")
    if kind == "bm25" and path:
        index = open_bm25(path)
        return at_once(lambda text: index.documents(text, count))
    if kind in ("http", "https"):
        return retriever(spec, count, limit)
    if spec == "serpapi":
        return serpapi(count, limit)
    raise ValueError(f"unknown search engine {spec!r}: choose none, bm25:CORPUS, http://HOST:PORT or serpapi")


def ask(search: Search, text: str) -> str:
    """The documents that a real engine has for a text, waited for."""
    waiting, sent = search(Query(text, Question("", ()))), None
    while True:
        try:
            sent = waiting.send(sent).result()
        except StopIteration as end:
            return end.value.text


FLAGS = {
    "what is asked": [
        Flag(
            "engine",
            str,
            NEEDED,
            "bm25:CORPUS (or the file alone), http://HOST:PORT[/PATH], serpapi, none",
            bare=True,
        ),
        Flag("query", str, NEEDED, "what to search for", "WORD", many="+", bare=True),
    ]
}


def main(argv: list[str] | None = None) -> None:
    """Show what an engine answers, and how fast."""
    given = parse(__doc__, FLAGS, argv)
    engine, began = given["engine"], time.perf_counter()
    search = open_search(f"bm25:{engine}" if Path(engine).is_file() else engine)
    opened = time.perf_counter()
    print(ask(search, " ".join(given["query"])) or "nothing found")
    found = time.perf_counter()
    print(f"engine ready in {opened - began:.1f} s, the query in {1e3 * (found - opened):.1f} ms")


if __name__ == "__main__":
    screen.run(main)
