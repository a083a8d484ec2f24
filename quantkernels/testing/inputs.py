"""Problems for the element-wise ops: one generator for tests and benchmarks.

A :class:`Problem` is plain data (it names a test) and makes its tensors on demand, the same on every run. Values sit
where quantizers are fragile: at rounding ties, at the ends of the range and a bit beside them, at thresholds; with
``special`` also at NaN, infinities, subnormals, huge numbers and both zeros. Grids have ordinary rows and degenerate
ones (a step of zero, a step whose reciprocal overflows, an infinite range).
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import Encoding, Kind, Ste
from ..reference.learned_basis import levels as learned_levels

INF = float("inf")

SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (0,),
    (1,),
    (37,),
    (3, 1037),
    (300, 7),
    (4, 0, 3),
    (5, 1, 3),
    (2, 6, 5, 7),
    (3, 70, 4, 3),
    (1, 1, 1, 1),
    (2, 3, 4, 3, 5),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded")
AXES: tuple[int | None, ...] = (None, 0, 1, -1)
QUANTIZERS = (
    *((Kind.UNIFORM, 2**bits - 1) for bits in (1, 2, 3, 4, 5, 6, 7, 8)),
    (Kind.BINARY, 1),
    (Kind.TERNARY, 2),
)
STES = tuple(Ste)

# Values that no range is made for. The last ones are around the half types' ends and the smallest normal numbers.
_SPECIAL = (0.0, -0.0, INF, -INF, 3e38, -3e38, 1e-40, -1e-40, 1.5e-45, 65504.0, 65520.0, 6e-8, -6e-8, 1.2e-38, 1e6)
# offset and step of a uniform row; None is drawn at random.
_ROWS = ((-0.5, 0.25), None, (0.25, 0.01), None, (-0.7, 0.0), (-1e-3, 1e-39), (-1e38, 1e38), None)


@dataclass(frozen=True)
class Problem:
    """Arguments of ``fake_quantize``; ``axis`` may be any that the shape has, and None."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    axis: int | None = None
    kind: int = Kind.UNIFORM
    levels: int = 3
    ste: int = Ste.IDENTITY
    special: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        dtype = str(self.dtype).removeprefix("torch.")
        ending = "-special" if self.special else ""
        return f"{shape}-{self.layout}-{dtype}-axis{self.axis}-{self.quantizer_name}{ending}"

    @property
    def quantizer_name(self) -> str:
        """For instance uniform15full, binary."""
        kind = Kind(self.kind).name.lower()
        return f"{kind}{self.levels}{Ste(self.ste).name.lower()}" if self.kind == Kind.UNIFORM else kind

    @property
    def channels(self) -> int:
        return 1 if self.axis is None else self.shape[self.axis]

    @property
    def per_channel(self) -> int:
        """Elements that share a row of the grid."""
        count = 1
        for size in self.shape:
            count *= size
        return count // max(self.channels, 1)

    @property
    def quantizer(self) -> tuple[int, int, int, int | None]:
        """kind, levels, ste and axis: the arguments after the grid."""
        return int(self.kind), self.levels, int(self.ste), self.axis

    def generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self}-{purpose}".encode()))

    def grid(self, device: str = "cpu") -> Tensor:
        """float32 [channels, 3]."""
        return make_grid(self.channels, self.kind, self.generator("grid")).to(device)

    def x(self, device: str = "cpu") -> Tensor:
        """In the problem's shape, dtype and layout."""
        generator = self.generator("x")
        values = make_values(self.shape, self.grid(), self.kind, self.levels, self.axis, self.special, generator)
        return lay_out(values.to(device, self.dtype), self.layout)

    def grad(self, device: str = "cpu") -> Tensor:
        """Finite values in the shape and dtype of x, contiguous."""
        return torch.randn(self.shape, generator=self.generator("grad")).to(device, self.dtype)


