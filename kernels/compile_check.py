"""What the compiler makes of every launch, for GPUs that are not here: registers, spills, shared memory.

    python -m kernels.compile_check                    # four models and the toy, on sm_80, 86, 89, 90
    python -m kernels.compile_check --quick            # Qwen2.5-3B and the toy, on sm_90 and sm_80
    python -m kernels.compile_check --targets sm_100 sm_120 gfx942

Not a test of results, which the interpreter gives. Needs no driver and no toolkit: Triton brings ptxas along.
The host code itself runs, on meta tensors, with the launch replaced by a compilation; so what is checked is
each specialisation that a real run would ask for. Exit code 1 if one does not compile, spills, wants more
shared memory than a block may have, waits for each wgmma in turn, or, on sm_90, if attention or the log-prob
does without wgmma.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import measure
from .launch import INTERPRET, TARGETS, Target, check, pretend

GATED, LISTED = ("sm_80", "sm_86", "sm_89", "sm_90"), ("sm_100", "sm_120", "gfx942")
QUICK_TARGETS, QUICK_MODELS = ("sm_90", "sm_80"), ("Qwen2.5-3B", "toy")
TENSOR_CORES = {"attention", "linear_logp"}  # files whose sm_90 matmuls must be wgmma
# Per processor: bytes of shared memory, warps, blocks. Registers are 65536 everywhere.
ROOM = {
    "sm_80": (167936, 64, 32),
    "sm_86": (102400, 48, 16),
    "sm_89": (102400, 48, 24),
    "sm_90": (233472, 64, 32),
    "sm_100": (233472, 64, 32),
    "sm_120": (102400, 48, 24),
}
PTX = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "cp.async": r"cp\.async\.c[ag]",
    "load128": r"ld\.global[.\w:]*\.(?:v4\.b32|v2\.b64|v8\.b32)",
}
GCN = {"mfma": r"v_mfma", "scratch": r"scratch_(?:load|store)", "instructions": r"^\s+[sv]_\w+"}


@dataclass
class Report:
    """One compiled launch. Bytes for shared and spills; `counts` of instructions by kind."""

    target: str
    model: str
    file: str
    case: str
    kernel: str
    config: str
    warps: int = 0
    stages: int = 0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    blocks: int = 0
    serialized: bool = False  # each wgmma waits for the one before: ptxas says so (C7510 to C7519)
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    error: str = ""

    def problems(self) -> list[str]:
        """What is wrong with it; empty if all is well."""
        if self.error:
            return [self.error]
        limit = TARGETS[self.target].shared
        return [
            *([f"spills {self.spills} B"] if self.spills else []),
            *([f"{self.shared} B of shared memory, {limit} are there"] if self.shared > limit else []),
            *(["no wgmma"] if self._lacks_wgmma() else []),
            *(["wgmma one by one"] if self.serialized else []),
        ]

    def _lacks_wgmma(self) -> bool:
        dots = self.counts.get("wgmma", 0) + self.counts.get("mma", 0)
        wanted = self.target == "sm_90" and self.file in TENSOR_CORES and self.model != "toy"
        return wanted and dots > 0 and not self.counts["wgmma"]

    def line(self) -> str:
        head = f"{self.target:6s} {self.model:13s} {self.kernel:16s} {self.config:44s}"
        if self.error:
            return f"{head} !! {self.error}"
        counts = " ".join(f"{k} {v}" for k, v in self.counts.items() if v)
        size = f"{self.registers:3d} {self.spills:6d} {self.shared:6d} {self.blocks:6d}"
        return (
            f"{head} {self.warps:2d} {self.stages:2d} {size}  {counts}  {'; '.join(self.problems())}".rstrip()
        )


HEAD = f"{'target':6s} {'model':13s} {'kernel':16s} {'configuration':44s}  w  s reg spills shared blocks"


class _Listening:
    """Stands in for `subprocess` inside Triton's backend: keeps the log of ptxas, which is thrown away."""

    def __init__(self, real):
        self.real, self.log = real, ""

    def __getattr__(self, name):
        return getattr(self.real, name)

    def run(self, command, **named):
        done = self.real.run(command, **named)
        if hasattr(named.get("stderr"), "name"):
            with open(named["stderr"].name, encoding="utf-8") as f:
                self.log = f.read()
        return done


