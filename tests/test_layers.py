"""Arrows point down only (docs/architecture.md): read from the imports and includes of the sources themselves."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each part of the package may import of it; its own modules, torch and the standard library always.
MAY_IMPORT = {
    "quantkernels._library": {"quantkernels._lib"},
    "quantkernels.ops": {"quantkernels._library"},
    "quantkernels.triton": {"quantkernels.ops"},
    "quantkernels.emu": {"quantkernels._library", "quantkernels.ops"},
    "quantkernels.quantizers": {"quantkernels.ops"},
    "quantkernels.nn": {"quantkernels.ops", "quantkernels.quantizers"},
    # convert.py and the modules beside it that it is made of
    "quantkernels.convert": {"quantkernels.ops", "quantkernels.quantizers", "quantkernels.nn"},
    "quantkernels.reference": set(),
    "quantkernels.testing": {"quantkernels.ops", "quantkernels.reference"},
}
FACADE = "quantkernels"
# The facade shows everything but what exists for tests.
MAY_IMPORT[FACADE] = set(MAY_IMPORT) - {
    "quantkernels.reference",
    "quantkernels.testing",
    "quantkernels.triton",
    "quantkernels.emu",
}
PUBLIC = {"quantkernels", "quantkernels.nn", "quantkernels.ops"}

MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "emu": {"core", "cuda", "emu"},
    "ops": {"core", "cpu", "cuda", "emu", "ops"},
    "python": {"core", "cpu", "cuda", "python"},
}
TORCH_HEADER = re.compile(r"(torch|ATen|c10|caffe2)/")
CUDA_HEADER = re.compile(r"(cuda|cub|cooperative_groups|mma\.h|nv)")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]', re.MULTILINE)
# Inline assembly; an empty one tells the compiler something and is no instruction.
ASSEMBLY = re.compile(r"\b(?:asm|__asm__)\b\s*(?:volatile|__volatile__)?\s*\(\s*(?!\"\"\s*[:)])")
CXX = {".h", ".cpp", ".cu", ".cuh"}


def modules(root: Path, package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name: str, path: Path) -> Iterator[str]:
    """Absolute names of all modules and members that the file imports, inside functions too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def part_of(root: Path, module: str) -> str:
    """The part of the package that a module or member belongs to."""
    fitting = [p for p in (*MAY_IMPORT, "quantkernels._lib") if (module + ".").startswith(p + ".")]
    part = max(fitting, key=len)
    if part == FACADE and "." in module and (root / "quantkernels" / f"{module.split('.')[1]}.py").exists():
        return "quantkernels.convert"
    return part


def python_violations(root: Path) -> list[str]:
    found = []
    for name, path in modules(root, "quantkernels"):
        part = part_of(root, name)
        for target in imports(name, path):
            if target.split(".")[0] in ("training", "tests", "benchmarks"):
                found.append(f"{name} imports {target}")
            elif target.split(".")[0] == "quantkernels":
                goal = part_of(root, target)
                if goal != part and goal not in MAY_IMPORT[part]:
                    found.append(f"{name} imports {target}")
            elif part == "quantkernels.reference" and target.split(".")[0] not in (
                "torch",
                "collections",
                "__future__",
            ):
                found.append(f"{name} imports {target}")
    return found


def training_violations(root: Path) -> list[str]:
    """Uses of quantkernels other than of public names: by import, or by attribute of an imported module."""
    found = []
    for name, path in modules(root, "training"):
        uses = [use for use in imports(name, path) if use.split(".")[0] == "quantkernels"]
        aliases = {}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "quantkernels":
                        aliases[alias.asname or "quantkernels"] = alias.name if alias.asname else "quantkernels"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                chain = dotted(node)
                if chain and chain[0] in aliases:
                    uses.append(".".join([aliases[chain[0]], *chain[1:]]))
        found += [f"{name} uses {use}" for use in sorted(set(uses)) if not is_public(use)]
    return found


def dotted(node: ast.expr) -> list[str]:
    """The names of a.b.c; nothing for an attribute of anything else (a call, an item)."""
    if isinstance(node, ast.Name):
        return [node.id]
    before = dotted(node.value) if isinstance(node, ast.Attribute) else []
    return [*before, node.attr] if before else []


def is_public(use: str) -> bool:
    """Whether a dotted name is a public module, or begins with a name that one of them exports."""
    parts = use.split(".")
    if any(part.startswith("_") and part not in ("__version__", "__name__") for part in parts):
        return False
    if use in PUBLIC:
        return True
    module = max((p for p in PUBLIC if use.startswith(p + ".")), key=len)
    member = use[len(module) + 1 :].split(".")[0]
    return member in importlib.import_module(module).__all__