@dataclass(frozen=True)
class AttentionProblem:
    """Arguments of ``attention_quantize``: the members share everything but the quantizer."""

    members: tuple[Problem, ...]

    def __str__(self) -> str:
        own = self.first.quantizer_name
        return str(self.first).replace(own, "+".join(m.quantizer_name for m in self.members))

    @property
    def first(self) -> Problem:
        return self.members[0]

    @property
    def quantizers(self) -> tuple[list[int], list[int], list[int], int | None]:
        """kinds, levels, stes and axis: the arguments after the grids."""
        kinds, levels, stes = ([int(getattr(m, name)) for m in self.members] for name in ("kind", "levels", "ste"))
        return kinds, levels, stes, self.first.axis

    def grids(self, device: str = "cpu") -> Tensor:
        """float32 [K, channels, 3]."""
        return torch.stack([member.grid() for member in self.members]).to(device)

    def attention(self, device: str = "cpu") -> Tensor:
        """float32 [K], a softmax, with one exact 0 from K = 4 on."""
        logits = torch.randn(len(self.members), generator=self.first.generator("attention"))
        if len(self.members) >= 4:
            logits[1] = -INF
        return logits.softmax(0).to(device)

    def x(self, device: str = "cpu") -> Tensor:
        """Each element is fragile for one of the members."""
        choice = torch.randint(len(self.members), self.first.shape, generator=self.first.generator("choice"))
        values = torch.zeros(self.first.shape)
        for k, (member, grid) in enumerate(zip(self.members, self.grids(), strict=True)):
            own = make_values(
                member.shape,
                grid,
                member.kind,
                member.levels,
                member.axis,
                member.special,
                member.generator(f"x{k}"),
            )
            values = torch.where(choice == k, own, values)
        return lay_out(values.to(device, self.first.dtype), self.first.layout)

    def grad(self, device: str = "cpu") -> Tensor:
        return self.first.grad(device)


@dataclass(frozen=True)
class LearnedBasisProblem:
    """Arguments of ``learned_basis_quantize``: those of ``one`` with 2^bits levels, and the encoding of the basis."""

    one: Problem
    encoding: int

    def __str__(self) -> str:
        digits = Encoding(self.encoding).name.lower()
        return str(self.one).replace(self.one.quantizer_name, f"{digits}{self.bits}{Ste(self.one.ste).name.lower()}")

    @property
    def bits(self) -> int:
        return self.one.levels.bit_length()

    @property
    def quantizer(self) -> tuple[int, int, int | None]:
        """encoding, ste and axis: the arguments after the basis."""
        return int(self.encoding), int(self.one.ste), self.one.axis

    def basis(self, device: str = "cpu") -> Tensor:
        """float32 [channels, bits]: ordinary rows, and with ``special`` such as give equal levels or infinite ones."""
        generator = self.one.generator("basis")
        rows = (
            0.2 * 2.0 ** torch.arange(self.bits) * (0.5 + torch.rand(self.one.channels, self.bits, generator=generator))
        )
        if self.one.special:
            rows[1::6] = 0.25  # levels that several codes have
            rows[2::6] *= -1
            rows[3::6] = 0.0
            rows[4::6] = 3e38
        return rows.to(device)

    def x(self, device: str = "cpu") -> Tensor:
        """At ties between neighbouring levels and beside them, at levels, anywhere; not all finite with ``special``."""
        generator, axis = self.one.generator("x"), self.one.axis
        levels = learned_levels(self.basis(), self.encoding).sort(1).values
        middle = torch.cat((levels, (levels[:, :-1] + levels[:, 1:]) * 0.5), 1)
        shape, per_channel = self.one.shape, self.one.per_channel
        pick = torch.randint(middle.shape[1], (self.one.channels, per_channel), generator=generator)
        at = middle.gather(1, pick)
        towards = (torch.randint(3, at.shape, generator=generator) - 1) * INF
        beside = torch.where(towards.isnan(), at, torch.nextafter(at, towards.nan_to_num(0.0)))
        anywhere = torch.randn(at.shape, generator=generator)
        values = torch.where(torch.rand(at.shape, generator=generator) < 0.5, anywhere, beside)
        if self.one.special:
            odd = torch.tensor((*_SPECIAL, float("nan")))[
                torch.randint(len(_SPECIAL) + 1, at.shape, generator=generator)
            ]
            values = torch.where(torch.rand(at.shape, generator=generator) < 0.1, odd, values)
        if axis is None:
            values = values.reshape(shape)
        else:
            moved = [shape[axis], *(size for d, size in enumerate(shape) if d != axis % len(shape))]
            values = values.reshape(moved).movedim(0, axis)
        return lay_out(values.to(device, self.one.dtype), self.one.layout)

    def grad(self, device: str = "cpu") -> Tensor:
        """As that of ``one``."""
        return self.one.grad(device)


