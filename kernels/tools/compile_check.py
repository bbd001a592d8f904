"""What the compiler makes of every launch, for GPUs that are not here: registers, spills, shared memory.

    python -m kernels.tools.compile_check                    # four models and the toy, on sm_80, 86, 89, 90
    python -m kernels.tools.compile_check --quick            # Qwen2.5-3B and the toy, on sm_90 and sm_80
    python -m kernels.tools.compile_check --targets sm_100 sm_120 gfx942

Not a test of results, which the interpreter gives. Needs no driver and no toolkit: Triton ships ptxas.
The host code itself runs, on meta tensors, with the launch replaced by a compilation; so what is checked is
each specialisation that a real run would ask for. Exit code 1 if one does not compile, spills, needs more
shared memory than a block may have, waits for each wgmma in turn, or, on sm_90, if attention or the log-prob
does without wgmma.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cli.parser import Flag, parse, with_defaults

from ..launch import INTERPRET, TARGETS, Target, check, pretend
from . import measure
from .choices import CHOICES

GATED = ("sm_80", "sm_86", "sm_89", "sm_90")
QUICK_TARGETS, QUICK_MODELS = ("sm_90", "sm_80"), ("Qwen2.5-3B", "toy")
TENSOR_CORES = {"attention", "linear_logp"}  # files whose sm_90 matmuls must be wgmma
# Warps and blocks that one processor holds at most. Registers are 65536 everywhere.
ROOM = {"sm_80": (64, 32), "sm_86": (48, 16), "sm_89": (48, 24), "sm_90": (64, 32)}
ROOM |= {"sm_100": (64, 32), "sm_120": (48, 24)}
PTX = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "cp.async": r"cp\.async\.c[ag]",
    "load128": r"ld\.global[.\w:]*\.(?:v4\.b32|v2\.b64|v8\.b32)",
}
GCN = {"mfma": r"v_mfma", "scratch": r"scratch_(?:load|store)", "instructions": r"^\s+[sv]_\w+"}
HEAD = f"{'target':6s} {'model':13s} {'kernel':16s} {'configuration':44s}  w  s reg spills shared blocks"


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
    blocks: int = 0  # that fit on one processor at once
    serialized: bool = False  # each wgmma waits for the one before: ptxas says so (C7510 to C7519)
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    error: str = ""

    def problems(self) -> list[str]:
        """What is wrong with it; empty if all is well."""
        if self.error:
            return [self.error]
        limit, count = TARGETS[self.target].shared, self.counts.get
        wanted = self.target == "sm_90" and self.file in TENSOR_CORES and self.model != "toy"
        found = {
            f"spills {self.spills} B": self.spills,
            f"{self.shared} B of shared memory, {limit} are there": self.shared > limit,
            "no wgmma": wanted and count("mma", 0) and not count("wgmma", 0),
            "wgmma one by one": self.serialized,
        }
        return [problem for problem, there in found.items() if there]

    def line(self) -> str:
        head = f"{self.target:6s} {self.model:13s} {self.kernel:16s} {self.config:44s}"
        if self.error:
            return f"{head} !! {self.error}"
        size = f"{self.warps:2d} {self.stages:2d} {self.registers:3d} {self.spills:6d} {self.shared:6d}"
        counts = " ".join(f"{k} {v}" for k, v in self.counts.items() if v)
        return f"{head} {size} {self.blocks:6d}  {counts}  {'; '.join(self.problems())}".rstrip()

    def fill(self, kernel, log: str) -> None:
        """Read the resources out of a compiled kernel and the log of ptxas."""
        meta = kernel.metadata
        self.warps, self.stages, self.shared = meta.num_warps, meta.num_stages, meta.shared
        if TARGETS[self.target].hip:
            asm = kernel.asm["amdgcn"]
            self.registers = _number(r"\.vgpr_count:\s+(\d+)", asm)
            self.spills = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", asm)
            self.counts = _count(GCN, asm)
            return
        self.registers = _number(r"Used (\d+) registers", log)
        check(self.registers > 0, "ptxas said nothing of registers: its log has changed")
        self.spills = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
        self.counts = _count(PTX, kernel.asm["ptx"]) | {"instructions": _instructions(kernel.asm["cubin"])}
        self.serialized = "wgmma.mma_async instructions are serialized" in log
        if self.target in ROOM:
            warps, blocks = ROOM[self.target]
            by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
            by_shared = (TARGETS[self.target].shared + 1024) // (self.shared + 1024)  # 1 KB a block is lost
            self.blocks = min(blocks, warps // self.warps, by_registers, by_shared)


def _count(patterns: dict[str, str], text: str) -> dict[str, int]:
    return {name: len(re.findall(p, text, re.MULTILINE)) for name, p in patterns.items()}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _instructions(cubin: bytes) -> int:
    """From the ELF's section table: 16 bytes each. (A disassembler takes half a second to say the same.)"""
    (table,), (size, n) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3A)
    sections = (struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(n))
    return sum(length for _, _, flags, _, _, length in sections if flags & 4) // 16  # 4: executable


