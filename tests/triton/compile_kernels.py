"""Compiles every Triton kernel for a GPU that need not be there; prints its PTX as JSON, {name: ptx}.

Run by test_gpu_code.py in a process of its own, because there Triton must not be in its interpreter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantkernels.triton import attention, fake_quantize, learned_basis, matmul, stats
from quantkernels.triton._tiles import EXACT

FLOATS = "*fp32"
RUNS = {"ONE_RUN": True, "WIDE": False, "CHANNEL_BLOCK": 1, "ELEMENT_BLOCK": 2048}
COLUMNS = {"ONE_RUN": False, "WIDE": True, "CHANNEL_BLOCK": 64, "ELEMENT_BLOCK": 32}
MIXTURE = {"COUNT": 4, "KINDS": (0, 1, 2, 3), "LEVELS": (3, 1, 2, 0)}
LINEAR = {
    **{"scale": None, "shift": None, "out_grid": None, "OUT_KIND": 0, "OUT_LEVELS": 0, "WIDE": False},
    **{"DEPTH": 576, "X_KIND": 0, "X_LEVELS": 255, "X_CODES": False, "X_SHIFT": 128},
    **{"W_KIND": 0, "W_BITS": 2, "W_PER_CHANNEL": True, "W_SHIFT": 0},
    **{"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 32, "BLOCK_DEPTH": 64},
}
# What is known of an argument to be a multiple of 16; pointers always are.
ALIGNED = ("elements", "inner", "numel")


def cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, types of its pointers (numbers are int32), and its constants."""
    for type_name, walks in (("fp32", {"runs": RUNS, "columns": COLUMNS}), ("bf16", {"runs": RUNS})):
        x = "*" + type_name
        for walk_name, walk in walks.items():
            ending = f"-{type_name}-{walk_name}"
            one = {"x": x, "grid": FLOATS, "out": x}
            quantizer = {"KIND": 0, "LEVELS": 15}
            forward, backward = fake_quantize.fake_quantize_forward_kernel, fake_quantize.fake_quantize_backward_kernel
            yield "forward" + ending, forward, one, {**quantizer, "CODES": False, **walk}
            yield "encode" + ending, forward, {**one, "out": "*u8"}, {**quantizer, "CODES": True, **walk}
            gradient = {"grad": x, "x": x, "grid": FLOATS, "grad_x": x, "partial": FLOATS}
            yield "backward" + ending, backward, gradient, {"LEVELS": 15, "STE": 2, **walk}
            several = {"x": x, "attention": FLOATS, "grids": FLOATS, "out": x}
            yield "attention" + ending, attention.attention_forward_kernel, several, {**MIXTURE, **walk}
            gradient = {**several, "grad": x, "grad_x": x, "partial": FLOATS}
            constants = {**MIXTURE, "STES": (2, 0, 0, 0), **walk}
            yield "attention_backward" + ending, attention.attention_backward_kernel, gradient, constants
            gradient, constants = {**several, "grad": x, "partial": FLOATS}, {**constants, "grad_x": None}
            yield "attention_gradient" + ending, attention.attention_backward_kernel, gradient, constants
            levels = {"x": x, "tree": FLOATS, "codes": "*i32", "out": x, "partial": FLOATS}
            constants = {"BITS": 3, "SIGNED": True, "CODES": False, **walk}
            yield "learned_basis" + ending, learned_basis.learned_basis_forward_kernel, levels, constants
            gradient = {"grad": x, "x": x, "top": FLOATS, "grad_x": x}
            yield "learned_basis_backward" + ending, learned_basis.learned_basis_backward_kernel, gradient, walk
            sums = {"x": x, "partial": FLOATS, "threshold": FLOATS, "candidates": FLOATS}
            yield "stats" + ending, stats.channel_stats_kernel, sums, walk
            yield "mean" + ending, stats.conditional_abs_mean_kernel, sums, walk
            yield "errors" + ending, stats.range_errors_kernel, sums, {"COUNT": 9, "LEVELS": 15, **walk}
        for channels, one in (("one", True), ("several", False)):
            masked, constants = {"x": x, "grid": FLOATS, "out": x, "mask": "*i32"}, {"ONE_CHANNEL": one, "WIDE": False}
            constants |= {"LEVELS": 15, "WORDS": 64}
            yield f"masked-{type_name}-{channels}", fake_quantize.fake_quantize_masked_kernel, masked, constants
        integer = "*i16" if type_name == "bf16" else "*i32"
        bits = {"grad": integer, "mask": "*i32", "out": integer}
        yield f"apply_mask-{type_name}", fake_quantize.apply_mask_kernel, bits, {"WIDE": False, "WORDS": 64}
        linear = {"x": x, "out": x, "x_grid": FLOATS, "w_grid": FLOATS, "planes": "*i32", "bias": FLOATS}
        bounds = {"lower": "fp32", "upper": "fp32"}
        yield f"linear-{type_name}", matmul.lowbit_linear_kernel, {**linear, **bounds}, LINEAR


def main() -> None:
    capability = int(sys.argv[1])
    listing = {}
    for name, kernel, types, constants in cases():
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(kernel.arg_names)
            if signature[n].startswith("*") or n in ALIGNED
        }
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(EXACT))
        listing[name] = compiled.asm["ptx"]
    json.dump(listing, sys.stdout)


if __name__ == "__main__":
    main()
