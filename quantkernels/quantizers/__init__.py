"""Quantizers: modules that hold parameters and statistics and call the ops. One file a family.

To add one, see docs/adding-a-quantizer.md.
"""

from .attention import Attention
from .base import Quantizer
from .binary import BWN, TWN
from .binary_relax import BinaryRelax
from .dorefa import CentredDoReFa, DoReFa, ModifiedDoReFa, NestedDoReFa
from .fixed import Fixed
from .hwgq import HWGQ
from .identity import Identity
from .learned_basis import LearnedBasis
from .lsq import LSQ
from .minmax import MinMax
from .mixture import Mixture
from .pact import PACT
from .pseudo_noise import PseudoNoise
from .sawb import SAWB
from .sharing import shared_statistics

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
    "DoReFa",
    "Fixed",
    "Identity",
    "LearnedBasis",
    "MinMax",
    "Mixture",
    "ModifiedDoReFa",
    "NestedDoReFa",
    "PseudoNoise",
    "Quantizer",
    "shared_statistics",
]
