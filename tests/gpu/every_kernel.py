"""Runs every CUDA kernel of the library once on small tensors: what `make gpu-check` puts under compute-sanitizer."""

from __future__ import annotations

import sys

import torch

from quantkernels.testing import BACKENDS, OPS, calls


def main(name: str) -> int:
    """Call every op of a backend; prints how many calls there were."""
    backend = next(b for b in BACKENDS if b.name == name)
    if backend.missing:
        print(f"every_kernel: {name}: {backend.missing}", file=sys.stderr)
        return 1
    count = 0
    for op in OPS:
        if not backend.has(op):
            continue
        for call in calls(op):
            getattr(backend.ops, op)(*call.arguments(backend.device))
            count += 1
    if backend.device == "cuda":
        torch.cuda.synchronize()
    print(f"every_kernel: {count} calls on {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or ["cuda"]))
