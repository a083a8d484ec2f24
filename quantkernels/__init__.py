"""Train and deploy neural networks with 1 to 8 bits."""

from . import nn, ops
from ._library import build_info, empty_cache
from .checkpoint import (
    CheckpointArchitectureError,
    CheckpointError,
    CheckpointVersionError,
    CorruptCheckpointError,
    load,
    save,
)
from .convert import (
    UnsupportedModuleError,
    convert,
    copy_bits,
    first_and_last,
    prepare,
    set_bits,
    switch_batch_norms,
)
from .ops import backend, plan
from .pass_codes import pass_codes
from .prepack import prepack
from .quantizers import (
    BWN,
    HWGQ,
    LSQ,
    PACT,
    SAWB,
    TWN,
    Attention,
    BinaryRelax,
    CentredDoReFa,
    DoReFa,
    Identity,
    LearnedBasis,
    MinMax,
    ModifiedDoReFa,
    PseudoNoise,
    Quantizer,
    shared_statistics,
)

__all__ = [
    "BWN",
    "HWGQ",
    "LSQ",
    "PACT",
    "SAWB",
    "TWN",
    "Attention",
    "BinaryRelax",
    "CentredDoReFa",
    "CheckpointArchitectureError",
    "CheckpointError",
    "CheckpointVersionError",
    "CorruptCheckpointError",
    "DoReFa",
    "Identity",
    "LearnedBasis",
    "MinMax",
    "ModifiedDoReFa",
    "PseudoNoise",
    "Quantizer",
    "UnsupportedModuleError",
    "backend",
    "build_info",
    "convert",
    "copy_bits",
    "empty_cache",
    "first_and_last",
    "load",
    "nn",
    "ops",
    "pass_codes",
    "plan",
    "prepack",
    "prepare",
    "save",
    "set_bits",
    "shared_statistics",
    "switch_batch_norms",
]
