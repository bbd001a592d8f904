"""The kernels: pure tensor functions, each with its torch reference. They know nothing of the project.

One file a kernel, each a ladder: derivation, torch reference, Triton kernel, wrapper. The signature is the same on every
device; on a CPU the reference is what runs, so the reference is written to be fast as well as plain.
"""

from .attention import attention
from .cached_attention import cached_attention
from .linear_logp import linear_logp
from .lora import lora
from .rms_norm import rms_norm
from .rope import rope, rope_cache
from .sample import sample
from .swiglu import swiglu

__all__ = [
    "attention",
    "cached_attention",
    "linear_logp",
    "lora",
    "rms_norm",
    "rope",
    "rope_cache",
    "sample",
    "swiglu",
]
