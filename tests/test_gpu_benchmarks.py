"""The benchmarks of a GPU without one: what they measure, that they find mistakes, and what they say at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import gpu_networks, gpu_products, peaks
from benchmarks.compare import OURS
from benchmarks.device import Clock, Record
from benchmarks.goals import AtMost, Faster, OfPeak
from benchmarks.gpu_networks import differing_layers
from benchmarks.gpu_problems import CODES, CUDNN, Conv, Format, Linear, Operands
from benchmarks.workloads import GPU_BATCHES, GPU_ROWS, RESNET18, ConvLayer, conv_layers
from quantkernels.nn import PackedLayer

EMULATED = pytest.mark.skipif(peaks.library("cpu") is None, reason="the emulator is not built (QK_EMU=1)")
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
LAYER = ConvLayer(6, 9, 3, 2, 1, 1, 7)
DEPTHWISE = ConvLayer(10, 10, 3, 1, 1, 10, 5)


@EMULATED
@pytest.mark.parametrize("bits", [False, True])
def test_peaks_multiply_what_they_say(bits: bool) -> None:
    words = peaks.operands("cpu", seed=3)
    for rounds, blocks in ((1, 1), (5, 2)):
        operations, sums = peaks.launch(bits, words, rounds, blocks)
        warps = sums.long().reshape(-1, 32).sum(1) % 2**32
        assert set(warps.tolist()) == {rounds * peaks.expected_sum(bits, words) % 2**32}
        products = 16 * peaks.FRAGMENTS[0] * 8 * peaks.FRAGMENTS[1] * (256 if bits else 32)
        assert operations == 2 * products * rounds * len(warps)


@EMULATED
def test_peak_whose_sums_are_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "expected_sum", lambda bits, words: 1)
    with pytest.raises(RuntimeError, match="are wrong"):
        peaks.peak(False, Clock("cpu", True), 1)


def test_a_peak_is_measured_over_a_call_that_is_long_enough() -> None:
    calls: list[int] = []

    def timed(rounds: int) -> tuple[float, float]:
        calls.append(rounds)
        return 7.0 * rounds, 1e-5 + 1e-6 * rounds

    assert peaks.calibrated(timed, 1e-3) == pytest.approx(7e6, rel=0.02)
    assert calls[0] == 1 and len(calls) < 12


def test_layers_are_those_of_the_networks() -> None:
    """ResNet-18's agree with the list that the CPU's benchmarks have; ResNet-50 has 53 convolutions."""
    found = conv_layers("resnet18")
    small = {layer: count for layer, count in found.items() if layer.inputs > 3}
    assert {(layer[:4], layer.image) for layer in small} == {(known[:4], known[4]) for known in RESNET18.values()}
    assert sum(found.values()) == 20 and sum(conv_layers("resnet50").values()) == 53
    # 1.8 and 4.1 billion multiply-adds, as the literature counts them.
    for name, least, most in (("resnet18", 1.78e9, 1.83e9), ("resnet50", 4.05e9, 4.15e9)):
        assert least < sum(n * layer.operations(1) for layer, n in conv_layers(name).items()) / 2 < most
    assert {layer.groups for layer in conv_layers("mobilenet_v2") if layer.groups > 1} >= {32, 960}


def test_the_agenda_begins_with_what_has_a_goal() -> None:
    agenda = gpu_products.agenda(quick=False)
    problems = list(agenda.problems)
    assert problems[:2] == [Linear(8192, 8192), Linear(1, 8192)]
    goals = {
        f"{problem.name}-{of.name}": goal
        for problem, formats in agenda.problems.items()
        for of in formats
        for goal in problem.goals(of)
    }
    assert goals.pop("linear-m8192-w8a8") == goals.pop("linear-m8192-w4a8") == OfPeak(0.55)
    assert goals.pop("linear-m1-w4a8") == AtMost(25e-6)
    assert len(goals) == 7 and set(goals.values()) == {Faster(CUDNN, 1.3)}
    assert all("-k3-" in name and name.endswith("-b256-w4a8") for name in goals)
    judged = [i for i, problem in enumerate(problems) if problem.judged]
    assert judged == list(range(2, 9))
    assert {p.rows for p in problems if isinstance(p, Linear)} == set(GPU_ROWS)
    names = [problem.name for problem in problems]
    assert len(set(names)) == len(names)
    for group in agenda.groups:
        assert set(group.counts) <= set(names), group.name
    everything = {group.name: sum(group.counts.values()) for group in agenda.groups}
    for batch in GPU_BATCHES:
        assert everything[f"resnet18, batch {batch}"] == 20 and everything[f"resnet50, batch {batch}"] == 53
        assert everything[f"resnet50, batch {batch}, 3 x 3"] == 16


PROBLEMS = [Linear(7, 40), Linear(33, 64), Conv(2, LAYER), Conv(2, DEPTHWISE)]


@pytest.mark.parametrize("of", [Format(4, 8), Format(2, 2), Format(1, 1)], ids=lambda of: of.name)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_results_are_compared_and_mistakes_found(problem: Any, of: Format) -> None:
    for variant in problem.variants:
        operands = problem.operands(of, variant, "cpu", seed=1)
        out = problem.run(operands)
        wrong, looked_at = problem.differing(operands, out)
        assert wrong == 0 and looked_at >= 8
        if variant == CODES:
            share = torch.bincount(out.flatten().long(), minlength=2**of.a_bits) / out.numel()
            assert share.max() < 0.8, "codes that tell nothing"
        out[-1, -1] = out[-1, -1] + 1  # the last ones are always among those looked at
        assert problem.differing(operands, out)[0] > 0


def test_weights_of_one_bit_are_plus_and_minus() -> None:
    operands = Linear(3, 32).operands(Format(1, 1), OURS, "cpu", seed=0)
    assert isinstance(operands, Operands)
    grid, _, levels = operands.activation
    assert levels == 1 and grid[0, :2].tolist() == [-1.0, 2.0]
    _, w_grid, _, w_levels = operands.weight
    assert w_levels == 1 and torch.allclose(w_grid[:, 0], -w_grid[:, 1] / 2)


class Wrong(Linear):
    """A layer whose op is off by one."""

    def run(self, o: Operands) -> torch.Tensor:
        """Everything is one too much."""
        return super().run(o) + 1


class Broken(Linear):
    """A layer whose op fails."""

    def run(self, o: Operands) -> torch.Tensor:
        """As a launch that went wrong."""
        raise RuntimeError("launch failed")


@CPU_ONLY
def test_what_is_wrong_gets_no_time_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    agenda = gpu_products.Agenda()
    agenda.add([Wrong(3, 32), Broken(4, 32), Linear(5, 32)], [Format(4, 8)])
    monkeypatch.setattr(gpu_products, "agenda", lambda quick: agenda)
    run = gpu_products.Products(tmp_path / "out.json", 60.0, True)
    run.go()
    assert not run.passed
    assert "not the reference's" in run.results["linear-m3-w4a8"]["wrong"]
    assert run.results["linear-m3-w4a8"]["seconds"] == {}
    assert "launch failed" in run.results["linear-m4-w4a8"]["wrong"]
    assert run.results["linear-m5-w4a8"]["seconds"][OURS] > 0
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["results"].keys() >= run.results.keys() and kept["device"] == "cpu"
    assert sum("WRONG" in line for line in run.lines()) == 2


@CPU_ONLY
def test_a_run_without_time_says_what_it_left_out(tmp_path: Path) -> None:
    run = gpu_products.Products(tmp_path / "out.json", -1.0, True)
    run.go()
    run.save()
    assert run.results == {} and len(run.left_out) > 10
    assert all(what.endswith("no time left") for what in run.left_out)
    assert json.loads((tmp_path / "out.json").read_text())["left_out"] == run.left_out


class OnTheCpu(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*map(there, args), **{name: there(value) for name, value in (kwargs or {}).items()})


def there(value: Any) -> Any:
    """The CPU for a GPU; anything else as it is."""
    return "cpu" if isinstance(value, (str, torch.device)) and str(value) == "cuda" else value


class StubEvent:
    """An event on the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = perf_counter()

    def elapsed_time(self, end: StubEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def stubbed_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As much of a GPU as the benchmarks use, with nothing behind it."""
    chip = SimpleNamespace(L2_cache_size=1 << 10, multi_processor_count=2)
    stream = SimpleNamespace(wait_stream=lambda other: None, cuda_stream=0)
    generator, autocast = torch.Generator, torch.autocast

    class Generator(generator):  # a class: modules that are imported late have it in their annotations
        def __new__(cls, device: Any) -> Any:
            return generator(there(device))

    kernel = SimpleNamespace(name="kernel", device_type=torch.autograd.DeviceType.CUDA)
    kernel.time_range = SimpleNamespace(elapsed_us=lambda: 1.0)
    profile = SimpleNamespace(events=lambda: [kernel])
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", lambda device, dtype: autocast(there(device), dtype))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: nullcontext(profile))
    emulator = peaks.library("cpu")
    monkeypatch.setattr(peaks, "library", lambda device: emulator)
    stubs = {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "Event": StubEvent,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": nullcontext,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": nullcontext,
        "get_device_properties": lambda index: chip,
        "get_device_capability": lambda: (9, 0),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    with OnTheCpu():
        yield


@CPU_ONLY
@pytest.mark.parametrize("kind", [gpu_products.Products, gpu_networks.Networks])
def test_what_runs_only_on_a_gpu(
    kind: type[Record], stubbed_cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events, graphs and the profiler are called as they want to be; what they would say is not looked at."""
    for problem in (Linear, Conv):
        monkeypatch.setattr(problem, "goals", lambda self, of: [AtMost(1.0), OfPeak(0.5)] if of.w_bits == 1 else [])
    monkeypatch.setattr(gpu_products, "COPIED", 1 << 12)
    run = kind(tmp_path / "out.json", 120.0, True)
    assert run.device == "cuda"
    run.go()
    assert run.passed, [entry for entry in run.results.values() if "wrong" in entry]
    assert run.left_out == [] and all(entry["seconds"][OURS] > 0 for entry in run.results.values())
    assert list(run.lines())


def test_networks_are_summed_up() -> None:
    entries = {
        "a-w4a8": {"seconds": {OURS: 1.0, CUDNN: 4.0}},
        "b-w4a8": {"seconds": {OURS: 2.0, CUDNN: 2.0}},
        "c-w4a8": {"wrong": "all of it", "seconds": {}},
    }
    group = gpu_products.Group("net", {"a": 3, "b": 1, "c": 1}, [Format(4, 8)])
    summary = group.summary(entries, Format(4, 8))
    assert summary is not None
    assert summary["mean"] == pytest.approx(4**0.75, rel=1e-3)
    assert (summary["layers"], summary["of"]) == (4, 5)
    assert (summary["least"], summary["least_at"], summary["most"], summary["most_at"]) == (1.0, "b", 4.0, "a")
    assert summary["seconds"] == {OURS: 5.0, CUDNN: 14.0}
    assert group.summary(entries, Format(8, 8)) is None


class Said(Record):
    """Measures nothing."""

    def go(self) -> None:
        """Nothing."""

    def lines(self) -> Iterator[str]:
        """None."""
        return iter(())


def test_goals_are_said_at_the_end() -> None:
    record = Said.__new__(Said)
    met = {"goal": OfPeak(0.55).text, "value": 60.0, "met": True}
    missed = {"goal": AtMost(25e-6).text, "value": 30.0, "met": False}
    record.results = {"one": {"goals": [met]}, "two": {"goals": [missed]}, "three": {}}
    assert list(record.goal_lines()) == ["goal: one: ≥ 55 % of peak: 60, met", "goal: two: ≤ 25 us: 30, NOT MET"]
    assert OfPeak(0.55).judge({"seconds": {OURS: 1.0}}, {}) is None
    assert AtMost(25e-6).judge({"seconds": {OURS: 20e-6}}, {}) == (pytest.approx(20.0), True)


def test_packed_layers_are_held_against_the_cpu() -> None:
    from benchmarks.contestants import packed_resnet

    model = packed_resnet(2, 2, 0.125).to(torch.bfloat16).to(memory_format=torch.channels_last)
    image = torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)
    assert differing_layers(model, image) == (0, 19)
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLayer)]
    layers[3].register_forward_pre_hook(lambda layer, inputs: None)
    layers[3].register_forward_hook(lambda layer, inputs, output: output + 1)
    assert differing_layers(model, image) == (1, 19)
