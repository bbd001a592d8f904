"""JSON over HTTP with a time limit, a few retries, and one clear line on failure.

A `Server` is asked for JSON. A `Chat` is a client of an OpenAI-compatible server (vLLM, SGLang), for a
simulator too large for this GPU. Requests give futures, so that the engine of rollout.py goes on decoding.
Two promises: a request ends within `limit` seconds, retries and pauses included; and whatever is not a
complete, well-formed answer is a `ServerError`, never a text to train on.

Not a session (a connection serves one request); no streaming, no redirects (they might carry a key away).
Proxies of the environment are used (without their passwords), but never for this machine. A host name that is
being looked up when the program ends holds it up for as long as the system's own limit.

    chat = Chat("http://127.0.0.1:8000/v1")
    chat.complete([{"role": "user", "content": "Who wrote Emma?"}], 0.8, max_tokens=50, seed=0).result()
"""

import asyncio
import functools
import ipaddress
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import quote, quote_plus
from urllib.request import getproxies, proxy_bypass

import httpx2

Value = TypeVar("Value")
TRIES = 4  # of a request, where the fault may pass
PAUSE = 0.5  # seconds before the second try; each further one waits twice as long
LARGEST = 2**24  # bytes of an answer
UNSEEN = re.compile("[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")  # control characters but white space


class ServerError(OSError):
    """A server failed: one line with its address, what happened, and what to do."""


@dataclass(eq=False)
class Passing(Exception):
    """A fault that may pass."""

    fault: str
    wait: int = 0  # seconds for which the server asked to be left alone


