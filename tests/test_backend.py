"""Choosing a backend, what each has, and that one never stands in for another unasked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import quantkernels as qk
from quantkernels import ops
from quantkernels.testing import BACKENDS, Problem

ROOT = Path(__file__).parent.parent
ALL_OPS = sorted(
    name.removeprefix("quantkernels::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("quantkernels::")
)
GRID = torch.tensor([[-1.0, 0.5, 0.0]])


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, without the interpreter of Triton unless asked for."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("entry", BACKENDS, ids=str)
def test_backend_runs_here_with_every_op(entry):
    if entry.missing:
        pytest.skip(f"{entry}: {entry.missing}")
    lacking = [op for op in ALL_OPS if not entry.has(op)]
    if entry.name == "cpu":
        assert lacking == []
    if lacking:
        pytest.skip(f"{entry} runs, without {', '.join(lacking)}")


def test_backend_is_told_and_chosen():
    assert qk.backend() == "native"
    with qk.backend("triton") as name:
        assert name == qk.backend() == "triton"
        with qk.backend("native"):
            assert qk.backend() == "native"
        assert qk.backend() == "triton"
    assert qk.backend() == "native"
    choice = qk.backend("triton")
    assert qk.backend() == "triton"
    choice.__exit__()
    assert qk.backend() == "native"


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"name must be one of native, triton.*, got 'tpu'"):
        qk.backend("tpu")
    assert qk.backend() == "native"


def test_a_missing_triton_is_one_sentence():
    code = "import sys; sys.modules['triton'] = None\nimport quantkernels as qk\nqk.backend('triton')"
    assert "RuntimeError: quantkernels.backend: the triton backend needs the package triton" in python(code).stderr


def test_triton_without_gpu_and_interpreter_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    # Three ways to a kernel: with a gradient's rules, with a mask, and as one node with statistics.
    code = """
import torch, quantkernels as qk
x, grid = torch.zeros(3), torch.zeros(1, 3)
learning, weights = torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)
with qk.backend('triton'):
    for call in (
        lambda: qk.ops.fake_quantize(x, grid, 0, 3),
        lambda: qk.ops.fake_quantize(learning, grid, 0, 3, qk.ops.Ste.CLIP),
        lambda: qk.ops.minmax_mixture(learning, weights, torch.ones(()), [3, 15]),
    ):
        try:
            call()
        except NotImplementedError as error:
            print(error)
"""
    sentences = python(code).stdout.splitlines()
    names = ("fake_quantize", "fake_quantize_masked", "minmax_attention_quantize")
    assert len(sentences) == len(names)
    for name, sentence in zip(names, sentences, strict=True):
        assert sentence.startswith(f"quantkernels.{name}: the triton backend has no kernel for cpu tensors here")
        assert "TRITON_INTERPRET=1" in sentence


def test_an_op_that_a_backend_lacks_is_one_sentence():
    with qk.backend("triton"), pytest.raises(NotImplementedError, match="the triton backend does not have this op"):
        ops.pack_bitplanes(torch.zeros(1, 32, dtype=torch.uint8), 0, 1)


def test_meta_tensors_need_no_kernel():
    q = ops.fake_quantize(torch.empty(3, 4, device="meta"), torch.empty(1, 3, device="meta"), 0, 3)
    assert q.is_meta and q.shape == (3, 4)


class Calls(TorchDispatchMode):
    """Records the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.ops("fake_quantize_backward", "apply_mask", "attention_quantize_backward")
def test_the_backward_pass_runs_where_the_forward_ran(backend):
    x = torch.randn(40, device=backend.device, requires_grad=True)
    grid = GRID.to(backend.device)
    with backend.chosen():
        q = sum(ops.fake_quantize(x, grid, ops.Kind.UNIFORM, 3, ste) for ste in (ops.Ste.CLIP, ops.Ste.FULL))
        ones = torch.ones(1, device=backend.device)
        mixed = ops.attention_quantize(x, ones, grid[None], [0], [3], [ops.Ste.CLIP])
    namespace = ops._dispatch.NAMESPACES[backend.choice]
    with Calls() as calls:
        torch.autograd.grad((q + mixed).sum(), x)
    for op in ("apply_mask", "fake_quantize_backward", "attention_quantize_backward"):
        assert f"{namespace}.{op}.default" in calls.names
    assert all(name.startswith((f"{namespace}.", "aten.")) for name in calls.names)


@pytest.mark.ops("fake_quantize")
def test_schemas_are_those_of_the_native_ops(backend):
    for op in ALL_OPS:
        if backend.has(op):
            native = str(getattr(torch.ops.quantkernels, op).default._schema)
            own = str(getattr(backend.ops, op).default._schema)
            assert own.split("::")[1] == native.split("::")[1]


@pytest.mark.ops("fake_quantize")
def test_memory_allocated_inside_an_op_is_poisoned_in_tests(backend):
    """tests/ops relies on this: native code allocates small results by torch's dispatcher, so the fill reaches it."""
    x, grid = torch.zeros(1000, device=backend.device), GRID.to(backend.device)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            backend.ops.fake_quantize(x, grid, 0, 3, 0, None)
    finally:
        torch.use_deterministic_algorithms(False)
    (op,) = [e for e in profile.events() if e.name.endswith("::fake_quantize")]
    inside = [e.name for e in profile.events() if op.time_range.start <= e.time_range.start <= op.time_range.end]
    assert "aten::new_empty" in inside and "aten::fill_" in inside


RANKS = {"portable": 0, "avx2": 1, "zen4": 2, "avx512": 2}


@pytest.mark.parametrize("isa", ["avx512", "zen4", "avx2", "portable"])
def test_other_instruction_sets_give_the_same_bits(isa):
    """One compact run of the op tests on the CPU kernels of another instruction set that this processor has."""
    own = qk.build_info()["cpu_isa"]
    if isa == own or RANKS[isa] > RANKS[own]:
        pytest.skip(f"this processor's best is {own}: the other tests run on it")
    told = python("import quantkernels as qk; print(qk.build_info()['cpu_isa'])", QK_CPU_ISA=isa)
    assert told.stdout.strip() == isa
    chosen = "cpu and not opcheck and not complaints and not same_bits"
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "tests/ops", "-k", chosen]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env=os.environ | {"QK_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_problems_are_the_same_on_every_run():
    code = (
        "from quantkernels.testing import Problem\n"
        "p = Problem((5, 7), axis=0, special=True); print(p.x().nan_to_num(9).tolist(), p.grid().tolist())"
    )
    p = Problem((5, 7), axis=0, special=True)
    assert python(code).stdout.strip() == f"{p.x().nan_to_num(9).tolist()} {p.grid().tolist()}"
