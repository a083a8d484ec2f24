"""What tests and benchmarks of the ops share: the backends, problems to run on them, and how results are compared."""

from .backends import BACKENDS, Backend
from .calls import OPS, Call, calls
from .compare import assert_bit_equal, assert_sums_close, sum_tolerance
from .inputs import (
    AttentionProblem,
    LearnedBasisProblem,
    Problem,
    attention_problems,
    lay_out,
    learned_basis_problems,
    pairwise,
    problems,
)
from .lowbit import LowbitProblem

__all__ = [
    "BACKENDS",
    "OPS",
    "AttentionProblem",
    "Backend",
    "Call",
    "LearnedBasisProblem",
    "LowbitProblem",
    "Problem",
    "assert_bit_equal",
    "assert_sums_close",
    "attention_problems",
    "calls",
    "lay_out",
    "learned_basis_problems",
    "pairwise",
    "problems",
    "sum_tolerance",
]