class _Driver:
    """A driver for a GPU that is not here: enough for the JIT to specialise and compile."""

    def __init__(self, t: Target):
        self.t = t

    def get_current_target(self):
        return GPUTarget("hip", self.t.name, 64) if self.t.hip else GPUTarget("cuda", self.t.arch, 32)

    def get_current_device(self):
        return sorted(TARGETS).index(self.t.name)  # one JIT cache a target

    def get_current_stream(self, device=None):
        return 0


@contextlib.contextmanager
def _no_stderr() -> Iterator[list[str]]:
    """A failing compiler prints whole modules: keep the first error alone."""
    first, kept = [], os.dup(2)
    with tempfile.TemporaryFile() as f:
        os.dup2(f.fileno(), 2)
        try:
            yield first
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            f.seek(0)
            text = f.read().decode(errors="replace")
            first += re.findall(r"error: (.*)", text)[:1]


def _count(patterns: dict[str, str], text: str) -> dict[str, int]:
    return {name: len(re.findall(p, text, re.MULTILINE)) for name, p in patterns.items()}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _instructions(cubin: bytes) -> int:
    """From the ELF's section table: 16 bytes each. (A disassembler takes half a second to say the same.)"""
    (table,), (size, n) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3A)
    sections = (struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(n))
    return sum(length for _, _, flags, _, _, length in sections if flags & 4) // 16  # 4: executable


