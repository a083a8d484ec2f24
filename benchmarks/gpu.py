"""The element-wise families on a GPU, against eager, torch.compile and the copy bandwidth measured in the same run.

    python -m benchmarks.gpu --out FILE [--seconds 420]     every job at 2^28 and 2^20 elements, as JSON
    python -m benchmarks.gpu --out FILE --quick             tiny, without torch.compile; on the CPU if need be

How: benchmarks/device.py. ``of_copy`` is the share of the bandwidth of `Tensor.copy_` on as many elements, where a job
counts the bytes that it cannot do without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantkernels as qk
from benchmarks import plain
from benchmarks.contestants import DTYPES, HIGH, LOW, grid_over
from benchmarks.device import SETS, Record, Run, draw, kernels, main
from quantkernels.ops import Encoding, Kind, Ste

GOAL = 0.85  # of the copy bandwidth, at the large size
LARGE, SMALL = 1 << 28, 1 << 20
CHANNELS = 512
BITS = 4
LEVELS = 2**BITS - 1
MEMBERS = (3, 15, 255)  # highest codes of a mixture of 2, 4 and 8 bits
SHARES = (0.5, 0.3, 0.2)  # its attention


@dataclass
class Inputs:
    """One set: values, a gradient like them, grids, codes and planes of them."""

    x: Tensor
    grad: Tensor
    axis: int | None

    def __post_init__(self) -> None:
        self.grid = grid_over(self.x, LEVELS, self.axis).to(self.x.device)
        self.grids = torch.stack([grid_over(self.x, levels, self.axis) for levels in MEMBERS]).to(self.x.device)
        self.attention = torch.tensor(SHARES, device=self.x.device)
        basis = torch.tensor([[2.0**b / LEVELS * HIGH for b in range(BITS)]], device=self.x.device)
        self.basis = basis.repeat(len(self.grid), 1)  # of levels in {-1, 1}^BITS, uniform on [LOW, HIGH]
        self.members = [int(Kind.UNIFORM)] * len(MEMBERS), list(MEMBERS)

    @property
    def quantizer(self) -> tuple[Any, ...]:
        """grid, kind and levels."""
        return self.grid, int(Kind.UNIFORM), LEVELS

    def mixture(self, ste: int) -> tuple[Any, ...]:
        """The arguments of attention_quantize after x."""
        return self.attention, self.grids, *self.members, [ste] * len(MEMBERS), self.axis


@dataclass(frozen=True)
class Job:
    """What an op does with a set of inputs, and the bytes that it must move for each element."""

    name: str
    run: Callable[[Any, Inputs], Any]  # (namespace of the ops, inputs)
    bytes: Callable[[int], float]  # of the element's size
    rivals: Callable[[Tensor], Tensor] | None = None  # the plain formulation of x per tensor, forward
    per_row: bool = False  # rows of bits: not per channel of columns
    with_step: Callable[[Inputs], Tensor] | None = None  # the library's forward for a step with autograd


def _fake(i: Inputs) -> Tensor:
    return qk.ops.fake_quantize(i.x, *i.quantizer, Ste.CLIP, i.axis)


def _mix(i: Inputs) -> Tensor:
    return qk.ops.attention_quantize(i.x, *i.mixture(Ste.IDENTITY))


def _plain_fake(x: Tensor) -> Tensor:
    return plain.fake_quantize(x, LOW, (HIGH - LOW) / LEVELS, LEVELS)


def _plain_mix(x: Tensor) -> Tensor:
    terms = [a * plain.fake_quantize(x, LOW, (HIGH - LOW) / n, n) for a, n in zip(SHARES, MEMBERS, strict=True)]
    return sum(terms[1:], terms[0])


def _plain_pack(x: Tensor) -> Tensor:
    return plain.quantize_pack(x, LOW, (HIGH - LOW) / LEVELS, BITS)


CLIP = int(Ste.CLIP)
JOBS = (
    Job(
        "channel_stats",
        lambda o, i: o.channel_stats(i.x, i.axis),
        lambda n: n,
        plain.channel_stats,
    ),
    Job(
        "fake_quantize",
        lambda o, i: o.fake_quantize(i.x, *i.quantizer, CLIP, i.axis),
        lambda n: 2 * n,
        _plain_fake,
        with_step=_fake,
    ),
    Job(
        "fake_quantize_backward",
        lambda o, i: o.fake_quantize_backward(i.grad, i.x, *i.quantizer, CLIP, i.axis),
        lambda n: 3 * n,
    ),
    Job(
        "attention_quantize",
        lambda o, i: o.attention_quantize(i.x, *i.mixture(0)),
        lambda n: 2 * n,
        _plain_mix,
        with_step=_mix,
    ),
    Job(
        "attention_gradient",
        lambda o, i: o.attention_gradient(i.grad, i.x, i.attention, i.grids, *i.members, i.axis),
        lambda n: 2 * n,
    ),
    Job(
        "attention_quantize_backward",
        lambda o, i: o.attention_quantize_backward(i.grad, i.x, *i.mixture(CLIP)),
        lambda n: 3 * n,
    ),
    Job("encode", lambda o, i: o.encode(i.x, *i.quantizer, i.axis), lambda n: n + 1),
    Job(
        "learned_basis_quantize",
        lambda o, i: o.learned_basis_quantize(i.x, i.basis, int(Encoding.SIGNED), CLIP, i.axis),
        lambda n: 2 * n,
    ),
    Job(
        "learned_basis_quantize_backward",
        lambda o, i: o.learned_basis_quantize_backward(i.grad, i.x, i.basis, int(Encoding.SIGNED), i.axis),
        lambda n: 3 * n,
    ),
    Job(
        "quantize_pack",
        lambda o, i: o.quantize_pack(i.x, *i.quantizer, i.axis),
        lambda n: n + BITS / 8,
        _plain_pack,
        per_row=True,
    ),
)


def inputs_of(size: int, dtype: str, layout: str, device: str) -> list[Inputs]:
    """Sets of random values: per tensor, or of CHANNELS channels outside or inside."""
    shapes = {
        "tensor": (CHANNELS, size // CHANNELS),
        "outer": (CHANNELS, size // CHANNELS),
        "inner": (size // CHANNELS, CHANNELS),
    }
    axis = {"tensor": None, "outer": 0, "inner": 1}[layout]
    sets = []
    for seed in range(SETS):
        generator = draw(seed, device)
        x, grad = (torch.randn(shapes[layout], generator=generator, device=device).to(DTYPES[dtype]) for _ in range(2))
        sets.append(Inputs(x, grad, axis))
    return sets


def step_of(function: Callable[[Inputs], Tensor], i: Inputs) -> Run:
    """Forward, and backward to x."""

    def run() -> Any:
        i.x.requires_grad_()
        try:
            return torch.autograd.grad(function(i), i.x, i.grad)
        finally:
            i.x.requires_grad_(False)

    return run


class Bench(Record):
    """The element-wise families."""

    def __init__(self, out: Path, seconds: float, quick: bool) -> None:
        super().__init__(out, seconds, quick)
        self.sizes = (1 << 16, 1 << 14) if quick else (LARGE, SMALL)
        self.copies: dict[str, float] = {}

    def go(self) -> None:
        """Our own times first: they are what the rivals' are worth nothing without."""
        for size in self.sizes:
            for dtype, layout in self.variants(size):
                self.measure(size, dtype, layout)
        for size in self.sizes:
            self.rivals(size)

    def variants(self, size: int) -> Iterator[tuple[str, str]]:
        """Types per tensor, and layouts in float32."""
        yield from (("float32", "tensor"), ("float16", "tensor"), ("bfloat16", "tensor"))
        if size == self.sizes[0]:
            yield from (("float32", "outer"), ("float32", "inner"), ("bfloat16", "inner"))

    def measure(self, size: int, dtype: str, layout: str) -> None:
        """Every job on one kind of tensor, with the native and the Triton kernels, and a copy of the same size."""
        sets, element = inputs_of(size, dtype, layout, self.device), DTYPES[dtype].itemsize
        key = f"{size}-{dtype}"
        if key not in self.copies:
            target = torch.empty_like(sets[0].x)
            seconds, _ = self.clock.seconds([lambda i=i: target.copy_(i.x) for i in sets])
            self.copies[key] = 2 * size * element / seconds
        for job in JOBS:
            if not (job.per_row and layout == "inner"):
                name = f"{job.name}-{size}-{dtype}-{layout}"
                self.attempt(name, partial(self.measure_job, name, job, sets, size, dtype, layout))

    def measure_job(self, name: str, job: Job, sets: Sequence[Inputs], size: int, dtype: str, layout: str) -> None:
        """One op on one kind of tensor."""
        element = DTYPES[dtype].itemsize
        runs = [partial(job.run, torch.ops.quantkernels, i) for i in sets]
        seconds, host = self.clock.seconds(runs)
        rate, copy = job.bytes(element) * size / seconds, self.copies[f"{size}-{dtype}"]
        entry = {"seconds": seconds, "host_seconds": host, "gbs": rate / 1e9, "of_copy": rate / copy}
        if size == self.sizes[0]:
            entry["goal_met"] = entry["of_copy"] >= GOAL
        self.results[name] = entry
        if (dtype, layout) == ("float32", "tensor"):
            launched = kernels(runs[0], self.device)
            entry["launches"] = None if launched is None else len(launched)

    def rivals(self, size: int) -> None:
        """Triton's kernels, the plain formulation eager and compiled; forward, and a step with autograd."""
        sets = inputs_of(size, "float32", "tensor", self.device)
        for job in JOBS:
            name = f"{job.name}-{size}-float32-tensor"
            if "seconds" in self.results.get(name, {}):
                self.attempt(f"{name}, rivals", partial(self.rivals_of, job, self.results[name], sets, size))

    def rivals_of(self, job: Job, entry: dict[str, Any], sets: Sequence[Inputs], size: int) -> None:
        """Of one op."""
        if self.has_triton(job.name):
            runs = [partial(job.run, torch.ops.quantkernels_triton, i) for i in sets]
            entry["triton"] = self.timed(f"{job.name}-triton-{size}", runs)
        for name, function in self.plainly(job.rivals):
            entry[name] = self.timed(f"{job.name}-{name}-{size}", [partial(function, i.x) for i in sets])
        if job.with_step is None:
            return
        seconds = self.timed(f"{job.name}-step", [step_of(job.with_step, i) for i in sets])
        step = entry["step"] = {"seconds": seconds}
        for name, function in self.plainly(job.rivals):
            step[name] = self.timed(
                f"{job.name}-step-{name}-{size}", [step_of(lambda i, f=function: f(i.x), i) for i in sets]
            )

    def has_triton(self, op: str) -> bool:
        """Whether the op has a Triton kernel that runs compiled here."""
        if self.device != "cuda":
            return False
        qk.backend("triton").__exit__()
        return hasattr(torch.ops.quantkernels_triton, op)

    def plainly(self, function: Callable[[Tensor], Tensor] | None) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """The plain formulation as it is, and compiled anew."""
        if function is None:
            return
        yield "eager", function
        if not self.quick:
            torch.compiler.reset()
            yield "compile", torch.compile(function, dynamic=False)

    def facts(self) -> Mapping[str, Any]:
        """The copy bandwidth by size and type."""
        return {"copy_gbs": {key: value / 1e9 for key, value in self.copies.items()}}

    def lines(self) -> Iterator[str]:
        """A table: time, share of the copy bandwidth, launches, rivals."""
        for name, entry in self.results.items():
            if "wrong" in entry:
                yield f"{name:<56} WRONG: {entry['wrong']}"
            if "seconds" not in entry:
                continue
            rivals = {k: entry[k] for k in ("triton", "eager", "compile") if entry.get(k)}
            ratios = "  ".join(f"{k} {value / entry['seconds']:.2f}x" for k, value in rivals.items())
            kernels = f"  {entry['launches']} launches" if entry.get("launches") else ""
            share = f"{1e6 * entry['seconds']:>10.1f} us{100 * entry['of_copy']:>7.1f} % of copy"
            yield f"{name:<56} {share}{kernels}  {ratios}"


if __name__ == "__main__":
    main(Bench, __doc__)
