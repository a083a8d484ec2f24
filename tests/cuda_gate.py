"""The compile gate: what every CUDA kernel costs on every target, held against tests/resources.json.

    python tests/cuda_gate.py           compile, compare, and look at the SASS; exit status 1 on a failure
    python tests/cuda_gate.py --write   compile, and write the table anew

A new spill, stack frame or byte of local memory fails; so does an element-wise kernel that moves no 16 bytes at a time.
A kernel that the table does not have may not spill at all. More registers than the table has are reported.
QK_CUDA_ARCHS narrows the targets. Without nvcc it says so and succeeds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("resources.json")
TARGETS = ("80", "86", "89", "90a")
FLAGS = ["-std=c++20", f"-I{ROOT / 'csrc'}", "--fmad=false", "-O3", "-Xptxas", "-v", "-cubin"]

# Every traversal of a tensor (csrc/cuda/tile/traverse.cuh), but those by columns whose parameters are too many for a
# thread to have more than one column; and packing from float32, whose four values a lane are 16 bytes.
WIDE = re.compile(
    r"runs_kernel<|columns_kernel<(?!Attention|RangeErrors|LearnedBasis[FT])|pack_kernel<\d, QuantizedCodes<float"
)
NARROW_RESULTS = ("ChannelStats", "ConditionalMean", "RangeErrors", "unsigned char")


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of a kernel."""

    registers: int
    shared: int
    stack: int
    spills: int  # bytes stored and loaded


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its cost, and its machine code where a disassembler was at hand."""

    resources: Resources
    sass: str | None


def tool(name: str) -> str | None:
    """A CUDA tool from PATH, from the toolkit, or from Triton's wheel."""
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    try:
        import triton

        places.append(str(Path(triton.__file__).parent / "backends/nvidia/bin"))
    except ImportError:
        pass
    return shutil.which(name) or next((found for p in places if (found := shutil.which(name, path=p))), None)


def parse_report(report: str) -> dict[str, Resources]:
    """ptxas -v, by mangled name."""
    table = {}
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill "
        r"stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for m in pattern.finditer(report):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        spills = int(m["stores"]) + int(m["loads"])
        table[m["name"]] = Resources(int(m["registers"]), int(shared[1]) if shared else 0, int(m["stack"]), spills)
    return table


