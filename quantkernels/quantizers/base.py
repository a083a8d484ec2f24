"""What every quantizer is: a module that turns statistics or parameters into a grid, and calls one op with
it.

A grid is float32 [C, 3], the offset, step and threshold of each channel (C = 1 per tensor); docs/numerics.md
says how an op reads it. A quantizer's whole work is `batch_grid`; everything else is here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Kind
from ..ops.planes import BitPlanes
from .sharing import once, shared_statistics

MAX_BITS = 8


def in_backward() -> bool:
    """Whether this code runs inside a backward pass: a forward there is the recomputation of a checkpointed
    one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def channel_size(x: Tensor, axis: int | None) -> int:
    """Elements a channel: numel, or numel divided by the size of `axis`."""
    return x.numel() if axis is None else x.numel() // max(x.shape[axis], 1)


class Quantizer(nn.Module):
    """Base of all quantizers.

    bits: 1 to 8 (32 for `Identity`); axis: None for one grid a tensor, or the channel dimension.
    Attributes `kind`, `levels` (the highest code) and `ste` are what the ops take.

    A statistics-based quantizer takes its grid from the tensor it is given, at each call. After `track()`,
    which a layer calls on its activation quantizer, it keeps an exponential average of the grids of training
    batches instead: each training forward updates `running_grid` and quantizes with the updated average,
    eval quantizes with it unchanged. The recomputation of a checkpointed forward does not update it again.

    Parameters and buffers stay float32 whatever `half()`, `bfloat16()` or `double()` is called on the model.
    """

    needs_statistics = False
    """Whether `batch_grid` reads `ops.channel_stats` of the tensor."""
    learned = False
    """Whether the grid comes from parameters, so that there is nothing to track."""
    nested = False
    """Whether the code with fewer bits is the first bits of that with more, so that planes are shared."""

    running_grid: Tensor | None

    def __init__(self, bits: int, kind: int, levels: int, ste: int, axis: int | None = None) -> None:
        super().__init__()
        self.bits = bits
        self.kind = kind
        self.levels = levels
        self.ste = ste
        self.axis = axis
        self.momentum: float | None = None
        self.calibrated = False
        self.register_buffer("running_grid", None)

    @property
    def tracking(self) -> bool:
        """Whether the grid is a running average (`track`)."""
        return self.momentum is not None

    def transform(self, x: Tensor) -> Tensor:
        """What the grid is laid over, in the shape of x: x itself, or a differentiable function of it in float32.

        The result of `forward` is in the dtype of x in any case.
        """
        return x

    @property
    def transforms(self) -> bool:
        """Whether `transform` is more than the identity, so that codes are not those of x itself."""
        return type(self).transform is not Quantizer.transform

    def batch_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """float32 [C, 3] for this x. stats: `ops.channel_stats(x, axis)`, or None where `needs_statistics`
        is False."""
        raise TypeError(f"{type(self).__name__} must define batch_grid(x, stats)")

    def track(self, momentum: float = 0.1) -> Quantizer:
        """Keep running averages from now on; the weight of a new batch is `momentum`. Returns self.

        Learned quantizers have nothing to average and are left as they are.
        Raises ValueError for a per-channel quantizer, whose channel count is not known before the first
        batch.
        """
        if self.learned:
            return self
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"track: momentum must be in (0, 1], got {momentum}")
        if self.axis is not None:
            raise ValueError(f"track: running statistics are per tensor, got axis={self.axis}; use axis=None")
        self.momentum = momentum
        self.calibrated = False
        self.running_grid = torch.full((1, 3), float("nan"))
        return self

    def bind(self, x: Tensor) -> None:
        """A layer shows its weight, so that a quantizer with something for each channel knows how many there are."""

    def updates(self, x: Tensor) -> bool:
        """Whether a forward of x now would update the running average."""
        return self.training and x.numel() > 0 and not in_backward()

    def reads_batch(self, x: Tensor) -> bool:
        """Whether `grid(x)` will look at x rather than at what is stored."""
        return not self.learned and (not self.tracking or self.updates(x) or (self.training and not self.calibrated))

    def grid(self, x: Tensor, stats: Tensor | None = None, update: bool = True) -> Tensor:
        """The grid to quantize x with, float32 [C, 3]; differentiable where it is learned.

        stats: `ops.channel_stats(x, axis)` if the caller has it already. update: whether a training call of
        a tracking quantizer moves the running average.
        Raises RuntimeError in eval if a tracking quantizer has not seen a training batch yet.
        """
        if self.learned:
            return self.batch_grid(x, stats)
        if not self.reads_batch(x) or (self.calibrated and not update and self.tracking):
            return self._stored_grid()
        with torch.no_grad():
            grid = self.fresh_grid(x, stats)
            return self._average(grid) if self.tracking and update and self.updates(x) else grid

    def fresh_grid(self, x: Tensor, stats: Tensor | None) -> Tensor:
        """`batch_grid`, with the statistics that it needs where the caller has none."""
        if stats is None and self.needs_statistics:
            stats = self.statistics(x)
        return self.batch_grid(x, stats)

    def statistics(self, x: Tensor) -> Tensor:
        """`ops.channel_stats` of x; of a parameter once for all who ask inside `shared_statistics`."""
        if not isinstance(x, nn.Parameter):
            return ops.channel_stats(x, self.axis)
        return once(x, ("channel_stats", self.axis), lambda: ops.channel_stats(x, self.axis))

    def operands(self, x: Tensor, update: bool = True) -> tuple[Tensor, Tensor]:
        """(transform(x), grid(x)): what the ops take. update: as for `grid`."""
        if not self.transforms or torch.compiler.is_compiling():
            return self.transform(x), self.grid(x, update=update)
        with shared_statistics():
            return self.transform(x), self.grid(x, update=update)

    def _average(self, grid: Tensor) -> Tensor:
        running, momentum = self.running_grid, self.momentum
        assert running is not None and momentum is not None
        if self.calibrated:
            grid = torch.lerp(running, grid, momentum)
        # The op saves `grid` for its backward, so the buffer gets a copy of it and stays free to change.
        running.copy_(grid)
        self.calibrated = True
        return grid

    def _stored_grid(self) -> Tensor:
        if not self.calibrated or self.running_grid is None:
            raise RuntimeError(
                f"{type(self).__name__}(bits={self.bits}) quantizes activations with running statistics, "
                "and has none yet: run at least one forward in training mode before eval"
            )
        return self.running_grid.clone() if self.training else self.running_grid

    def forward(self, x: Tensor) -> Tensor:
        """q in the shape and dtype of x."""
        return self.quantize(x)[0]

    def quantize(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(what `forward` gives, a function that gives the same of x again).

        The function has no gradient and updates nothing; it holds the grid of this call and none of x, and what
        happens to the quantizer in the meantime does not change it.
        """
        value, grid = self.operands(x)
        options = self.kind, self.levels, self.ste, self.axis
        q = ops.fake_quantize(value, grid, *options).to(x.dtype)
        fixed = grid.detach()
        return q, lambda x: ops.fake_quantize(self.transform(x), fixed, *options).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> BitPlanes:
        """The codes of x as bit-planes; `encode(x).decode()` equals `forward(x)` exactly, NaNs apart.

        Running statistics are read and not updated.
        """
        value, grid = self.operands(x, update=False)
        planes = BitPlanes.encode(value, grid.detach(), self.kind, self.levels, self.axis)
        return dataclasses.replace(planes, dtype=x.dtype)

    def check_bits(self, bits: int) -> None:
        """Raises ValueError unless `set_bits(bits)` is possible."""
        if bits != self.bits:
            raise ValueError(f"set_bits: {type(self).__name__} has {self.bits} bits and cannot have {bits}")

    def set_bits(self, bits: int) -> None:
        """Change the number of levels and keep the range, that of running statistics too; ValueError if
        impossible."""
        self.check_bits(bits)

    def copy_bits(self, source: int, target: int) -> None:
        """Give `target` bits what the quantizer has for `source` bits alone; most have nothing of the kind."""

    def _set_uniform_levels(self, bits: int) -> None:
        levels = uniform_levels(type(self).__name__, bits)
        if self.running_grid is not None:
            self.running_grid[:, 1] *= self.levels / levels
        self.bits, self.levels = bits, levels

    def _apply(self, fn: Any, recurse: bool = True) -> Quantizer:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_dtype, recurse)  # type: ignore[return-value]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any, *rest: Any
    ) -> None:
        if prefix and not any(key.startswith(prefix) for key in state_dict):
            missing_keys = []  # a float network's state dict: the quantizer keeps what it was made with
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        if self.running_grid is not None and prefix + "running_grid" in state_dict:
            self.calibrated = not bool(self.running_grid.isnan().any())

    def extra_repr(self) -> str:
        """The arguments, as they would be written."""
        parts = [] if self.kind in (Kind.BINARY, Kind.TERNARY, Kind.IDENTITY) else [f"bits={self.bits}"]
        if self.axis is not None:
            parts.append(f"axis={self.axis}")
        if self.tracking:
            parts.append("tracking")
        return ", ".join(parts)


def uniform_levels(name: str, bits: int) -> int:
    """2^bits - 1. Raises ValueError unless bits is an int from 1 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{name}: bits must be an int from 1 to {MAX_BITS}, got {bits!r}")
    return 2**bits - 1


def check_widths(name: str, widths: Sequence[int]) -> list[int]:
    """Bit-widths as a list, the highest first. Raises ValueError unless they are different ints from 1 to 8."""
    if isinstance(widths, str) or not isinstance(widths, Sequence) or not widths:
        raise ValueError(f"{name}: bit-widths must be a list of at least one, got {widths!r}")
    for bits in widths:
        uniform_levels(name, bits)
    if len(set(widths)) != len(widths):
        raise ValueError(f"{name}: bit-widths must be different, got {list(widths)}")
    return sorted(widths, reverse=True)


class ScaledGrid(Quantizer):
    """A quantizer whose grid is one positive number a channel divided by three constants (offset, step,
    threshold).

    One division is the whole path from the statistic to the grid, and it rounds once: `divisor` (-1, N/2,
    inf) gives (-a, 2a/N, 0).
    """

    divisor: Tensor

    def __init__(
        self,
        bits: int,
        kind: int,
        levels: int,
        ste: int,
        axis: int | None,
        divisor: tuple[float, float, float],
    ) -> None:
        super().__init__(bits, kind, levels, ste, axis)
        self.register_buffer("divisor", torch.tensor([divisor], dtype=torch.float32), persistent=False)

    def scaled(self, size: Tensor) -> Tensor:
        """size [C, 1] -> grid [C, 3]."""
        return size / self.divisor
