"""Text to ids and back: on every text the same ids as transformers, from tiktoken where that is possible.

transformers reads the checkpoint, whose files have many quirks; we take apart what it has read and give
byte-level BPE (Qwen, Llama 3, GPT-2, SmolLM2) to tiktoken, if tiktoken's simpler rule provably finds the same
ids (`_ranks`). Everything else, be it a checkpoint or a single text, transformers encodes itself.

No training of a tokenizer, no padding, truncation or tensors, no cleaning of text; no id means padding.

    tok = Tokenizer.load("path/to/checkpoint")
    ids = tok.chat([{"role": "user", "content": "Who wrote Emma?"}])
    tok.decode(ids)
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tiktoken
from tokenizers import models, normalizers

# How a text is cut into words before any merge. Rust's regex (tiktoken) and Oniguruma (transformers) agree on
# these patterns, and they leave no character out: tiktoken silently drops what its pattern skips.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
# GPT-2's words, each digit on its own: it takes no space along, and a text before it is cut as at its end.
GPT2_DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")

# Special tokens that end a turn, or a text, in whatever checkpoint has them.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>")

# GPT-2's alphabet writes each byte as one printable character; the 68 unprintable ones start at 256.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_MOVED = [b for b in range(256) if b not in _PRINTABLE]
BYTE = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_MOVED)}  # character -> byte


class Added(NamedTuple):
    """Tokens that are found in the text before it is cut into words; the leftmost longest wins."""

    pattern: re.Pattern
    ids: dict[str, int]
    special: frozenset[str]

    def split(self, text: str, special: bool) -> Iterator[str | int]:
        """Text, maybe empty, and ids between it; special tokens are found only if `special`."""
        start = 0
        for match in self.pattern.finditer(text):
            if special or match[0] not in self.special:
                yield text[start : match.start()]
                yield self.ids[match[0]]
                start = match.end()
        yield text[start:]


class Tokenizer:
    """One checkpoint's tokenizer.

    vocab_size: highest id + 1 (the embedding may have more rows). eos: every id that ends a turn. bos: the id
    that the checkpoint puts before every text (Llama 3), or None (Qwen, even if it names one). has_template:
    whether it has a chat template. fast: whether tiktoken does the work.
    """

    def __init__(self, hf, eos: frozenset[int]):
        """hf: the checkpoint's tokenizer in transformers. Most callers want `Tokenizer.load`."""
        backend = getattr(hf, "backend_tokenizer", None)
        spec = json.loads(backend.to_str()) if backend else {}
        added = hf.added_tokens_decoder  # id -> AddedToken
        byte_level = (spec.get("decoder") or {}).get("type") == "ByteLevel"
        table = {i: _token_bytes(token, byte_level) for token, i in hf.get_vocab().items()}
        table |= {i: token.content.encode() for i, token in added.items()}
        self._hf = hf
        self._bytes = [table.get(i, b"") for i in range(max(table) + 1)]
        self._special = _added({i: t for i, t in added.items() if t.special})

        self.vocab_size = len(self._bytes)
        self.eos = eos | {i for name, i in self._special.ids.items() if name in ENDS}
        self.bos = hf.bos_token_id if hf.encode("a")[:1] == [hf.bos_token_id] else None
        self.has_template = bool(hf.chat_template)

        self._normalise = normalizers.NFC().normalize_str if spec.get("normalizer") else str
        self._raw = _added({i: t for i, t in added.items() if not t.normalized})
        self._normal = _added({i: t for i, t in added.items() if t.normalized}, self._normalise)
        self._bpe = _tiktoken(spec) if spec and not any(map(_greedy, added.values())) else None
        self._absent = _absent(spec["model"]["vocab"]) if self._bpe else b""
        self.fast = self._bpe is not None

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads a Hugging Face directory, never the network. ValueError where a file is missing or broken."""
        path = Path(directory)
        if not (path / "tokenizer.json").is_file():
            raise ValueError(f"no tokenizer.json in {path}: give a directory in Hugging Face format")
        names = ("generation_config.json", "config.json", "tokenizer_config.json")
        configs = [_json(path / name) for name in names]
        from transformers import AutoTokenizer  # seconds to import: only when there is something to load

        try:
            hf = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a broken file raises KeyError, TypeError, bare Exception, ... in there
            raise ValueError(f"broken tokenizer in {path}, copy its files again: {_reason(error)}") from error
        ends = [hf.eos_token_id, *(config.get("eos_token_id") for config in configs)]
        ids = [i for end in ends for i in (end if isinstance(end, list) else [end])]
        return cls(hf, frozenset(ids) - {None})

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text, as transformers gives them with add_special_tokens=False.

        special: whether the text of a special token becomes that token; if not, as for all that a model, a
        user or a document says, it stays text. Added tokens that are not special are found either way.
        """
        if not text.isascii():
            text = text.encode("utf-8", "replace").decode()  # half a surrogate pair (broken JSON) becomes "?"
        if not self.fast or self._drops(text):
            flags = {"add_special_tokens": False, "split_special_tokens": not special}
            return self._hf.encode(text, **flags, verbose=False)
        ids = []
        for raw in self._raw.split(text, special):
            if isinstance(raw, int):
                ids.append(raw)
                continue
            for piece in self._normal.split(self._normalise(raw), special):
                ids += [piece] if isinstance(piece, int) else self._bpe.encode_ordinary(piece)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids with special tokens; broken UTF-8 becomes U+FFFD, unknown ids nothing."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, i: int) -> bytes:
        """Bytes of one id, maybe part of a character; none for an unknown id."""
        return self._bytes[i] if 0 <= i < self.vocab_size else b""

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation and of the assistant's opening, in the checkpoint's chat template.

        Special tokens come from the template alone: their text within a content stays text. Without a
        template: bos, where the checkpoint puts it, and the contents joined.
        """
        if not self.has_template:
            ids = self.encode("".join(m["content"] for m in messages))
            return ids if self.bos is None else [self.bos, *ids]
        names = sorted(self._special.ids)
        mark = "\ufdd0"  # a noncharacter, repeated until no content holds it
        while any(mark in m["content"] for m in messages):
            mark += mark[0]

        def hide(match: re.Match) -> str:
            return f"{mark}{names.index(match[0])}{mark}"

        def show(text: str) -> str:
            return re.sub(f"{mark}([0-9]+){mark}", lambda match: names[int(match[1])], text)

        hidden = [m | {"content": self._special.pattern.sub(hide, m["content"])} for m in messages]
        day = {"date_string": "26 Jul 2024"}  # Llama 3 would put in today, and no run could be repeated
        try:
            text = self._hf.apply_chat_template(hidden, tokenize=False, add_generation_prompt=True, **day)
        except Exception as error:  # a template is the checkpoint's own program, and may refuse or fail
            fails = f"fails on {' '.join(m['role'] for m in messages)}: {_reason(error)}"
            advice = "Mend it there, or use words without a system message"
            raise ValueError(f"the chat template of {self._hf.name_or_path} {fails}. {advice}") from error
        if mark not in text:  # whole: SentencePiece may treat the first stretch of a text in its own way
            return self.encode(text, special=True)
        pieces = self._special.split(text, special=True)
        return [i for p in pieces for i in ([p] if isinstance(p, int) else self.encode(show(p)))]

    def _drops(self, text: str) -> bool:
        """Whether the text holds a byte that the vocabulary lacks (SmolLM2: 21 of them).

        transformers drops these after it has cut words and before it merges; tiktoken cannot.
        """
        data = text.encode()
        return len(data.translate(None, self._absent)) < len(data)


def _reason(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _json(path: Path) -> dict:
    """A configuration file; {} where it is absent. ValueError where it is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON, copy it again: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object, copy it again")
    return value


