"""The compile gate's own judgement, on reports made up here; `make cuda-check` runs it on the kernels."""

from __future__ import annotations

import dataclasses

import cuda_gate
import pytest
from cuda_gate import Kernel, Resources

REPORT = """
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '_Z3onePf' for 'sm_90a'
ptxas info    : Function properties for _Z3onePf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 12.3 ms
ptxas info    : Compiling entry function '_Z3twoPf' for 'sm_90a'
ptxas info    : Function properties for _Z3twoPf
    24 bytes stack frame, 36 bytes spill stores, 84 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 24 bytes cumulative stack size
"""
WIDE = "LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;\n STG.E.128 desc[UR4][R2.64], R4 ;"
NAME = "runs_kernel<AttentionForward<float, 4> >"


def test_the_report_of_ptxas_is_read() -> None:
    assert cuda_gate.parse_report(REPORT) == {
        "_Z3onePf": Resources(registers=48, shared=1024, stack=0, spills=0),
        "_Z3twoPf": Resources(registers=64, shared=0, stack=24, spills=120),
    }


def row(kernel: Kernel) -> dict[str, dict[str, int]]:
    return {NAME: dataclasses.asdict(kernel.resources)}


GOOD = Kernel(Resources(48, 0, 0, 0), WIDE)


def test_a_kernel_as_in_the_table_passes() -> None:
    assert cuda_gate.failures_of({NAME: GOOD}, row(GOOD), "90a") == []
    assert cuda_gate.notes_of({NAME: GOOD}, row(GOOD), "90a") == []


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        (Kernel(Resources(48, 0, 0, 8), WIDE), "spills 8 bytes"),
        (Kernel(Resources(48, 0, 16, 0), WIDE), "16 bytes of stack"),
        (Kernel(Resources(48, 0, 0, 0), WIDE + "\n STL [R1], R2 ;"), "uses local memory"),
        (Kernel(Resources(48, 0, 0, 0), WIDE.replace("LDG.E.128", "LDG.E.64")), "does not move 16 bytes"),
        (Kernel(Resources(48, 0, 0, 0), WIDE.replace("STG.E.128", "STG.E")), "does not move 16 bytes"),
    ],
)
def test_a_worse_kernel_fails(kernel: Kernel, complaint: str) -> None:
    (failure,) = cuda_gate.failures_of({NAME: kernel}, row(GOOD), "90a")
    assert failure.startswith(f"90a: {NAME}")
    assert complaint in failure


BYTES, BITS = "gemm_kernel<Tile<4, 128>, false, 16, int>", "gemm_kernel<Tile<4, 128>, true, 16, int>"
IMMA, BMMA = "IMMA.16832.U8.U8 R4, R8.ROW, R2.COL, R4 ;", "BMMA.168256.AND.POPC R4, R8.ROW, R2.COL, R4 ;"
COPY = "LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64], !PT ;"


@pytest.mark.parametrize(
    ("name", "sass", "complaints"),
    [
        (BYTES, IMMA + COPY, []),
        (BITS, BMMA + COPY, []),
        ("finish_kernel", "", []),
        ("mma_peak_kernel<false>", IMMA, []),
        ("mma_peak_kernel<true>", IMMA, ["multiplies bits without"]),
        (BYTES, "IMAD R4, R5, R6, R7 ;" + COPY, ["multiplies bytes without"]),
        (BITS, IMMA + COPY, ["multiplies bits without"]),
        (BITS, BMMA.replace("AND", "XOR"), ["multiplies bits without", "does not copy 16 bytes"]),
        (BYTES.replace("16,", "1,"), IMMA, []),
    ],
)
def test_a_product_without_its_instruction_fails(name: str, sass: str, complaints: list[str]) -> None:
    failures = cuda_gate.failures_of({name: Kernel(Resources(48, 0, 0, 0), sass)}, {}, "90a")
    assert [f"90a: {name} {complaint}" for complaint in complaints] == [
        failure[: len(f"90a: {name} {complaint}")] for failure, complaint in zip(failures, complaints, strict=True)
    ]


def test_a_new_kernel_may_not_spill() -> None:
    assert cuda_gate.failures_of({NAME: Kernel(Resources(48, 0, 0, 8), WIDE)}, {}, "90a")
    assert cuda_gate.notes_of({NAME: GOOD}, {}, "90a") == [f"90a: {NAME} is new"]


def test_register_growth_is_a_note() -> None:
    grown = Kernel(dataclasses.replace(GOOD.resources, registers=56), WIDE)
    assert cuda_gate.failures_of({NAME: grown}, row(GOOD), "90a") == []
    assert cuda_gate.notes_of({NAME: grown}, row(GOOD), "90a") == [f"90a: {NAME} takes 56 registers, 48 before"]
