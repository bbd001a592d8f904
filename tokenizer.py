"""Text to ids and back, with the ids that transformers gives.

transformers reads the checkpoint, whose files have many quirks, and renders its chat template. Texts go
straight to the Rust tokenizer underneath (Hugging Face's `tokenizers`): the Python around it takes longer
than a short text.

No training of a tokenizer, no padding, truncation or tensors, no cleaning of text; no id means padding.

    tok = Tokenizer.load("path/to/checkpoint")
    ids = tok.chat([{"role": "user", "content": "Who wrote Emma?"}])
    tok.decode(ids)
"""

import json
import re
from pathlib import Path

from cli.disk import read_json

# Special tokens that end a turn, or a text, in whatever checkpoint has them.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>")

# GPT-2's alphabet writes each byte as one printable character; the 68 unprintable ones start at 256.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_MOVED = [b for b in range(256) if b not in _PRINTABLE]
BYTE = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_MOVED)}  # character -> byte


class Tokenizer:
    """One checkpoint's tokenizer.

    vocab_size: highest id + 1 (the embedding may have more rows). eos: every id that ends a turn. bos: the id
    that the checkpoint puts before every text (Llama 3), or None (Qwen, even if it names one). special: the
    id of each special token, by its text. has_template: whether it has a chat template.
    """

    def __init__(self, hf, eos: frozenset[int]):
        """hf: the checkpoint's tokenizer in transformers. Most callers want `Tokenizer.load`."""
        self._hf, self._backend = hf, hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        decoder = json.loads(self._backend.to_str())["decoder"] or {}
        added = hf.added_tokens_decoder  # id -> AddedToken
        table = {i: _bytes(t, decoder.get("type") == "ByteLevel") for t, i in hf.get_vocab().items()}
        table |= {i: token.content.encode() for i, token in added.items()}
        self._bytes = [table.get(i, b"") for i in range(max(table) + 1)]
        self.special = {token.content: i for i, token in added.items() if token.special}
        longest = sorted(self.special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")  # (?!) matches nowhere

        self.vocab_size = len(self._bytes)
        self.eos = eos | {i for text, i in self.special.items() if text in ENDS}
        self.bos = hf.bos_token_id if self._backend.encode("a").ids[:1] == [hf.bos_token_id] else None
        self.has_template = bool(hf.chat_template)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads a Hugging Face directory, never the network. ValueError where a file is missing or broken."""
        path, what = Path(directory), "a directory in Hugging Face format"
        if not (path / "tokenizer.json").is_file():
            raise ValueError(f"no tokenizer.json in {path}: give {what}")
        names = ("generation_config.json", "config.json", "tokenizer_config.json")
        configs = [read_json(path / name, what) for name in names if (path / name).exists()]
        # seconds to import: only when there is something to load
        from transformers import AutoTokenizer, logging

        logging.set_verbosity_error()  # its warnings repeat a file's own text, colours included
        try:
            hf = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a broken file raises KeyError, TypeError, bare Exception, ... in there
            raise ValueError(f"broken tokenizer in {path}, copy its files again: {_reason(error)}") from error
        if not hf.is_fast:
            raise ValueError(f"{path}: a {type(hf).__name__} cannot be used, it has no Rust tokenizer")
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
        self._backend.encode_special_tokens = not special
        return self._backend.encode(text, add_special_tokens=False).ids

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
        names = list(self.special)
        mark = "\ufdd0"  # a noncharacter, repeated until no content holds it
        while any(mark in m["content"] for m in messages):
            mark += mark[0]

        def hide(text: str) -> str:
            return self._pattern.sub(lambda match: f"{mark}{names.index(match[0])}{mark}", text)

        def show(text: str) -> str:
            return re.sub(f"{mark}([0-9]+){mark}", lambda match: names[int(match[1])], text)

        hidden = [m | {"content": hide(m["content"])} for m in messages]
        # Llama 3 would put in today, and no run could be repeated. Qwen3 would think at length before it does
        # what our prompts ask for, thoughts included: switched off, it is given an empty thought.
        more = {"date_string": "26 Jul 2024", "enable_thinking": False}
        try:
            text = self._hf.apply_chat_template(hidden, tokenize=False, add_generation_prompt=True, **more)
        except Exception as error:  # a template is the checkpoint's own program, and may refuse or fail
            fails = f"fails on {' '.join(m['role'] for m in messages)}: {_reason(error)}"
            advice = "Mend it there, or use words without a system message"
            raise ValueError(f"the chat template of {self._hf.name_or_path} {fails}. {advice}") from error
        if mark not in text:  # whole: SentencePiece may treat the first stretch of a text in its own way
            return self.encode(text, special=True)
        # Split into the template's special tokens (odd) and what lies between them (even).
        pieces = re.split(f"({self._pattern.pattern})", text)
        ids = [[self.special[p]] if n % 2 else self.encode(show(p)) for n, p in enumerate(pieces)]
        return [i for piece in ids for i in piece]


def _reason(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _bytes(token: str, byte_level: bool) -> bytes:
    """Bytes of a vocabulary entry, in GPT-2's alphabet or SentencePiece's (U+2581 for a space, <0x0A>)."""
    if byte_level:
        return bytes(map(BYTE.get, token)) if set(token) <= BYTE.keys() else token.encode()
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
