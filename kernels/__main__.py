"""`python -m kernels`: what there is; with a GPU, is it right, and how fast.

    python -m kernels                                  # a list; on a GPU the tests, then the benchmarks
    python -m kernels --files attention --models toy   # some of it
    python -m kernels --toy                            # without a GPU: everything at toy shapes, interpreted
    python -m kernels --json bench.json                # the measurements as JSON too

The benchmark times each call beside what torch has to offer, and gives its rate beside the copy bandwidth and
the matmul rate measured on the same GPU. Exit code 1 if a test fails.
"""

import argparse
import inspect
import os
import subprocess
import sys
from pathlib import Path

import torch

from . import measure
from .launch import HAVE_TRITON, INTERPRET

ROOT = Path(__file__).parent.parent


def listing() -> str:
    """One line a kernel file: its name and the first line of its docstring."""
    return "\n".join(f"{name:17s} {inspect.getdoc(m).splitlines()[0]}" for name, m in measure.modules())


def test(files: list[str]) -> int:
    """Run the tests of these kernels in a process of their own, and those that need a GPU. Its exit code."""
    tests = [str(ROOT / "tests" / f"test_kernel_{name}.py") for name in files]
    command = [sys.executable, "-m", "pytest", "-q", *tests, str(ROOT / "tests" / "test_kernels_on_gpu.py")]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def interpret(argv: list[str]) -> int:
    """The same command under the interpreter, which must be asked for before triton is imported."""
    command = [sys.executable, "-m", "kernels", *argv]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


def _arguments(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="kernels", description=__doc__.split("\n")[0])
    p.add_argument("--files", nargs="+", choices=measure.FILES, default=measure.FILES, help="default: all")
    p.add_argument("--models", nargs="+", choices=list(measure.MODELS), help="whose dimensions; default: all")
    p.add_argument("--toy", action="store_true", help="toy shapes, interpreted where there is no GPU")
    p.add_argument("--no-tests", action="store_true", help="benchmarks alone")
    p.add_argument("--json", help="write the measurements to this file")
    return p.parse_args(argv)


def main(argv: list[str]) -> int:
    """The command line; see the top of this file."""
    a = _arguments(argv)
    gpu = torch.cuda.is_available()
    if a.toy and not gpu and not INTERPRET:
        return interpret(argv) if HAVE_TRITON else "the interpreter comes with triton: pip install triton"
    print(listing(), flush=True)
    if not gpu and not a.toy:
        print(
            "\nNo GPU: `python -m kernels --toy` interprets all, `python -m kernels.compile_check` compiles."
        )
        return 0
    failed = gpu and not a.no_tests and test(a.files)
    models = a.models or (["toy"] if a.toy else list(measure.MODELS))
    print()
    measure.bench(a.files, [measure.MODELS[m] for m in models], a.json)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
