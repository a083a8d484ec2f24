"""The low-bit products on a GPU against cuBLAS and cuDNN in bf16 and torch._int_mm, and the tensor cores' own peaks.

    python -m benchmarks.gpu_products --out FILE [--seconds 420]     what is worth most first, as JSON
    python -m benchmarks.gpu_products --out FILE --quick             tiny; on the CPU if need be

Linear layers with 8192 features, the convolutions of ResNet-18 and -50 and the depthwise ones of MobileNetV2, all with
random codes and weights. How: benchmarks/device.py. Of each product a slice is held against the reference before it is
timed, to the bit: one that is wrong gets no time. What is measured of each: benchmarks/gpu_problems.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import exp, log
from pathlib import Path
from typing import Any

import torch

from benchmarks import peaks
from benchmarks.compare import OURS
from benchmarks.device import SETS, Record, Run, kernels, main
from benchmarks.goals import figure, judged
from benchmarks.gpu_problems import CUBLAS, CUDNN, FLOATS, Conv, Format, Linear, Problem
from benchmarks.workloads import (
    CONV_BITS,
    GPU_BATCHES,
    GPU_FEATURES,
    GPU_LINEAR_BITS,
    GPU_ROWS,
    LINEAR_BITS,
    ConvLayer,
    conv_layers,
)

COPIED = 1 << 30  # bytes, for the bandwidth


@dataclass
class Group:
    """Layers of a network that are summed up together, each with how often the network has it."""

    name: str
    counts: dict[str, int]  # of Conv.name
    formats: Sequence[Format]

    def summary(self, results: Mapping[str, Mapping[str, Any]], of: Format) -> dict[str, Any] | None:
        """Ratios to the rival, each layer as often as it is there; None before any is measured."""
        found = [
            (entry["seconds"], count, name)
            for name, count in self.counts.items()
            if (entry := results.get(f"{name}-{of.name}")) and {OURS, CUDNN} <= entry.get("seconds", {}).keys()
        ]
        if not found:
            return None
        ratios = {name: seconds[CUDNN] / seconds[OURS] for seconds, _, name in found}
        layers = sum(count for _, count, _ in found)
        mean = exp(sum(count * log(ratios[name]) for _, count, name in found) / layers)
        sums = {who: sum(count * seconds[who] for seconds, count, _ in found) for who in (OURS, CUDNN)}
        worst, best = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        return {
            "layers": layers,
            "of": sum(self.counts.values()),
            "mean": figure(mean),
            "least": figure(ratios[worst]),
            "least_at": worst,
            "most": figure(ratios[best]),
            "most_at": best,
            "seconds": {who: figure(value) for who, value in sums.items()},
        }


@dataclass
class Agenda:
    """What is measured, in this order, and what of it belongs together."""

    problems: dict[Problem, Sequence[Format]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)

    def add(self, problems: Iterable[Problem], formats: Sequence[Format]) -> None:
        """What is there already keeps its place."""
        for problem in problems:
            self.problems.setdefault(problem, formats)

    def add_network(self, name: str, batch: int, layers: Mapping[ConvLayer, int], formats: Sequence[Format]) -> None:
        """Its convolutions, and groups of all of them and of each kernel size."""
        judged = name == "resnet18" and batch == GPU_BATCHES[0]
        convs = {Conv(batch, layer, judged and layer.kernel == 3): count for layer, count in layers.items()}
        known = {problem.name: problem for problem in self.problems}
        convs = {known.get(conv.name, conv): count for conv, count in convs.items()}  # type: ignore[misc]
        self.add(sorted(convs, key=lambda conv: not conv.judged), formats)
        kernels_here = sorted({conv.layer.kernel for conv in convs})
        for kernel in [None, *kernels_here] if len(kernels_here) > 1 else [None]:
            counts = {conv.name: n for conv, n in convs.items() if kernel in (None, conv.layer.kernel)}
            title = f"{name}, batch {batch}" + ("" if kernel is None else f", {kernel} x {kernel}")
            if kernel is None or len(counts) > 1:
                self.groups.append(Group(title, counts, formats))


def agenda(quick: bool) -> Agenda:
    """What has a goal comes first, then the networks by how much they are used."""
    linear_formats = [Format(*bits) for bits in GPU_LINEAR_BITS]
    conv_formats = sorted((Format(*bits) for bits in CONV_BITS), key=lambda f: f != Format(4, 8))
    found = Agenda()
    if quick:
        found.add([Linear(20, 96), Linear(3, 96)], [Format(4, 8), Format(2, 2), Format(1, 1)])
        layers = {ConvLayer(3, 8, 7, 2, 3, 1, 12): 1, ConvLayer(8, 16, 3, 1, 1, 1, 8): 2}
        found.add_network("resnet18", GPU_BATCHES[0] // 128, layers, conv_formats)
        found.add_network("mobilenet_v2", 2, {ConvLayer(16, 16, 3, 1, 1, 16, 8): 1}, [Format(4, 8)])
        return found
    linear = [Linear(rows, GPU_FEATURES) for rows in GPU_ROWS]
    found.add(linear[:2], linear_formats)
    for batch in GPU_BATCHES:
        found.add_network("resnet18", batch, conv_layers("resnet18"), conv_formats)
        found.add(linear, linear_formats)
    for batch in GPU_BATCHES:
        found.add_network("resnet50", batch, conv_layers("resnet50"), conv_formats)
    for batch in GPU_BATCHES:
        depthwise = {layer: n for layer, n in conv_layers("mobilenet_v2").items() if layer.groups > 1}
        found.add_network("mobilenet_v2, depthwise", batch, depthwise, [Format(4, 8), Format(8, 8)])
    return found


class Products(Record):
    """Peaks, linear layers, convolutions."""

    def __init__(self, out: Path, seconds: float, quick: bool) -> None:
        super().__init__(out, seconds, quick)
        self.agenda = agenda(quick)
        self.chip = {"architecture": 90, "multiprocessors": 1}  # of the emulator, where there is no other
        if self.device == "cuda":
            major, minor = torch.cuda.get_device_capability()
            count = torch.cuda.get_device_properties(0).multi_processor_count
            self.chip = {"architecture": 10 * major + minor, "multiprocessors": count}

    def go(self) -> None:
        """Measure everything, what is worth most first."""
        torch.backends.cudnn.benchmark = True
        self.attempt("peaks", self.measure_limits)
        for problem, formats in self.agenda.problems.items():
            rivals: dict[str, float] = {}
            self.attempt(f"{problem.name}, rivals", partial(self.measure_rivals, problem, rivals))
            for of in formats:
                self.attempt(f"{problem.name}-{of.name}", partial(self.measure, problem, of, rivals))

    def measure_limits(self) -> None:
        """The peaks of mma.sync, and the bandwidth of a copy. (That of cuBLAS comes with the first linear layer.)"""
        size = COPIED if self.device == "cuda" else 1 << 16
        source, target = (torch.empty(size // 4, device=self.device).normal_() for _ in range(2))
        self.limits["copy_gbs"] = 2 * size / self.clock.seconds([lambda: target.copy_(source)])[0] / 1e9
        self.limits |= peaks.measure(self.clock, **self.chip)

    def measure_rivals(self, problem: Problem, found: dict[str, float]) -> None:
        """Once a shape: they know no bits."""
        for name, runs in problem.rivals(self.device):
            try:
                seconds = self.timed(f"{problem.name}, {name}", runs)
            except RuntimeError as error:
                self.left_out.append(f"{problem.name}, {name}: {str(error).splitlines()[0]}")
                continue
            if seconds is not None:
                found[name] = seconds
                if name == CUBLAS:
                    rate = problem.operations / seconds / 1e12
                    self.limits["cublas_bf16_tops"] = max(rate, self.limits.get("cublas_bf16_tops", 0.0))

    def measure(self, problem: Problem, of: Format, rivals: Mapping[str, float]) -> None:
        """One product in one format: is it right, how long does it take, and what of it."""
        entry: dict[str, Any] = {
            "family": problem.family,
            "job": problem.job,
            "shape": [*problem.x_shape, problem.outputs],
            "w_bits": of.w_bits,
            "a_bits": of.a_bits,
            "operations": problem.operations,
            "plan": problem.plan(of, **self.chip),
            "seconds": {},
            "host_seconds": {},
            "goals": [],
        }
        self.results[f"{problem.name}-{of.name}"] = entry
        for variant in problem.variants:
            if variant == FLOATS and of not in LINEAR_BITS:
                continue
            ours = OURS if variant == problem.variants[0] else variant
            sets = [problem.operands(of, variant, self.device, seed) for seed in range(SETS)]
            wrong, looked_at = problem.differing(sets[0], problem.run(sets[0]))
            if wrong:
                entry["wrong"] = f"{ours}: {wrong} of {looked_at} outputs are not the reference's"
                return
            runs = [partial(problem.run, o) for o in sets]
            found = self.measured(f"{problem.name}-{of.name}, {ours}", runs)
            if found is None:
                continue
            entry["seconds"][ours], entry["host_seconds"][ours] = map(figure, found)
            if ours == OURS:
                entry["compared"] = looked_at
                if problem.goals(of):
                    self.attempt(f"{problem.name}-{of.name}, kernels", partial(self.look_inside, entry, runs[0]))
                self.judge(entry, problem, of, rivals)

    def look_inside(self, entry: dict[str, Any], run: Run) -> None:
        """Which kernels a call consists of, and how long each takes."""
        entry["kernels"] = kernels(run, self.device)

    def judge(self, entry: dict[str, Any], problem: Problem, of: Format, rivals: Mapping[str, float]) -> None:
        """What the time amounts to: a rate, shares of the limits, goals."""
        entry["seconds"] |= {name: figure(seconds) for name, seconds in rivals.items()}
        ours = entry["seconds"][OURS]
        entry["tops"] = figure(problem.operations / ours / 1e12)
        if "int8_mma_tops" in self.limits:
            entry["limit_seconds"] = figure(problem.operations / self.limits["int8_mma_tops"] / 1e12)
            entry["of_int8_mma"] = figure(entry["limit_seconds"] / ours)
        if problem.family == "matmul":
            moved = of.w_bits * problem.outputs * problem.row_length / 8
            entry["of_copy"] = figure(moved / ours / 1e9 / self.limits["copy_gbs"])
        entry["goals"] = judged(problem.goals(of), entry, self.limits)

    def facts(self) -> Mapping[str, Any]:
        """The networks' sums."""
        return {"groups": self.summaries()}

    def summaries(self) -> dict[str, dict[str, Any]]:
        """Of every group in every format."""
        found = {}
        for group in self.agenda.groups:
            for of in group.formats:
                if (summary := group.summary(self.results, of)) is not None:
                    found[f"{group.name}, {of.name.upper()}"] = summary
        return found

    def lines(self) -> Iterator[str]:
        """A table of the products, one of the networks, and the goals last."""
        yield "limits: " + ", ".join(f"{name} {figure(value):g}" for name, value in self.limits.items())
        for name, entry in self.results.items():
            yield f"{name:<44} {line_of(entry)}"
        for name, s in self.summaries().items():
            least, most = f"{s['least']:.2f} at {s['least_at']}", f"{s['most']:.2f} at {s['most_at']}"
            count = f"{s['layers']} of {s['of']} layers"
            yield f"{name}: {s['mean']:.2f} x {CUDNN} in the mean of {count}, {least}, {most}"
        yield from self.goal_lines()


def line_of(entry: Mapping[str, Any]) -> str:
    """Time, rate, and how many times as fast as the rivals; or what is wrong."""
    if "wrong" in entry:
        return f"WRONG: {entry['wrong']}"
    if OURS not in entry["seconds"]:
        return "not measured"
    ours = entry["seconds"][OURS]
    others = "  ".join(f"{name} {seconds / ours:.2f}x" for name, seconds in entry["seconds"].items() if name != OURS)
    share = f"{100 * entry['of_int8_mma']:>6.1f} % of mma" if "of_int8_mma" in entry else ""
    return f"{1e6 * ours:>10.1f} us{entry['tops']:>9.1f} TOPS{share}  {entry['plan']['engine']:<12}{others}"


if __name__ == "__main__":
    main(Products, __doc__)
