"""The kernels: pure tensor functions, each with its torch reference. Nothing in them is specific to RL.

One file per kernel, in this order: derivation, torch reference, Triton kernel, wrapper, benchmark cases. The
signature is the same on every device. Tensors on a GPU (CUDA or ROCm) go to Triton, all others to the
reference, which is therefore written to be fast as well as plain; KERNELS=torch or triton overrides (triton
on a CPU needs TRITON_INTERPRET=1). launch.py says how to write a kernel file.

    python -m kernels                      # list, test and measure them
    python -m kernels --files attention    # one of them

`kernels` is also the name of a Hugging Face library, which transformers uses if its version is recent enough.
kernels-0.dist-info gives this package version 0, whether or not that library is installed. Without it,
transformers would import this file to look for a `__version__`: there is none, and nothing slow to import.
"""

# ruff: noqa: F401 (these names are the package)
import sys

if sys.argv[:1] == ["-m"] and sys.stderr.isatty():  # `python -m kernels`, not an import
    print("loading torch ...", end="\r", file=sys.stderr, flush=True)

from .attention import attention
from .cached_attention import cached_attention
from .digits import can_pack as packs_bits
from .launch import compiled
from .linear_logp import linear_logp
from .lora import below, expand, joins, lora
from .lora_linear import lora_linear, mm_fp32
from .packed_linear import MANY, Packed, fast_type, pack, packed_linear
from .place import Place
from .quantised import Matrix, Quantised, linear
from .rms_norm import rms_norm
from .rope import rope
from .rope_cache import rope_cache
from .sample import sample
from .swiglu import swiglu
