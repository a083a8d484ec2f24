"""`make emu-sanitize`: the emulator's tests with the kernels under AddressSanitizer and UBSan, once for each seed.

The sanitized library lives in a build folder of its own. Python itself is not sanitized, so the sanitizer's run-time
library is loaded first and leaks, which would be Python's, are not looked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/emu-sanitize"
SEEDS = ("0", "1", "2")
TESTS = ("tests/emu/test_kernels.py", "tests/emu/test_products.py")

# Takes the emulator from another folder than the package's.
RUN = """
import sys
from pathlib import Path
from quantkernels import _library
_library.LIBRARIES = Path(sys.argv[1])
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def build() -> None:
    options = {
        "Python_EXECUTABLE": sys.executable,
        "QK_OUTPUT_DIR": BUILD / "lib",
        "QK_CUDA": "0",
        "QK_EMU": "1",
        "QK_EMU_SANITIZE": "address,undefined",
    }
    subprocess.run(["cmake", "-S", ROOT, "-B", BUILD, *(f"-D{k}={v}" for k, v in options.items())], check=True)
    jobs = os.environ.get("QK_JOBS", str(os.cpu_count() or 1))
    targets = ["--target", "quantkernels_emu", "emu_planted"]
    subprocess.run(["cmake", "--build", BUILD, "--parallel", jobs, *targets], check=True)


def preloads() -> str:
    """The run-time libraries that must come before everything else; C++'s, so that its exceptions are seen."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    return " ".join(path.strip() for path in found)


def main() -> int:
    build()
    environment = {
        **os.environ,
        "LD_PRELOAD": preloads(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(ROOT),
    }
    for seed in SEEDS:
        print(f"emu-sanitize: seed {seed}", flush=True)
        command = [sys.executable, "-c", RUN, BUILD / "lib", "-q", "-x", *TESTS]
        done = subprocess.run(command, cwd=ROOT, env={**environment, "QK_EMU_SEED": seed})
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
