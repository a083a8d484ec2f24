"""What the processes of one training must agree on."""

from __future__ import annotations

from torch import Tensor, distributed


def process_count() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def average_over_processes(value: Tensor) -> Tensor:
    """The mean of `value` over all processes, in place; every process must call this. Returns it.

    Not differentiable. Without torch.distributed, `value` as it is.
    """
    processes = process_count()
    if processes > 1:
        distributed.all_reduce(value)  # the sum: gloo has no average
        value /= processes
    return value