def _token_bytes(token: str, byte_level: bool) -> bytes:
    """Bytes of a vocabulary entry, in GPT-2's alphabet or SentencePiece's (U+2581 for a space, <0x0A>)."""
    if byte_level:
        return bytes(map(BYTE.get, token)) if set(token) <= BYTE.keys() else token.encode()
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _added(tokens: dict, normalise=str) -> Added:
    """tokens: id -> transformers' AddedToken; normalise: done to their text, as to the text around them."""
    ids = {normalise(token.content): i for i, token in tokens.items()}
    longest = sorted(ids, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")  # (?!) matches nowhere
    special = frozenset(normalise(token.content) for token in tokens.values() if token.special)
    return Added(pattern, ids, special)


def _greedy(token) -> bool:
    """Whether an added token takes the spaces around it or must stand alone."""
    return token.lstrip or token.rstrip or token.single_word


def _tiktoken(spec: dict) -> tiktoken.Encoding | None:
    """spec: transformers' tokenizer, serialised. None where tiktoken's ids could differ from it."""
    model, normalizer = spec["model"], spec["normalizer"]
    pattern = _pattern(spec["pre_tokenizer"] or {})
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(option) for option in options) or pattern is None:
        return None
    if normalizer and (normalizer["type"] != "NFC" or _absent(model["vocab"])):
        return None
    merges = [tuple(pair) for pair in model["merges"]]
    ranks = _ranks(model["vocab"], merges, whole=model.get("ignore_merges", False))
    return ranks and tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def _absent(vocab: dict[str, int]) -> bytes:
    """The byte values that a vocabulary in GPT-2's alphabet lacks."""
    return bytes(b for character, b in BYTE.items() if character not in vocab)


def _pattern(pre: dict) -> str | None:
    """The one pattern that cuts words as this pre-tokenizer does; None if there is none that we know."""
    *before, last = pre.get("pretokenizers") or [pre]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    match before, last["use_regex"]:
        case [], True:
            return GPT2
        case [{"type": "Digits", "individual_digits": True}], True:
            return GPT2_DIGITS
        case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}], False:
            return regex if regex in (GPT2, QWEN2, LLAMA3) else None
    return None


def _ranks(vocab: dict[str, int], merges: list[tuple[str, str]], whole: bool) -> dict[bytes, int] | None:
    """tiktoken's table (bytes -> id) if it finds the same ids as the list of merges, else None.

    whole: a word that is a token is that token, whatever the merges say (`ignore_merges`, tiktoken's way).

    tiktoken joins any neighbours whose bytes are a token, lowest id first; a list of merges joins its own
    pairs, earliest first. They agree on all texts if (1) the list is in the order of the ids it makes and (2)
    the list, applied to any token's own bytes, gives that token or leaves at least three pieces. Proof: take
    the first step at which they part, and any p, q that one of them could join there, into w. No join so far
    crossed the ends of w, so the bytes of w alone come to p, q too: they are not left in three pieces, so w
    is reached, and by this pair. So what one may join the other may, only p, q makes w, and by (1) both take
    the same pair next. (Tokens that are not reached are left out unless `whole`.)
    """
    made = [vocab[a + b] for a, b in merges]
    if made != sorted(made):
        return None
    alone = models.BPE(vocab=vocab, merges=merges)
    ranks = {}
    for token, i in vocab.items():
        if not set(token) <= BYTE.keys():
            continue  # no text looks like this: an added token that is also listed here
        pieces = [piece.value for piece in alone.tokenize(token)]
        if whole and len(pieces) == 2:
            return None
        if whole or pieces == [token]:
            ranks[_token_bytes(token, True)] = i
    return ranks
