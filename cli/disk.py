"""Files that survive an interruption: whole or not at all, appended row by row, one run per directory.

JSON files, rows (JSON lines from which an interrupted run resumes), the state of a training run (one
safetensors file, never a pickle), and the lock on a run's directory.

Not a database: a file is read whole when a run starts, and then only appended to or replaced.
"""

import hashlib
import io
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cli import ranks

try:
    import fcntl
except ImportError:  # Windows has no flock: there nothing stops a second run
    fcntl = None


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary file next to `path`, which replaces it when the block ends: path is whole or untouched,
    even after a power cut (the file is synced before the rename, the directory after it)."""
    path = Path(path)
    part = path.with_name(f"{path.name}.tmp")
    if part.is_symlink():  # in a directory that is not ours: it would lead elsewhere
        part.unlink()
    try:
        yield part
        synchronise(part)
        os.replace(part, path)
        synchronise(path.parent)
    finally:
        part.unlink(missing_ok=True)


def made(path: Path) -> Path:
    """Make a directory, with its parents, whose names then outlast a power cut. The path itself."""
    if not path.is_dir():
        made(path.parent)
        path.mkdir(exist_ok=True)
        synchronise(path.parent)
    return path


def synchronise(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    with suppress(PermissionError):  # Windows does not open directories
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ------------------------------------------------------------------------------------------------------- JSON

# What code raises that reads a value of another shape than it expects.
ODD = (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError)


@contextmanager
def readable(what: object) -> Iterator[None]:
    """Within it, whatever odd content makes a reader raise is a ValueError that names the file."""
    try:
        yield
    except ODD as e:
        raise ValueError(f"{what} holds something else than it should ({type(e).__name__}: {e})") from e


def read_json(file: Path, what: str, **needed: type | tuple[type, ...]) -> dict:
    """Read a JSON object; needed: its keys, with the types of their values. Raises ValueError that names the
    file, and `what` its directory should be."""
    if not file.exists():
        raise ValueError(f"{file} does not exist: {file.parent} is not {what}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:  # both JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{file} is not JSON ({e})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    if lacks := lacking(value, needed):
        raise ValueError(f"{file} has no {lacks}, or not as it should be: is {file.parent} {what}?")
    return value


def lacking(value: dict, needed: dict[str, type | tuple[type, ...]]) -> str:
    """The first key that an object needs and has not, or not with a value of its type; "" if none is."""
    return next((name for name, kind in needed.items() if not isinstance(value.get(name), kind)), "")


def finite(value: object) -> object:
    """The same JSON value, with null for what JSON has no word for: NaN and the infinities."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(file: str | Path, value: dict, errors: str = "strict") -> None:
    """Write a JSON object whole or not at all, `finite`. errors: "replace" writes "?" for half a surrogate
    pair."""
    if ranks.rank():
        return
    with whole(file) as part:
        text = json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n"
        part.write_text(text, encoding="utf-8", errors=errors)


def fingerprint(value: object) -> str:
    """A short hash of the repr of a value; unlike hash(), the same in every process and on any machine."""
    return hashlib.sha256(repr(value).encode("utf-8", "replace")).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ state


