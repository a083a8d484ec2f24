"""What only a GPU can show: ops on the current stream and device, without synchronisation, inside CUDA graphs.

On a machine without one these are one skip; `make gpu-check` runs them where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantkernels.testing import BACKENDS, OPS, Backend, Call, assert_bit_equal, calls

ON_GPU = [b for b in BACKENDS if b.missing is None and b.on_gpu()]
if not ON_GPU:
    pytest.skip("there is no GPU", allow_module_level=True)

IDLE = {"prepack_weight"}  # launches nothing there
CASES = [(b, op) for b in ON_GPU for op in OPS if b.has(op) and op not in IDLE]
SLEEP = 200_000_000  # cycles: some 0.1 s, far longer than any call takes to return


def each_op(test: Any) -> Any:
    return pytest.mark.parametrize("entry, op", CASES, ids=[f"{b}-{op}" for b, op in CASES])(test)


def tensors(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def one_call(op: str) -> Call:
    """The first call: more than one slice, two launches where there is a reduction."""
    return next(calls(op))


def run(entry: Backend, op: str, arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    return tensors(getattr(entry.ops, op)(*arguments))


@each_op
def test_graph_capture(entry: Backend, op: str) -> None:
    """Captured once, replayed on other values of x: what eager gives for them, whatever the launch."""
    for call in calls(op):
        arguments = call.arguments("cuda")
        run(entry, op, arguments)  # compiles Triton's kernels, loads the others
        expected = run(entry, op, arguments)
        held = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        for tensor in held:
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(entry, op, tuple(held))
        for tensor, value in zip(held, arguments, strict=True):
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(value)
        for _ in range(2):
            for result in captured:
                result.fill_(7)
            graph.replay()
            for result, want in zip(captured, expected, strict=True):
                assert_bit_equal(result, want)


@each_op
def test_a_call_does_not_wait_for_the_device(entry: Backend, op: str) -> None:
    arguments = one_call(op).arguments("cuda")
    run(entry, op, arguments)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    asleep = torch.cuda.Event()
    asleep.record()
    run(entry, op, arguments)
    assert not asleep.query(), "the call returned only after the work before it had ended"
    torch.cuda.synchronize()


@each_op
def test_kernels_run_on_the_current_stream(entry: Backend, op: str) -> None:
    """The inputs arrive late on a stream of their own; a kernel on another one would read what was there before."""
    arguments = one_call(op).arguments("cuda")
    expected = run(entry, op, arguments)
    late = [torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        for tensor, value in zip(late, arguments, strict=True):
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(value)
        results = run(entry, op, tuple(late))
    stream.synchronize()
    for result, want in zip(results, expected, strict=True):
        assert_bit_equal(result, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@each_op
def test_kernels_run_on_the_device_of_their_tensors(entry: Backend, op: str) -> None:
    arguments = one_call(op).arguments("cuda:1")
    with torch.cuda.device(0):
        results = run(entry, op, arguments)
        assert torch.cuda.current_device() == 0
    for result, want in zip(results, run(entry, op, one_call(op).arguments("cuda:0")), strict=True):
        assert result.device == torch.device("cuda:1")
        assert_bit_equal(result, want)


# Kernels of one pass over a large tensor: one, and a second one where sums of several blocks are put together.
LAUNCHES = {
    "channel_stats": 2,
    "minmax_grids": 2,
    "conditional_abs_mean": 2,
    "fake_quantize": 1,
    "fake_quantize_backward": 2,
    "fake_quantize_masked": 1,
    "apply_mask": 1,
}
LAUNCHES |= {"attention_quantize": 1, "attention_quantize_backward": 2, "attention_gradient": 2, "encode": 1}
LAUNCHES |= {"minmax_attention_quantize": 3}
NATIVE = [op for op in LAUNCHES if any(b.name == "cuda" and b.has(op) for b in ON_GPU)]


@pytest.mark.parametrize("op", NATIVE)
def test_launches_of_a_pass(op: str) -> None:
    arguments = one_call(op).arguments("cuda")
    function = getattr(torch.ops.quantkernels, op)
    function(*arguments)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function(*arguments)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len([k for k in kernels if "qk::cuda::" in k]) <= LAUNCHES[op], kernels