def readable(names: list[str]) -> dict[str, str]:
    """Mangled names without namespaces, casts and parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = (re.sub(r"qk::cuda::|qk::|\((?:int|bool|qk::Kind|Kind)\)|^void ", "", line) for line in text.splitlines())
    return {name: re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", line) for name, line in zip(names, short, strict=True)}


def disassemble(cubin: Path) -> dict[str, str]:
    """SASS by mangled name; empty without a disassembler."""
    nvdisasm = tool("nvdisasm")
    if nvdisasm is None:
        return {}
    code = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.section\s+\.text\.(\w+),.*$|^\s*\.text\.(\w+):", code, flags=re.MULTILINE)
    sass: dict[str, str] = {}
    for first, second, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        name = first or second
        sass[name] = sass.get(name, "") + body
    return sass


def compile_family(nvcc: str, source: Path, target: str) -> dict[str, Kernel]:
    """Every kernel of a .cu for one target, by readable name."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        arch = f"-gencode=arch=compute_{target},code=sm_{target}"
        command = [nvcc, *FLAGS, arch, str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile for {target}:\n{done.stderr}")
        sass = disassemble(cubin)
    resources = parse_report(done.stderr)
    names = readable(list(resources))
    return {names[name]: Kernel(cost, sass.get(name)) for name, cost in resources.items()}


def compile_all(nvcc: str, targets: tuple[str, ...]) -> dict[str, dict[str, Kernel]]:
    """Every kernel for every target, by target."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    jobs = [(source, target) for target in targets for source in sources]
    with ThreadPoolExecutor(int(os.environ.get("QK_JOBS", os.cpu_count() or 1))) as pool:
        compiled = list(pool.map(lambda job: compile_family(nvcc, *job), jobs))
    kernels: dict[str, dict[str, Kernel]] = {target: {} for target in targets}
    for (_, target), family in zip(jobs, compiled, strict=True):
        kernels[target].update(family)
    return kernels


def moves_16_bytes(name: str, sass: str) -> bool:
    """Whether a kernel loads 16 bytes at a time, and stores them where what it stores is as wide."""
    loads = re.search(r"\bLDG\.E\.(?:\w+\.)*128", sass)
    stores = re.search(r"\bSTG\.E\.(?:\w+\.)*128", sass)
    return bool(loads) and bool(stores or any(word in name for word in NARROW_RESULTS))


def failures_of(kernels: dict[str, Kernel], known: dict[str, dict[str, int]], target: str) -> list[str]:
    """What breaks the gate on one target."""
    failures = []
    for name, kernel in kernels.items():
        before = Resources(**known.get(name, {"registers": 255, "shared": 0, "stack": 0, "spills": 0}))
        cost = kernel.resources
        if cost.spills > before.spills:
            failures.append(f"{target}: {name} spills {cost.spills} bytes, the table allows {before.spills}")
        if cost.stack > before.stack:
            failures.append(f"{target}: {name} has {cost.stack} bytes of stack, the table allows {before.stack}")
        if kernel.sass is None:
            continue
        if before.stack == 0 and re.search(r"\b(?:LDL|STL)\b", kernel.sass):
            failures.append(f"{target}: {name} uses local memory")
        if WIDE.match(name) and not moves_16_bytes(name, kernel.sass):
            failures.append(f"{target}: {name} does not move 16 bytes at a time")
        failures += [f"{target}: {name} {what}" for what in product_failures(name, kernel.sass)]
    return failures


def product_failures(name: str, sass: str) -> list[str]:
    """What a matrix product on the tensor cores (csrc/cuda/gemm.cuh, peaks.cuh) lacks: its instruction, wide copies."""
    found = re.match(r"(?:gemm_kernel<Tile<\d+, \d+>, |mma_peak_kernel<)(true|false)(?:, (\d+), \w+)?>", name)
    if found is None:
        return []
    bits, copy = found[1] == "true", int(found[2] or 0)
    wanted, other = (r"\bBMMA\.168256\.AND\.POPC\b", r"\bIMMA\b") if bits else (r"\bIMMA\.16832\.U8\.U8\b", r"\bBMMA\b")
    failures = []
    if not re.search(wanted, sass) or re.search(other, sass):
        failures.append(f"multiplies {'bits' if bits else 'bytes'} without the instruction for it")
    if copy == 16 and not re.search(r"\bLDGSTS\.E\.(?:\w+\.)*128\b", sass):
        failures.append("does not copy 16 bytes at a time to shared memory")
    return failures


def notes_of(kernels: dict[str, Kernel], known: dict[str, dict[str, int]], target: str) -> list[str]:
    """What changed without breaking the gate."""
    notes = [f"{target}: {name} is new" for name in kernels.keys() - known.keys()]
    notes += [f"{target}: {name} is gone" for name in known.keys() - kernels.keys()]
    for name in kernels.keys() & known.keys():
        now, before = kernels[name].resources.registers, known[name]["registers"]
        if now > before:
            notes.append(f"{target}: {name} takes {now} registers, {before} before")
    return sorted(notes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table anew")
    write = parser.parse_args().write
    nvcc = tool("nvcc")
    if nvcc is None:
        print("cuda-check: skipped, there is no nvcc")
        return 0
    targets = tuple(os.environ.get("QK_CUDA_ARCHS", ";".join(TARGETS)).split(";"))
    kernels = compile_all(nvcc, targets)
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if write:
        table = {t: {name: asdict(kernel.resources) for name, kernel in sorted(kernels[t].items())} for t in targets}
        lines = ",\n".join(
            f' "{t}": {{\n' + ",\n".join(f"  {json.dumps(n)}: {json.dumps(r)}" for n, r in rows.items()) + "\n }"
            for t, rows in {**known, **table}.items()
        )
        TABLE.write_text(f"{{\n{lines}\n}}\n")
        known = json.loads(TABLE.read_text())
    failures = [line for t in targets for line in failures_of(kernels[t], known.get(t, {}), t)]
    if known:
        for line in (line for t in targets for line in notes_of(kernels[t], known.get(t, {}), t)):
            print("note:", line)
    for line in failures:
        print("FAILED:", line)
    sass = (
        "SASS looked at"
        if all(k.sass for t in targets for k in kernels[t].values())
        else "no disassembler: SASS not seen"
    )
    count = sum(len(rows) for rows in kernels.values())
    print(f"cuda-check: {count} kernels on {', '.join(targets)}; {sass}; {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