def save_state(path: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    """Write tensors, from any device, and facts that JSON can hold. Raises as `save_tensors` does."""
    if ranks.rank():
        return
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_tensors(path, tensors, {"facts": json.dumps(finite(facts))})


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all. Raises OSError, and ValueError for NaN or infinity.

    (Not safetensors' save_file: a killed one leaves a temporary file of its own, under a new name each time,
    and its files can be read by their owner alone.)
    """
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise ValueError(f"{path} is not written: its {name} holds NaN or infinity")
    data = save(tensors, metadata)
    with whole(path) as part:
        part.write_bytes(data)


def load_state(path: Path, what: str = "a run", **needed: type) -> tuple[dict[str, Tensor], dict]:
    """The tensors, on the CPU, and the facts of `save_state`. Raises ValueError for any other file.

    what: whose state it should be; needed: the facts of such a one, with their types.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = (file.metadata() or {}).get("facts")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        facts = json.loads(facts or "null")
    except (SafetensorError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is corrupt ({e})") from None
    if not isinstance(facts, dict) or lacking(facts, needed):
        raise ValueError(f"{path} is not the state of {what}: is --out right?")
    return tensors, facts


def fill(parameter: Tensor, saved: Tensor) -> None:
    """Copy what was saved into a parameter. Raises ValueError where it is of another shape."""
    if parameter.shape != saved.shape:
        raise ValueError(
            f"the state has {tuple(saved.shape)} numbers for {tuple(parameter.shape)} parameters"
        )
    parameter.data.copy_(saved)


def pack_optimizer(opt: torch.optim.Optimizer, prefix: str = "optimizer.") -> dict[str, Tensor]:
    """The state of an optimiser that keeps only tensors (AdamW, Muon) as {prefix + "index.name": tensor}."""
    state = opt.state_dict()["state"]
    return {f"{prefix}{index}.{name}": t for index, entry in state.items() for name, t in entry.items()}


def unpack_optimizer(opt: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix="optimizer.") -> None:
    """Load what `pack_optimizer` packed; names without the prefix are ignored. Moments go to the device of
    their parameters; step counts stay on the CPU unless AdamW is fused or capturable."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in opt.param_groups for p in group["params"]]
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            index, name = key.removeprefix(prefix).split(".", 1)
            if tensor.dim() and tensor.shape != parameters[int(index)].shape:
                raise ValueError(f"{key} is of another optimiser")
            state.setdefault(int(index), {})[name] = tensor.clone()
    opt.load_state_dict(opt.state_dict() | {"state": state})


def contents(folder: Path, *, names: tuple[str, ...] = ("*.json",)) -> str:
    """A fingerprint of the files of these names in a directory, and of its safetensors files: of their ends
    alone (fast)."""
    parts = []
    for path in sorted(path for name in (*names, "*.safetensors") for path in folder.glob(name)):
        with open(path, "rb") as file:
            first, size = file.read(2**16), path.stat().st_size
            file.seek(max(0, size - 2**16))
            parts.append((path.name, size, first, file.read()))
    return fingerprint(parts)


def pinned(settings: dict) -> dict:
    """Flags, and with each that names a body, an adapter or a prompt on disk a fingerprint of what stands
    there: it may have changed when a run goes on. (Results that are written there are no part of it.)"""
    out = dict(settings)
    for k in ("policy", "adapter", "sim", "sim_adapter", "policy_prompt", "sim_prompt"):
        if (value := settings.get(k)) and Path(value).is_dir():
            out[k] = [value, contents(Path(value), names=("*config.json", "tokenizer.json", "*_prompt.json"))]
        elif value and Path(value).is_file():
            out[k] = [value, fingerprint(Path(value).read_bytes())]
    return out


def same_flags(old: dict, new: dict, where: Path) -> None:
    """Raise ValueError where a run would go on with another value of a flag."""
    bare = {
        k: v[0] if isinstance(v, list) and v else v for k, v in new.items()
    }  # as earlier versions kept it
    if changed := [k.replace("_", "-") for k in new if old.get(k) not in (new[k], bare[k])]:
        raise ValueError(f"{where} was begun with another --{changed[0]}: resume with the same")


# ------------------------------------------------------------------------------------------------------- rows


def _no_link(path: str, how: int) -> int:
    """An opener that follows no link: in a directory that is not ours it would lead elsewhere."""
    refuse_link(Path(path))
    return os.open(path, how | getattr(os, "O_NOFOLLOW", 0), 0o666)


def refuse_link(path: Path) -> None:
    """Raise ValueError for a link."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link, and a run writes into its own files alone: put a copy there")


class Rows:
    """JSON lines on disk, each written before the next is made, so that a resumed run need not repeat them.

    settings: if given, the file's first line is {"flags": settings}, and only equal settings can resume it.
    key: where a row is kept in `rows`; a later row with the same key replaces the earlier one.
    path: None keeps rows in memory only. Of several processes the first reads and writes. Raises ValueError
    if the file is of a run with other settings, exists without `resume`, or (if `must`) is missing with it.
    """

    def __init__(
        self,
        path: str | Path | None,
        settings: dict | None = None,
        resume: bool = False,
        key: Callable[[dict], object] | None = None,
        must: bool = False,
    ):
        self.path, self.settings = Path(path) if path else None, settings
        self.writes = self.path is not None and not ranks.rank()
        self.key = key or (lambda row: len(self.rows))
        self.rows: dict[object, dict] = {}
        self.fields: tuple[str, ...] = ()  # of a row that are held in memory; (): all
        self.file: io.FileIO | None = None  # open while this process owns it
        if self.writes and self.path.exists():
            if not resume:
                raise ValueError(f"{self.path} holds an unfinished run: add --resume to go on, or delete it")
            self._own()
            self._read()
        elif resume and must and not ranks.rank():
            raise ValueError(f"{self.path} holds nothing to resume: is --out right?")
        self.rows = ranks.told(lambda: self.rows)

    def _own(self) -> None:
        """Open the file for appending. Raises ValueError if another process has it open."""
        self.file = io.FileIO(made(self.path.parent) / self.path.name, "a+", opener=_no_link)
        try:
            if fcntl is not None:  # the process's own, lost when it closes any handle of this file
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another run is writing into {self.path}: wait, or choose another") from None

    def _read(self) -> None:
        """Read the rows of an interrupted run; an incomplete last line is dropped."""
        self.file.seek(0)
        data = self.file.readall()
        end = data.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in data[:end].splitlines()]
            old = self.settings or {}
            if self.settings is not None and lines:
                old = dict(lines.pop(0)["flags"])
            for row in lines:
                self.rows[self.key(row)] = row
        except (ValueError, *ODD):
            raise ValueError(f"{self.path} is not an unfinished run: delete it and start again") from None
        same_flags(old, self.settings or {}, self.path)
        self.file.truncate(end)

    def add(self, row: dict) -> None:
        """Append a row, `finite`. Once this returns, it survives the end of this process."""
        row = finite(row)
        if self.writes:
            if self.file is None:
                self._own()
            started = self.settings is None or os.fstat(self.file.fileno()).st_size
            first = "" if started else json.dumps({"flags": self.settings}) + "\n"
            data = (first + json.dumps(row) + "\n").encode()
            if self.file.write(data) < len(data):
                raise OSError(f"{self.path} cannot be written: no space left on the disk")
        self.rows[self.key(row)] = self._held(row)

    def hold(self, *fields: str) -> None:
        """From here on hold only these fields of a row in memory. (`keep` and `share` need them all.)"""
        self.fields = fields
        self.rows = {key: self._held(row) for key, row in self.rows.items()}

    def _held(self, row: dict) -> dict:
        return {name: row[name] for name in self.fields if name in row} if self.fields else row

    def share(self, keys: Iterable) -> None:
        """Add the rows that the other processes have made; keys: of those made here."""
        for row in chain(*ranks.everyone([self.rows[k] for k in keys])):
            if self.key(row) not in self.rows:
                self.add(row)

    def keep(self, n: int) -> None:
        """Drop all but the first n rows, on disk too: a resumed run takes the later steps again."""
        self.rows = dict(list(self.rows.items())[:n])
        if self.writes and self.path.exists():
            lines = "".join(json.dumps(row) + "\n" for row in self.rows.values())
            with whole(self.path) as part:
                part.write_text(lines, encoding="utf-8")
            self.file = None  # that of before