def make_grid(channels: int, kind: int, generator: torch.Generator) -> Tensor:
    """float32 [channels, 3] with rows for ``kind``, ordinary and degenerate."""
    start = int(torch.randint(len(_ROWS), (), generator=generator))
    beta = torch.rand(channels, generator=generator) + 0.05
    if kind == Kind.BINARY:
        return torch.stack((-beta, 2 * beta, torch.zeros(channels)), 1)
    if kind == Kind.TERNARY:
        return torch.stack((-beta, beta, 0.7 * beta), 1)
    rows = []
    for c in range(channels):
        row = _ROWS[(start + c) % len(_ROWS)]
        if row is None:
            row = (-float(beta[c]), float(torch.rand((), generator=generator)) * 0.4 + 0.01)
        rows.append((*row, 0.0))
    return torch.tensor(rows, dtype=torch.float32).reshape(channels, 3)


def make_values(
    shape: Sequence[int],
    grid: Tensor,
    kind: int,
    levels: int,
    axis: int | None,
    special: bool,
    generator: torch.Generator,
) -> Tensor:
    """float32 values around the grid: ordinary, at ties, at the ends of the range, at thresholds, and special ones."""
    row = [1] * len(shape)
    if axis is not None:
        row[axis] = grid.shape[0]
    offset, step, threshold = (grid[:, column].reshape(row) for column in range(3))

    def draw(high: int) -> Tensor:
        return torch.randint(high, tuple(shape), generator=generator)

    def beside(value: Tensor) -> Tensor:
        """The value, or its neighbour on either side."""
        towards = (draw(3) - 1) * INF
        return torch.where(towards.isnan(), value, torch.nextafter(value, towards.nan_to_num(0.0)))

    share = torch.rand(tuple(shape), generator=generator) * 1.6 - 0.3
    ordinary = offset + step * levels * share
    if kind != Kind.UNIFORM:
        ordinary = torch.randn(tuple(shape), generator=generator) * step
    tie = offset + step * (draw(levels + 1) - 0.5)
    end = beside(torch.where(draw(2) == 0, offset, offset + step * levels))
    edge = beside(torch.where(draw(2) == 0, -threshold, threshold))
    choice = draw(8)
    values = torch.where(choice < 2, tie, ordinary)
    values = torch.where(choice == 2, end, values)
    values = torch.where(choice == 3, edge, values)
    if special:
        constants = torch.tensor(_SPECIAL)[draw(len(_SPECIAL))]
        values = torch.where(choice == 4, constants, values)
        values = torch.where((choice == 5) & (draw(4) == 0), float("nan"), values)
    return values


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values (``expanded``: values[:, :1] along dimension 1) with other strides."""
    dim = values.dim()
    if layout == "channels_last" and dim >= 3:
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout in ("channels_last", "transposed") and dim >= 2:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and dim >= 1:
        gap = float("nan") if values.is_floating_point() else 255
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), gap)
        wide[..., 1::2] = values
        return wide[..., 1::2]
    if layout == "expanded" and dim >= 2 and values.shape[1] > 0:
        return values[:, :1].expand(values.shape)
    return values.contiguous()


def pairwise(**factors: Sequence[Any]) -> list[dict[str, Any]]:
    """Few combinations in which every two values of different factors meet (greedy; the same on every run)."""
    names = list(factors)
    left = {
        (a, i, b, j)
        for (a, b) in itertools.combinations(range(len(names)), 2)
        for i in range(len(factors[names[a]]))
        for j in range(len(factors[names[b]]))
    }
    rows: list[dict[str, Any]] = []
    while left:
        a, i, b, j = min(left)
        chosen = {a: i, b: j}
        for c, name in enumerate(names):
            if c in chosen:
                continue
            gains = [sum(_pair(c, k, d, m) in left for d, m in chosen.items()) for k in range(len(factors[name]))]
            # Equal gains rotate with the row, or the first values would do all the filling.
            best = max(gains)
            candidates = [k for k, gain in enumerate(gains) if gain == best]
            chosen[c] = candidates[len(rows) % len(candidates)]
        left -= {_pair(c, k, d, m) for c, k in chosen.items() for d, m in chosen.items() if c != d}
        rows.append({name: factors[name][chosen[c]] for c, name in enumerate(names)})
    return rows


def _pair(a: int, i: int, b: int, j: int) -> tuple[int, int, int, int]:
    return (a, i, b, j) if a < b else (b, j, a, i)


def _valid_axis(shape: Sequence[int], axis: int | None) -> int | None:
    return axis if axis is not None and -len(shape) <= axis < len(shape) else None


def problems(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    layouts: Sequence[str] = LAYOUTS,
    axes: Sequence[int | None] = AXES,
    quantizers: Sequence[tuple[int, int]] = QUANTIZERS,
    stes: Sequence[int] = STES,
    special: Sequence[bool] = (True, False),
) -> list[Problem]:
    """Problems in which every two values of different factors meet; what a shape or kind cannot have is left out."""
    rows = pairwise(
        shape=shapes, quantizer=quantizers, layout=layouts, axis=axes, dtype=dtypes, ste=stes, special=special
    )
    found = {}
    for row in rows:
        kind, levels = row["quantizer"]
        ste = row["ste"] if kind == Kind.UNIFORM else Ste.IDENTITY
        axis = _valid_axis(row["shape"], row["axis"])
        problem = Problem(row["shape"], row["dtype"], row["layout"], axis, kind, levels, ste, row["special"])
        found[str(problem)] = problem
    return list(found.values())


_U, _B, _T, _I = Kind.UNIFORM, Kind.BINARY, Kind.TERNARY, Kind.IDENTITY
MIXTURES: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((_U, 3, Ste.IDENTITY), (_U, 15, Ste.IDENTITY), (_U, 255, Ste.IDENTITY)),
    ((_U, 3, Ste.CLIP), (_U, 15, Ste.CLIP), (_U, 255, Ste.CLIP)),
    ((_B, 1, 0), (_T, 2, 0), (_I, 0, 0)),
    ((_T, 2, 0), (_U, 15, Ste.FULL), (_U, 255, Ste.CLIP)),
    ((_U, 7, Ste.FULL),),
    ((_I, 0, 0), (_U, 3, Ste.FULL)),
    tuple((_U, 2**bits - 1, Ste(bits % 3)) for bits in range(1, 9)),
    ((_B, 1, 0), (_U, 1, Ste.CLIP), (_I, 0, 0), (_T, 2, 0), (_U, 63, Ste.FULL)),
)


def attention_problems(
    shapes: Sequence[tuple[int, ...]] = SHAPES, special: Sequence[bool] = (True, False)
) -> list[AttentionProblem]:
    """Mixtures of one to eight members over shapes, layouts, axes and dtypes, pairwise."""
    rows = pairwise(shape=shapes, mixture=MIXTURES, layout=LAYOUTS, axis=AXES, dtype=DTYPES, special=special)
    found = {}
    for row in rows:
        axis = _valid_axis(row["shape"], row["axis"])
        one = Problem(row["shape"], row["dtype"], row["layout"], axis, special=row["special"])
        members = tuple(replace(one, kind=k, levels=n, ste=s) for k, n, s in row["mixture"])
        found[str(AttentionProblem(members))] = AttentionProblem(members)
    return list(found.values())


def learned_basis_problems(
    bits: Sequence[int] = (1, 2, 3, 4, 7), special: Sequence[bool] = (True, False)
) -> list[LearnedBasisProblem]:
    """Bases of these many bits in both encodings over shapes, layouts, axes and dtypes, pairwise."""
    rows = pairwise(
        shape=SHAPES, bits=bits, encoding=tuple(Encoding), layout=LAYOUTS, axis=AXES, dtype=DTYPES,
        ste=(Ste.IDENTITY, Ste.CLIP), special=special,
    )  # fmt: skip
    found = {}
    for row in rows:
        axis = _valid_axis(row["shape"], row["axis"])
        levels = 2 ** row["bits"] - 1
        one = Problem(
            row["shape"], row["dtype"], row["layout"], axis, levels=levels, ste=row["ste"], special=row["special"]
        )
        found[str(LearnedBasisProblem(one, row["encoding"]))] = LearnedBasisProblem(one, row["encoding"])
    return list(found.values())
