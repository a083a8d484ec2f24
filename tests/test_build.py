"""What the build made, what import does, and what build_info tells."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantkernels as qk

ROOT = Path(__file__).parent.parent
LIBRARIES = Path(qk.__file__).parent / "_lib"


def test_build_info_is_plain_values():
    info = qk.build_info()
    assert info["cpu_isa"] in ("avx512", "zen4", "avx2", "portable")
    assert info["torch"] == torch.__version__
    assert tuple(map(int, info["torch_target"].split("."))) >= (2, 10)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", info["version"])
    assert isinstance(info["cuda"], str) and isinstance(info["cuda_build"], str)
    assert all(re.fullmatch(r"\d+a?", target) for target in info["cuda_archs"])
    assert (info["cuda"] == "not built") == (not info["cuda_archs"])


def test_import_prints_nothing_and_touches_no_gpu():
    code = "import quantkernels, torch; assert not torch.cuda.is_initialized()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.parametrize("library", sorted(LIBRARIES.glob("quantkernels_*.so")), ids=lambda path: path.stem)
def test_libraries_need_torch_by_its_stable_abi_alone(library):
    """No C++ symbol of torch may be undefined, or the library would serve one version of torch only."""
    listing = subprocess.run(
        ["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    unstable = re.findall(r"^\s+U ((?:at|c10|torch)::.*)$", listing, re.MULTILINE)
    assert unstable == []
    assert "aoti_torch_" in listing or "torch_call_dispatcher" in listing


def configure(folder: Path, *options: str, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    """Run CMake's configuration with a PATH that has no nvcc."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    definitions = [f"-DPython_EXECUTABLE={sys.executable}", f"-DQK_OUTPUT_DIR={folder}", *options]
    command = [cmake, "-S", str(ROOT), "-B", str(folder / "build"), *definitions]
    return subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, timeout=300)


def test_cuda_is_left_out_on_request(tmp_path):
    result = configure(tmp_path, "-DQK_CUDA=0")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "CPU library for" in line]
    assert "left out (QK_CUDA=0)" in line


@pytest.mark.skipif(Path("/usr/local/cuda/bin/nvcc").exists(), reason="CMake would find nvcc in its usual place")
def test_a_missing_nvcc_is_an_error_only_if_cuda_was_asked_for(tmp_path):
    asked = configure(tmp_path / "asked", "-DQK_CUDA=1")
    assert asked.returncode != 0 and "QK_CUDA=1, but nvcc was not found" in asked.stderr
    automatic = configure(tmp_path / "automatic", "-DQK_CUDA=auto")
    assert automatic.returncode == 0 and "no nvcc found" in automatic.stdout
