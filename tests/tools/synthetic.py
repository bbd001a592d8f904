"""Passages of random words with the statistics of a real corpus, to measure an index that is larger than it.

    python tests/tools/synthetic.py corpus.jsonl.gz 1000000 > million.jsonl
    python tests/tools/synthetic.py --index million.jsonl --out million  # as search.py does: what it takes
    python tests/tools/synthetic.py --search million [--queries FILE]    # what a query takes

Lengths are those of the corpus, drawn at random, and words are drawn by their frequency in it. New words
appear as in it (Heaps: n words of text hold c n^beta different ones, fitted to half and all of it) and come
again by chance. A query is eight different words of one passage. Not text: no two words belong together.
"""

import argparse
import json
import random
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import search
from search import load, passage, read_lines, tokenise


def write(corpus: str, n: int) -> None:
    words = [tokenise(title) + tokenise(text) for title, text in read_lines(corpus, passage)]
    flat, lengths = [w for text in words for w in text], [len(text) for text in words]
    half, whole = len(set(flat[: len(flat) // 2])), len(set(flat))
    beta = np.log2(whole / half)
    c = whole / len(flat) ** beta
    print(
        f"{len(words):,} passages, {len(flat):,} words, {whole:,} of them different, beta {beta:.3f}",
        file=sys.stderr,
    )
    rng, seen, known = np.random.default_rng(0), 0, 0
    pool = np.array(flat, dtype=object)
    for start in range(0, n, 10_000):
        sizes = rng.choice(lengths, min(10_000, n - start))
        total = int(sizes.sum())
        drawn = pool[rng.integers(0, len(pool), total)]
        fresh = max(0, int(c * (seen + total) ** beta) - whole - known)
        names = np.array([f"new{known + i}" for i in range(fresh)], dtype=object)
        drawn[rng.integers(0, total, fresh)] = names
        again = min(known, total) // 50  # rare words come again
        drawn[rng.integers(0, total, again)] = [f"new{i}" for i in rng.integers(0, max(known, 1), again)]
        seen, known, ends = seen + total, known + fresh, np.cumsum(sizes)
        for first, end in zip(ends - sizes, ends):
            title, text = " ".join(drawn[first : first + 2]), " ".join(drawn[first + 2 : end])
            print(json.dumps({"title": title, "contents": text}))


def measure(folder: str, queries: str) -> None:
    began = time.process_time()
    made, rng = load(Path(folder)), random.Random(0)
    opened, n = time.process_time() - began, len(made.ends) - 1
    if queries:
        asked = [json.loads(line)["question"] for line in Path(queries).read_text().splitlines()][:200]
    else:
        texts = (tokenise(" ".join(made.passage(rng.randrange(n)))) for _ in range(1000))
        asked = [" ".join(rng.sample(sorted(set(t)), 8)) for t in texts if len(set(t)) > 7][:200]
    for q in asked[:40]:
        made.top(q, 5)
    times = []
    for q in asked[40:]:
        began = time.process_time()
        made.documents(q, 5)
        times.append(1e3 * (time.process_time() - began))
    with ThreadPoolExecutor(32) as pool:
        began = time.process_time()
        list(pool.map(lambda q: made.documents(q, 5), asked[40:]))
        together = 1e3 * (time.process_time() - began) / len(asked[40:])
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    told = {name: f"{int(status[name].split()[0]) / 2**20:.2f} GiB" for name in ("RssAnon", "RssFile")}
    print(f"{n:,} passages, {len(made.vocabulary):,} words, {len(made.holder):,} postings")
    print(f"opened in {opened:.2f} s, {told}; a query {np.median(times):.2f} ms (median), ", end="")
    print(f"{np.mean(times):.2f} ms (mean), of 32 at once {together:.2f} ms each, all of it CPU time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", nargs="*")
    parser.add_argument("--index")
    parser.add_argument("--out")
    parser.add_argument("--search")
    parser.add_argument("--queries")
    a = parser.parse_args()
    if a.index:
        began = time.process_time()
        search.main(["index", a.index, "--out", a.out])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{time.process_time() - began:.1f} s of CPU time, {peak:.2f} GiB of memory at most")
    elif a.search:
        measure(a.search, a.queries)
    else:
        write(a.corpus[0], int(a.corpus[1]))