def include_violations(root: Path) -> list[str]:
    found = []
    for path in sorted(p for p in (root / "csrc").rglob("*") if p.suffix in CXX):
        name, text = str(path.relative_to(root)), path.read_text()
        part = path.relative_to(root / "csrc").parts[0]
        for bracket, header in INCLUDE.findall(text):
            if TORCH_HEADER.match(header):
                allowed = part == "ops"
            elif bracket == '"':
                allowed = header.split("/")[0] in MAY_INCLUDE[part]
            else:
                allowed = not CUDA_HEADER.match(header) or part in ("cuda", "emu", "ops")
            if not allowed:
                found.append(f"{name} includes {header}")
        code = re.sub(r"//.*", "", text)
        if ASSEMBLY.search(code) and not name.startswith("csrc/cuda/ptx/"):
            found.append(f"{name} has inline assembly")
    return found


@pytest.mark.parametrize("violations", [python_violations, training_violations, include_violations])
def test_no_arrow_runs_up(violations):
    assert violations(ROOT) == []


def test_every_part_is_looked_at():
    parts = {part_of(ROOT, name) for name, _ in modules(ROOT, "quantkernels")}
    assert {"quantkernels.ops", "quantkernels.nn", "quantkernels.quantizers", "quantkernels.reference"} <= parts
    assert len(list((ROOT / "csrc" / "ops").glob("*.h"))) > 3


PLANTED = {
    "quantkernels/ops/bad.py": ("from ..nn import QConv2d\n", "quantkernels.ops.bad imports quantkernels.nn.QConv2d"),
    "quantkernels/ops/late.py": (
        "def f():\n    import quantkernels.quantizers\n",
        "quantkernels.ops.late imports quantkernels.quantizers",
    ),
    "quantkernels/nn/bad.py": ("from .. import convert\n", "quantkernels.nn.bad imports quantkernels.convert"),
    "quantkernels/reference/bad.py": ("import numpy\n", "quantkernels.reference.bad imports numpy"),
    "quantkernels/reference/worse.py": (
        "from ..ops import fake_quantize\n",
        "quantkernels.reference.worse imports quantkernels.ops.fake_quantize",
    ),
    "quantkernels/quantizers/bad.py": ("import training.cli\n", "quantkernels.quantizers.bad imports training.cli"),
    "training/bad.py": (
        "import quantkernels as qk\nfrom quantkernels.ops import _dispatch\nqk.ops._register.rules\nqk.build_info()\n",
        "training.bad uses quantkernels.ops._dispatch",
    ),
    "training/worse.py": (
        "from quantkernels.reference import encode\n",
        "training.worse uses quantkernels.reference.encode",
    ),
    "csrc/core/bad.h": ('#include "cpu/simd.h"\n', "csrc/core/bad.h includes cpu/simd.h"),
    "csrc/core/chip.h": ("#include <cuda_runtime.h>\n", "csrc/core/chip.h includes cuda_runtime.h"),
    "csrc/cpu/bad.cpp": (
        "#include <torch/csrc/stable/tensor.h>\n",
        "csrc/cpu/bad.cpp includes torch/csrc/stable/tensor.h",
    ),
    "csrc/cuda/bad.cuh": (
        '__device__ void f() { asm volatile("bar.sync 0;"); }\n',
        "csrc/cuda/bad.cuh has inline assembly",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found(tmp_path, name):
    text, message = PLANTED[name]
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(text)
    found = python_violations(tmp_path) + training_violations(tmp_path) + include_violations(tmp_path)
    assert message in found


def test_what_is_allowed_is_not_found(tmp_path):
    allowed = {
        "quantkernels/nn/good.py": "from ..ops import fake_quantize\nfrom ..quantizers import MinMax\nimport torch\n",
        "training/good.py": "import quantkernels as qk\nfrom quantkernels.nn import QConv2d\nqk.ops.fake_quantize\n",
        "training/better.py": "import quantkernels\nquantkernels.build_info().items()\n",
        "csrc/ops/good.h": '#include <torch/csrc/stable/ops.h>\n#include "core/args.h"\n',
        "csrc/cuda/ptx/copy.cuh": '__device__ void f() { asm volatile("cp.async.wait_all;"); }\n',
        "csrc/cpu/good.cpp": '#include "core/args.h"\n// asm("nothing")\n',
        "csrc/cpu/barrier.cpp": 'void f() { asm volatile("" : : : "memory"); }\n',
    }
    for name, text in allowed.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert python_violations(tmp_path) + training_violations(tmp_path) + include_violations(tmp_path) == []
