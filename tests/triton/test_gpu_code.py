"""The Triton kernels as GPU code, without a GPU: what the interpreter cannot show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytest.importorskip("triton")


@pytest.fixture(scope="module", params=[80, 90])
def ptx(request, tmp_path_factory) -> dict[str, str]:
    """PTX of every kernel for one compute capability."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    script = str(Path(__file__).parent / "compile_kernels.py")
    command = [sys.executable, script, str(request.param)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def instructions(ptx: dict[str, str], pattern: str) -> dict[str, list[str]]:
    """The instructions of each kernel that match."""
    found = {name: re.findall(rf"^\s*(?:@%p\d+ )?({pattern})\s", text, re.MULTILINE) for name, text in ptx.items()}
    return {name: names for name, names in found.items() if names}


def test_every_float_operation_rounds_as_everywhere_else(ptx):
    """No contraction, no flush to zero, no approximate division: each would break bit-equality."""
    assert len(ptx) > 20
    assert instructions(ptx, r"fma\.\S*|mad\.\S*f32\S*") == {}
    assert instructions(ptx, r"\S*\.ftz\S*") == {}
    assert instructions(ptx, r"(?:div|rcp|sqrt)\.(?:approx|full)\S*") == {}


def test_no_local_memory_and_wide_accesses(ptx):
    assert instructions(ptx, r"(?:ld|st)\.local\S*") == {}
    wide = instructions(ptx, r"ld\.global\S*v4\.b32")
    assert {name for name in ptx if name.endswith("-runs")} <= set(wide)


def test_matrix_products_use_the_integer_tensor_cores(ptx):
    assert set(instructions(ptx, r"w?g?mma\.\S*s32\.s8\.s8\S*")) == {n for n in ptx if n.startswith("linear")}