def one_line(text: str, most: int = 10_000) -> str:
    """Foreign text as data: single spaces, no control characters or half surrogates, `most` long."""
    return " ".join(UNSEEN.sub("", text).split())[:most]


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """All requests run here, in one daemon thread: nothing waits for it at exit, which would hold the GPU."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


@dataclass(eq=False, repr=False)  # a repr would show the key
class Server:
    """A place to ask for JSON. Raises ValueError for an address that cannot be used."""

    address: str  # http(s)://HOST:PORT/PATH
    kind: str  # what ought to be there, for errors
    key: str = ""  # a secret that no error may show; the caller puts it into a header or a path
    headers: dict[str, str] = field(default_factory=dict)
    limit: float = 60.0  # seconds of a request, all tries together; one try may take a third of it
    parallel: int = 32  # requests at a time; others wait for their turn, and their time does not run yet

    def __post_init__(self):
        self.address = self.address.rstrip("/")
        url = _url(self.address)
        self.path = url.path.rstrip("/")
        self.secrets = {self.key, quote(self.key), quote_plus(self.key), self.key.replace("/", "\\/")} - {""}
        fixed = {"Content-Type": "application/json", "Connection": "close", "Accept-Encoding": "identity"}
        self.headers = fixed | self.headers
        proxy = "" if _is_here(url.host) or proxy_bypass(url.host) else getproxies().get(url.scheme, "")
        proxy = re.sub("^(.*//)?(.*@)?", "http://", proxy) if proxy else None
        secure = url.scheme == "https"
        # Not a client, which logs addresses (SerpApi's hold the key); no limit of its own, `turns` is ours.
        self.transport = httpx2.AsyncHTTPTransport(secure, limits=httpx2.Limits(), proxy=proxy)
        self.turns = asyncio.Semaphore(self.parallel)

    def ask(
        self, read: Callable[[object], Value], path: str = "", body: dict | None = None, limit: float = 0.0
    ) -> Future[Value]:
        """GET address + path, or POST a body: `read` of the answer's JSON. The future may raise ServerError.

        `read` raises ValueError, "what is wrong", for an answer of another shape. limit: 0 is the server's.
        A future that is cancelled ends its request, or never begins it.
        """
        return asyncio.run_coroutine_threadsafe(self._ask(read, path, body, limit or self.limit), _loop())

    async def _ask(
        self, read: Callable[[object], Value], path: str, body: dict | None, limit: float
    ) -> Value:
        async with self.turns:
            began = time.monotonic()
            for n in itertools.count(1):
                left = began + limit - time.monotonic()
                try:
                    return await self._once(read, path, body, min(left, limit / 3))
                except Passing as e:
                    spent, pause = time.monotonic() - began, max(e.wait, PAUSE * 2 ** (n - 1))
                    if n == TRIES or spent + pause >= limit:
                        fault = e.fault + (f", and asks to wait {e.wait} s" if e.wait else "")
                        tries = f"{n} {'try' if n == 1 else 'tries'} in {spent:.1f} s"
                        advice = f"{tries}. See that {self.kind} runs there, then run again"
                        raise self._error(path, fault, advice) from None
                await asyncio.sleep(pause)

    async def _once(self, read: Callable, path: str, body: dict | None, seconds: float) -> Value:
        """One try. Raises Passing or ServerError."""
        content = None if body is None else json.dumps(body).encode()
        method, headers = "GET" if body is None else "POST", self.headers
        request = httpx2.Request(method, self.address + path, headers=headers, content=content)
        data, advice = bytearray(), f"Is that the address of {self.kind}?"
        try:
            async with asyncio.timeout(seconds):  # httpx's own limits begin again with every byte
                response = await self.transport.handle_async_request(request)
                async with aclosing(response):
                    async for chunk in response.aiter_raw():
                        data += chunk
                        if len(data) > LARGEST:
                            raise self._error(path, f"answered more than {LARGEST // 2**20} MiB", advice)
        except TimeoutError:
            raise Passing(f"gave no whole answer within {seconds:.1f} s") from None
        except httpx2.TransportError as e:
            raise self._error(path, _fault(e), advice) from None
        status, said = (
            response.status_code,
            f": {data.decode('utf-8', 'replace')}" if data else ", without a word",
        )
        fault = f"answered {status} {response.reason_phrase}{said}"
        if status == 429 or status >= 500:
            wait = response.headers.get("Retry-After", "")  # a date is ignored, since clocks differ
            raise Passing(fault, int(wait) if re.fullmatch("[0-9]{1,6}", wait) else 0)
        if status >= 300:
            key = status in (401, 403)
            raise self._error(path, fault, "Check the key in the environment" if key else advice)
        try:
            return read(json.loads(data))
        except (ValueError, RecursionError) as e:
            shape = type(e) is ValueError and str(e)
            raise self._error(path, f"answered {shape or 'no JSON'}{said}", advice) from None

    def _error(self, path: str, fault: str, advice: str) -> ServerError:
        """An error without secrets: no parameters of the path, no key that the server echoes."""
        where, fault = self.address + path.partition("?")[0], one_line(fault, 2 * LARGEST)
        for secret in sorted(self.secrets, key=len, reverse=True):
            fault = fault.replace(secret, "***")
        return ServerError(f"{where}: {fault[:300]}. {advice}")


def _fault(error: httpx2.TransportError) -> str:
    """What went wrong. Raises Passing where a connection is refused or lost."""
    root: BaseException = error  # what the system said, under httpx's errors; of a host's addresses, the last
    while under := getattr(root, "exceptions", (root.__cause__ or root.__context__,))[-1]:
        root = under
    if isinstance(root, ConnectionRefusedError):
        raise Passing("refused the connection")
    if isinstance(root, ConnectionError) or re.search("disconnected|closed connection", str(error)):
        raise Passing("broke off the connection before its answer was whole")
    if not isinstance(root, socket.gaierror):
        return repr(error)
    if root.errno == socket.EAI_AGAIN:
        raise Passing(root.strerror)
    return f"no such host ({root})"


def _url(address: str) -> httpx2.URL:
    """Raises ValueError where an address cannot be used."""
    try:
        url = httpx2.URL(address)
        usable = url.scheme in ("http", "https") and url.host and (url.port or 1) < 2**16
    except httpx2.InvalidURL:
        usable = False
    if not usable or not re.fullmatch('[!"$->A-~]+', address):  # printable, without # ? @
        shown = "an address with a password" if "@" in address else repr(address)
        raise ValueError(f"{shown} cannot be used: write http://HOST:PORT or https://HOST/PATH")
    return url


def _is_here(host: str) -> bool:
    with suppress(ValueError):
        ip = ipaddress.ip_address(host)
        return ip.is_loopback or ip.is_unspecified
    return host == "localhost"


def is_address(name: str | None) -> bool:
    """Whether a name is a server's address, not a body's."""
    return (name or "").startswith(("http://", "https://"))


def environment_key(name: str) -> str:
    """A key from the environment, or "". Raises ValueError for one that no header can hold."""
    key = os.environ.get(name, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise ValueError(f"{name} in the environment is not a key: it holds a blank or a foreign letter")
    return key


# ------------------------------------------------------------------------------------------------------- chat


class Chat:
    """A language model behind an OpenAI-compatible server, with the key of OPENAI_API_KEY if that is set.

    address: up to /v1. model: a name that the server knows; "" asks for its first. Raises ValueError for an
    address that cannot be used, ServerError where the server is asked for its first model and fails.
    """

    def __init__(self, address: str, model: str = "", limit: float = 600.0, parallel: int = 128):
        key = environment_key("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.server = Server(address, "an OpenAI-compatible server", key, headers, limit, parallel)
        self.model = model or self.server.ask(_first_model, "/models", limit=min(limit, 30.0)).result()

    def complete(
        self, messages: list[dict], temperature: float, max_tokens: int, seed: int, stops: Sequence[str] = ()
    ) -> Future[str]:
        """What the model says next, in lines without control characters; the future may raise ServerError.

        messages: [{"role", "content"}]. seed: a request; not every server repeats itself.
        """
        body = {"model": self.model, "messages": messages, "temperature": temperature, "top_p": 1.0}
        body |= {"max_tokens": max_tokens, "seed": seed} | ({"stop": list(stops)} if stops else {})
        return self.server.ask(_said, "/chat/completions", body)


def _first_model(answer: object) -> str:
    match answer:
        case {"data": [{"id": str(name)}, *_]} if name:
            return name
    raise ValueError('no {"data": [{"id": ...}]}')


def _said(answer: object) -> str:
    match answer:
        case {"choices": [{"message": {"content": str(text)}} as choice, *_]}:
            if (why := choice.get("finish_reason")) not in (None, "stop", "length"):
                raise ValueError(f"an answer that was broken off: finish_reason {why!r}")
            return "\n".join(map(one_line, text.splitlines()))
    raise ValueError('no {"choices": [{"message": {"content": ...}}]}')