def _blocks(r: Report) -> int:
    """Blocks that fit on one processor at once."""
    if r.target not in ROOM:
        return 0
    shared, warps, blocks = ROOM[r.target]
    by_registers = 65536 // (-(-r.registers // 8) * 8 * 32 * r.warps)
    return min(blocks, warps // r.warps, by_registers, shared // (r.shared + 1024))


def _fill(r: Report, kernel, log: str) -> None:
    """Read the resources out of a compiled kernel."""
    meta = kernel.metadata
    r.warps, r.stages, r.shared = meta.num_warps, meta.num_stages, meta.shared
    if TARGETS[r.target].hip:
        asm = kernel.asm["amdgcn"]
        r.registers = _number(r"\.vgpr_count:\s+(\d+)", asm)
        r.spills = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", asm)
        r.counts = _count(GCN, asm)
        return
    r.registers = _number(r"Used (\d+) registers", log)
    check(r.registers > 0, "ptxas said nothing of registers: its log has changed")
    r.spills = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
    r.counts = _count(PTX, kernel.asm["ptx"]) | {"instructions": _instructions(kernel.asm["cubin"])}
    r.serialized = "wgmma.mma_async instructions are serialized" in log
    r.blocks = _blocks(r)


class Catch:
    """Inside, kernel[grid](...) compiles for `t` instead of launching, and adds to `reports`."""

    def __init__(self, t: Target):
        check(not INTERPRET, "compile_check cannot run with TRITON_INTERPRET=1")
        self.t, self.reports, self.seen = t, [], {}
        self.where = ("", "", "")  # model, file, case

    def __enter__(self) -> "Catch":
        knobs.compilation.always_compile = True  # from a cache there is no log of ptxas
        self.run, self.active, self.real = JITFunction.run, driver._active, nvidia.subprocess
        self.ptxas = nvidia.subprocess = _Listening(nvidia.subprocess)
        driver.set_active(_Driver(self.t))
        catch = self
        JITFunction.run = lambda fn, *a, grid, warmup=False, **named: catch.compile(fn, a, grid, named)
        return self

    def __exit__(self, *_) -> None:
        JITFunction.run, nvidia.subprocess = self.run, self.real
        driver._active = self.active

    def compile(self, fn, args, grid, named) -> None:
        constants = {p.name for p in fn.params if p.is_constexpr}
        blocks = " ".join(f"{k}={v}" for k, v in named.items() if k in constants)
        r = Report(self.t.name, *self.where, fn.__name__.strip("_"), blocks)
        started, kernel, self.ptxas.log = time.perf_counter(), None, ""
        with _no_stderr() as first:
            try:
                kernel = self.run(fn, *args, grid=grid, warmup=True, **named)
            except Exception as e:  # whatever a compiler may raise is the finding
                r.error = f"{type(e).__name__}: {e}".splitlines()[0]
        if kernel is None:
            r.error = (first or [r.error])[0][:200]
        elif id(kernel) in self.seen:
            return  # another launch of the same specialisation
        else:
            self.seen[id(kernel)] = kernel
            _fill(r, kernel, self.ptxas.log)
        r.seconds = time.perf_counter() - started
        self.reports.append(r)


def check_file(task: tuple[str, str, tuple[str, ...]]) -> list[Report]:
    """Compile every launch of one kernel file, for a target and these models: (target, file, models)."""
    name, file, models = task
    module = importlib.import_module(f"kernels.{file}")
    with pretend(TARGETS[name]), Catch(TARGETS[name]) as catch:
        for m in models:
            catch.where = (m, file, "inputs")
            for case in module.cases(measure.MODELS[m], "meta"):
                catch.where = (m, file, case.name)
                case.run()
    return catch.reports


def check_all(targets: list[str], models: list[str], files: list[str], processes: int) -> Iterator[Report]:
    """Every combination, in as many processes, in order."""
    tasks = [(t, f, tuple(models)) for t in targets for f in files]
    if processes == 1:
        yield from chain.from_iterable(map(check_file, tasks))
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from chain.from_iterable(pool.map(check_file, tasks))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="kernels.compile_check", description=__doc__.split("\n")[0])
    p.add_argument("--quick", action="store_true", help="Qwen2.5-3B and the toy, on sm_90 and sm_80")
    p.add_argument("--targets", nargs="+", choices=list(TARGETS), help=f"default: {' '.join(GATED)}")
    p.add_argument("--models", nargs="+", choices=list(measure.MODELS), help="default: all")
    p.add_argument("--files", nargs="+", choices=measure.FILES, default=measure.FILES, help="default: all")
    p.add_argument("--processes", type=int, default=os.cpu_count(), help="default: %(default)s")
    p.add_argument("--json", help="write every report to this file")
    a = p.parse_args(argv)
    a.targets = a.targets or (QUICK_TARGETS if a.quick else GATED)
    a.models = a.models or (QUICK_MODELS if a.quick else tuple(measure.MODELS))
    return a


def main(argv: list[str] | None = None) -> int:
    """The command line: print the table, return 1 if a gated target has a problem."""
    a = _arguments(argv)
    started, reports = time.perf_counter(), []
    print(f"triton {triton.__version__}, torch {torch.__version__}\n{HEAD}")
    for r in check_all(a.targets, a.models, a.files, a.processes):
        reports.append(r)
        print(r.line(), flush=True)
    bad = [r for r in reports if r.problems()]
    seconds = time.perf_counter() - started
    work = sum(sum(resource.getrusage(of)[:2]) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(
        f"{len(reports)} compilations, {len(bad)} with problems, {seconds:.0f} s, {work:.0f} s of processor"
    )
    if a.json:
        with open(a.json, "w", encoding="utf-8") as f:
            json.dump([asdict(r) | {"problems": r.problems()} for r in reports], f, indent=1)
    return int(any(r.target in GATED for r in bad))


if __name__ == "__main__":
    sys.exit(main())