def _driver(t: Target) -> SimpleNamespace:
    """A driver for a GPU that is not here: enough for the JIT to specialise and compile."""
    target = GPUTarget("hip", t.name, 64) if t.hip else GPUTarget("cuda", t.arch, 32)
    return SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: sorted(TARGETS).index(t.name),  # one JIT cache a target
        get_current_stream=lambda device=None: 0,
    )


@contextlib.contextmanager
def _first_error() -> Iterator[list[str]]:
    """A failing compiler prints whole modules to stderr: keep the first error alone."""
    first, kept = [], os.dup(2)
    with tempfile.TemporaryFile() as f:
        os.dup2(f.fileno(), 2)
        try:
            yield first
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            f.seek(0)
            first += re.findall(r"error: (.*)", f.read().decode(errors="replace"))[:1]


class Catch:
    """Inside, kernel[grid](...) compiles for `t` instead of launching, and adds to `reports`."""

    def __init__(self, t: Target):
        check(not INTERPRET, "compile_check cannot run with TRITON_INTERPRET=1")
        self.t, self.reports, self.seen = t, [], {}
        self.where = ("", "", "")  # model, file, case

    def __enter__(self) -> "Catch":
        knobs.compilation.always_compile = True  # from a cache there is no log of ptxas
        self.run, self.active = JITFunction.run, driver._active
        driver.set_active(_driver(self.t))
        nvidia.subprocess = SimpleNamespace(**vars(subprocess) | {"run": self.listen})
        JITFunction.run = lambda fn, *a, grid, warmup=False, **named: self.compile(fn, a, grid, named)
        return self

    def __exit__(self, *_) -> None:
        JITFunction.run, nvidia.subprocess, driver._active = self.run, subprocess, self.active

    def listen(self, command, **named):
        """Triton's backend runs ptxas through this and throws its log away: keep it."""
        done = subprocess.run(command, **named)
        if hasattr(named.get("stderr"), "name"):
            self.log = Path(named["stderr"].name).read_text(encoding="utf-8")
        return done

    def compile(self, fn, args, grid, named) -> None:
        constants = {p.name for p in fn.params if p.is_constexpr}
        blocks = " ".join(f"{k}={v}" for k, v in named.items() if k in constants)
        r = Report(self.t.name, *self.where, fn.__name__.strip("_"), blocks)
        started, kernel, self.log = time.perf_counter(), None, ""
        with _first_error() as first:
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
            r.fill(kernel, self.log)
        r.seconds = time.perf_counter() - started
        self.reports.append(r)


def check_file(models: list[str], name: str, file: str) -> list[Report]:
    """Compile every launch of one kernel file, for these models and the target of this name."""
    ((_, module),) = measure.modules([file])
    with pretend(TARGETS[name]), Catch(TARGETS[name]) as catch:
        for m in models:
            catch.where = (m, file, "inputs")
            for case in module.cases(measure.MODELS[m], "meta"):
                catch.where = (m, file, case.name)
                case.run()
    return catch.reports


FLAGS = {
    "what is compiled": [
        Flag("quick", bool, False, "Qwen2.5-3B and the toy, on sm_90 and sm_80"),
        Flag("targets", tuple(TARGETS), (), f"GPUs ({' '.join(GATED)})", many="+"),
        *CHOICES,
        Flag("processes", int, os.cpu_count(), "compiling at a time"),
        Flag("json", str, "", "write every report to this file", "FILE"),
    ]
}


def main(argv: list[str] | None = None) -> int:
    """The command line: print the table, return 1 if a gated target has a problem."""
    a = with_defaults(FLAGS, parse(__doc__, FLAGS, argv))
    models = a.models or (QUICK_MODELS if a.quick else list(measure.MODELS))
    tasks = itertools.product(a.targets or (QUICK_TARGETS if a.quick else GATED), a.files)
    started, reports = time.perf_counter(), []
    print(f"triton {triton.__version__}, torch {torch.__version__}\n{HEAD}")
    with ProcessPoolExecutor(a.processes, multiprocessing.get_context("spawn")) as pool:
        for r in itertools.chain.from_iterable(pool.map(partial(check_file, models), *zip(*tasks))):
            reports.append(r)
            print(r.line(), flush=True)
    bad, work = [r for r in reports if r.problems()], sum(os.times()[:4])  # with the processes' own
    seconds = f"{time.perf_counter() - started:.0f} s, {work:.0f} s of processor"
    print(f"{len(reports)} compilations, {len(bad)} with problems, {seconds}")
    if a.json:
        rows = [asdict(r) | {"problems": r.problems()} for r in reports]
        Path(a.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return int(any(r.target in GATED for r in bad))


if __name__ == "__main__":
    sys.exit(main())
