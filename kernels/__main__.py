"""`python -m kernels`: what there is; with a GPU, is it right, and how fast.

    python -m kernels                                  # a list; on a GPU the tests, then the benchmarks
    python -m kernels --files attention --models toy   # some of it
    python -m kernels --toy                            # without a GPU: everything at toy shapes, interpreted
    python -m kernels --json bench.json                # the measurements as JSON too

Each call is timed against what torch has to offer, and its rate is given as a share of the copy bandwidth and
the matmul rate measured on the same GPU. Exit code 1 if a test fails.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import torch

from cli.parser import Flag, parse, with_defaults

from .launch import HAVE_TRITON, INTERPRET
from .tools import measure
from .tools.choices import CHOICES

ROOT = Path(__file__).parent.parent


def python(*arguments: str, **env: str) -> int:
    """Run python from the repository's root, in a process of its own. Its exit code."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, check=False).returncode


FLAGS = {
    "what is measured": [
        *CHOICES,
        Flag("toy", bool, False, "toy shapes, interpreted where there is no GPU"),
        Flag("no-tests", bool, False, "benchmarks alone"),
        Flag("json", str, "", "write the measurements to this file", "FILE"),
    ]
}


def main(argv: list[str]) -> int:
    """The command line; see the top of this file."""
    a = with_defaults(FLAGS, parse(__doc__, FLAGS, argv))
    gpu = torch.cuda.is_available()
    if a.toy and not gpu and not INTERPRET:  # which must be asked for before triton is imported
        if not HAVE_TRITON:
            return "the interpreter comes with triton: pip install triton"
        return python("kernels", *argv, TRITON_INTERPRET="1")
    for name, module in measure.modules():
        print(f"{name:17s} {inspect.getdoc(module).splitlines()[0]}", flush=True)
    if not gpu and not a.toy:
        print("\nNo GPU. `python -m kernels --toy` interprets all kernels,")
        print("`python -m kernels.tools.compile_check` compiles them.")
        return 0
    tests = [f"tests/test_kernel_{name}.py" for name in a.files]
    failed = gpu and not a.no_tests and python("pytest", "-q", *tests, "tests/test_kernels_on_gpu.py")
    models = a.models or (["toy"] if a.toy else list(measure.MODELS))
    print()
    measure.bench(a.files, [measure.MODELS[m] for m in models], a.json)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
