"""Search-R1's /retrieve in another process, by FastAPI and bm25s: a peer, killed under load (peers.py).

Not ours in any line that answers: who tests a client with its own server tests one reading of the protocol.

    python tests/faults/retriever.py CORPUS PORT [SECONDS that each answer takes]
"""

import json
import sys
import time

import bm25s
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel


class Asked(BaseModel):
    """What a client posts."""

    queries: list[str]
    topk: int = 3
    return_scores: bool = False


def served(corpus: str, pause: float) -> FastAPI:
    """The server of a corpus of JSON lines {"id", "contents"}."""
    with open(corpus, encoding="utf-8") as lines:
        passages = [json.loads(line) for line in lines]
    index, app = bm25s.BM25(), FastAPI()
    index.index(bm25s.tokenize([p["contents"] for p in passages], show_progress=False), show_progress=False)

    @app.get("/health")
    def health() -> dict:
        return {"passages": len(passages)}

    @app.post("/retrieve")
    def retrieve(asked: Asked) -> dict:
        time.sleep(pause)
        words = bm25s.tokenize(asked.queries, show_progress=False, return_ids=False)
        found, scores = index.retrieve(words, k=min(asked.topk, len(passages)), show_progress=False)
        rows = [
            [{"document": passages[i], "score": float(s)} for i, s in zip(*row)] for row in zip(found, scores)
        ]
        return {"result": rows if asked.return_scores else [[r["document"] for r in row] for row in rows]}

    return app


if __name__ == "__main__":
    uvicorn.run(
        served(sys.argv[1], float((*sys.argv, "0")[3])),
        host="127.0.0.1",
        port=int(sys.argv[2]),
        log_level="error",
    )