# -------------------------------------------------------------------------------------------------- directory


def free_name(folder: str) -> str:
    """Make a new directory for a run: FOLDER/date_time, numbered if two runs start in the same second."""
    name = f"{folder}/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    for number in itertools.count(1):
        out = Path(name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            out.mkdir(parents=True)
            return str(out)


def lock(out: Path) -> int | None:
    """Make the directory and lock it: a handle to be closed. ValueError if another process holds the lock."""
    while True:
        made(out)
        if fcntl is None:
            return None
        handle = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(out)):
                return handle
        except FileNotFoundError:
            pass  # removed meanwhile by the run that held it: make it again
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"another run is writing into {out}: wait, or choose another --out") from None
        os.close(handle)


@contextmanager
def claimed(out: Path, resume: bool) -> Iterator[None]:
    """Lock the directory `out` for one run. It is made if missing, and removed if the block leaves it empty.
    Raises ValueError if another process holds the lock, or if it is not empty and not to be resumed."""
    if ranks.rank():  # the first process holds it for all
        yield
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: choose another")
    handle = lock(out)
    try:
        if not resume and any(path.suffix != ".tmp" for path in out.iterdir()):
            raise ValueError(f"--out {out} already holds something: choose another, or --resume its run")
        for path in out.rglob("*"):
            refuse_link(path)
        yield
    finally:
        with suppress(OSError):  # not empty, as a rule
            out.rmdir()
        if handle is not None:
            os.close(handle)
