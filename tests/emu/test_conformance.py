"""The emulator's twins of the PTX wrappers: every wrapper has a case, and known answers hold.

`make gpu-check` holds the same program, compiled for the device, against this one.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = next(iter(sorted(ROOT.glob("build/*/emu_conformance"))), None)
NOT_BUILT = pytest.mark.skipif(PROGRAM is None, reason="the emulator is not built (QK_EMU=1)")


def test_every_wrapper_has_a_case() -> None:
    cases = (ROOT / "tests/emu/conformance.cu").read_text()
    headers = [path.read_text() for path in (ROOT / "csrc/cuda/ptx").glob("*.cuh")]
    wrappers = {
        name for text in headers for name in re.findall(r"^__device__ __forceinline__ .*?\b(\w+)\(", text, re.M)
    }
    assert {"cp_async_wait", "store_16"} <= wrappers
    assert [name for name in sorted(wrappers) if not re.search(rf"\bptx::{name}\b", cases)] == []


@NOT_BUILT
def test_the_twins_compute_what_the_device_should() -> None:
    done = subprocess.run([PROGRAM], capture_output=True, text=True, check=True)
    rows = {name: words.split() for name, words in (line.split(":") for line in done.stdout.splitlines())}
    # Inputs begin 0, -0, inf, -inf, NaN, ... (conformance.cu); each is held against input 7 * i + 3.
    assert rows["max_nan"][0] == "00000000" and rows["min_nan"][0] == "ff800000"
    assert rows["max_nan"][4] == rows["min_nan"][4] == "7fffffff"
    assert rows["store_16"][:4] == ["ff800000", "00000000", "7f800000", "80000000"]
    assert all(len(words) == 512 for words in rows.values())
    # No word that a kernel left out: 0xffffffff is no finite conversion's result, nor a half's with its own bits.
    assert "ffffffff" not in rows["half_conversions"] + rows["bfloat16_conversions"]
