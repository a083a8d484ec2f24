"""`make gpu-check`: everything that needs a GPU, with the machine's own Python and nothing fetched.

    python tests/gpu/check.py --part build+tests --out DIR    build for this GPU, op tests, PTX conformance, graphs
    python tests/gpu/check.py --part sanitize --out DIR       compute-sanitizer over a small set of every kernel
    python tests/gpu/check.py --part bench --out DIR          all of the benchmarks, each a share of the time
    python tests/gpu/check.py --part bench-products --out DIR one of them: low-bit products against cuBLAS and cuDNN
    python tests/gpu/check.py --part bench-networks --out DIR one of them: ResNet-18, packed and in training
    python tests/gpu/check.py --part bench-elementwise --out DIR  one of them: quantizers against copy bandwidth

Each part ends within `--limit` seconds (480) and writes gpu-check-<part>.json and .log into DIR; what did not fit is
said to have timed out. Exit status: 0 all passed, 1 something failed, 2 something that it needs is missing.
--dry-run goes through the same motions on the CPU backend, to try this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FORMAT = 1
BENCHMARKS = {"products": "gpu_products", "networks": "gpu_networks", "elementwise": "gpu"}  # worth most first
PARTS = ("build+tests", "sanitize", "bench", *(f"bench-{name}" for name in BENCHMARKS))
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Folders of the op tests come first: they take longest.
TESTS = ("tests/ops/test_*.py", "tests/gpu/test_*.py", "tests/nn/test_backends.py", "tests/quantizers/test_encode.py")
MODULES = ("torch", "setuptools", "pybind11", "pytest", "numpy", "safetensors")
ENDING = 30  # seconds that a benchmark may take to end what it began, and to start
TABLE = 40  # lines of its table that are shown; the log has all
NO_TESTS = 5  # pytest's exit status where a file has none for the backend
FAILED = ("failed", "missing", "timed out")


@dataclass
class Step:
    """One thing that was done: "passed", "failed", "skipped", "missing" or "timed out"."""

    name: str
    status: str = "passed"
    seconds: float = 0.0
    detail: dict[str, Any] = field(default_factory=dict)


class Check:
    """A run of one part: its steps, its log, and how much of its time is left."""

    def __init__(self, part: str, out: Path, limit: float, dry_run: bool) -> None:
        self.part, self.dry_run = part, dry_run
        self.start = time.monotonic()
        self.limit = limit
        self.steps: list[Step] = []
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / f"gpu-check-{part.replace('+', '-')}.json"
        self.log = self.path.with_suffix(".log").open("w")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.limit - (time.monotonic() - self.start)

    def say(self, text: str) -> None:
        """To the terminal and to the log."""
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def record(self, step: Step) -> Step:
        """Keep a step, and write the report anew: one that is cut short has all that was done."""
        self.steps.append(step)
        notes = ", ".join(f"{k} {v}" for k, v in step.detail.items() if isinstance(v, (int, float, str)))
        self.say(f"gpu-check: {step.name}: {step.status} in {step.seconds:.1f} s{': ' + notes if notes else ''}")
        self.path.write_text(json.dumps(self.report(), indent=1) + "\n")
        return step

    def report(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "format": FORMAT,
            "part": self.part,
            "dry_run": self.dry_run,
            "passed": not any(s.status in FAILED for s in self.steps),
            "seconds": round(time.monotonic() - self.start, 1),
            "machine": machine(),
            "steps": [asdict(step) for step in self.steps],
        }

    def command(
        self, name: str, command: list[Any], limit: float | None = None, shown: int = 0, **environment: str
    ) -> Step:
        """Run a command with its output in the log, the last ``shown`` lines on the terminal too; the step is not
        recorded yet."""
        begin = time.monotonic()
        env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        timeout = max(1.0, min(self.left, limit or self.left))
        words = list(map(str, command))
        status, code, output = run_within(words, timeout, env)
        detail: dict[str, Any] = {} if code is None else {"exit": code}
        lines = output.decode(errors="replace").splitlines()
        self.log.write("\n".join([f"==== {name}: {' '.join(words)}", *lines, ""]))
        self.log.flush()
        if shown:
            print("\n".join(lines[-shown:]), flush=True)
        if status != "passed":
            detail["tail"] = lines[-15:]
        return Step(name, status, round(time.monotonic() - begin, 1), detail)


def run_within(words: list[str], timeout: float, env: dict[str, str]) -> tuple[str, int | None, bytes]:
    """A step's status, the exit status and the output. At the time-out all that the command has started is ended:
    what a grandchild holds open would be waited for."""
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    try:
        process = subprocess.Popen(words, cwd=ROOT, env=env, **pipe)
    except OSError as error:
        return "missing", None, str(error).encode()
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return "timed out", None, output
    return ("passed" if process.returncode == 0 else "failed"), process.returncode, output


def machine() -> dict[str, Any]:
    """The GPU and the versions, as far as they can be told."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
    }
    found["commit"] = first_line(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if find_spec("torch"):
        import torch

        found["torch"] = torch.__version__
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
            found |= {"memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
            found["driver"] = first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found


def first_line(command: list[str]) -> str | None:
    """Of a command's output, or None if it cannot be had."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.splitlines()), None) if done.returncode == 0 else None


def tool(name: str) -> str | None:
    """A program of PATH, of this Python's environment, or of the CUDA toolkit."""
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    places = (Path(sys.executable).parent, cuda / "bin", cuda / "compute-sanitizer")
    return shutil.which(name) or next((f for p in places if (f := shutil.which(name, path=str(p)))), None)


def requirements(check: Check) -> bool:
    """Whether everything is here; what is not is named, with what it is for."""
    missing = [f"the Python package {name}" for name in MODULES if not find_spec(name)]
    if check.part.startswith("bench") and not check.dry_run and not find_spec("triton"):
        missing.append("the Python package triton (for torch.compile)")
    if not check.dry_run:
        missing += [f"the program {name}" for name in ("nvcc", "cmake", "g++") if not tool(name)]
        if find_spec("torch"):
            import torch

            if torch.version.cuda is None:
                missing.append(f"a torch with CUDA (this is {torch.__version__})")
            elif not torch.cuda.is_available():
                missing.append("a GPU that torch can use")
    check.record(Step("requirements", "missing" if missing else "passed", 0.0, {"missing": missing}))
    for what in missing:
        check.say(f"gpu-check: missing: {what}")
    return not missing


def target() -> str:
    """This GPU's, as nvcc names it: 80, 86, 89, 90a, 100a, ..."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if major >= 9 else "")


def build(check: Check) -> bool:
    """Compile the libraries for this GPU alone, in place."""
    if check.dry_run:
        check.record(Step("build", "skipped", 0.0, {"reason": "dry run: what is built is used"}))
        return True
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    step = check.command(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        QK_CUDA="1",
        QK_CUDA_ARCHS=target(),
        QK_EMU="0",
        PATH=path,
    )
    step.detail["targets"] = target()
    return check.record(step).status == "passed"


def conformance(check: Check) -> None:
    """The PTX wrappers on the device and their twins in the emulator must print the same lines."""
    folder = ROOT / "build/conformance"
    folder.mkdir(parents=True, exist_ok=True)
    source, flags = ROOT / "tests/emu/conformance.cu", ["-std=c++20", f"-I{ROOT / 'csrc'}"]
    host = [
        tool("g++") or "g++",
        *flags,
        f"-I{ROOT / 'csrc/emu/include'}",
        "-O1",
        "-ffp-contract=off",
        "-U_FORTIFY_SOURCE",
    ]
    scheduler = [ROOT / "csrc/emu/emulator.cpp", ROOT / "csrc/emu/banks.cpp"]
    host += ["-Wno-unknown-pragmas", "-x", "c++", source, *scheduler, "-ldl", "-rdynamic"]
    commands = {"emulator": [*host, "-o", folder / "emulator"]}
    if not check.dry_run:
        gencode = f"-gencode=arch=compute_{target()},code=sm_{target()}"
        commands["device"] = [tool("nvcc"), *flags, "--fmad=false", "-O3", gencode, source, "-o", folder / "device"]
    begin, lines = time.monotonic(), {}
    for side, command in commands.items():
        compiled = check.command(f"conformance: compile for the {side}", command)
        if compiled.status != "passed":
            check.record(compiled)
            return
        done = subprocess.run([folder / side], capture_output=True, text=True, timeout=max(1.0, check.left))
        lines[side] = dict(line.split(":", 1) for line in done.stdout.splitlines())
    device = lines.get("device", lines["emulator"])
    differing = [name for name, words in lines["emulator"].items() if device.get(name) != words]
    for name in differing:
        check.log.write(f"conformance {name}\n device  {device.get(name)}\n emulator{lines['emulator'][name]}\n")
    status = "failed" if differing or device.keys() != lines["emulator"].keys() else "passed"
    cases = {"cases": len(device), "differing": differing}
    check.record(Step("conformance", status, round(time.monotonic() - begin, 1), cases))


def tests(check: Check) -> None:
    """Every test file on each backend in a process of its own, several at once."""
    backends = ("cpu",) if check.dry_run else ("cuda", "triton")
    patterns = ("tests/gpu/test_*.py", "tests/nn/test_backends.py") if check.dry_run else TESTS
    files = [path.relative_to(ROOT) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    reports = ROOT / "build/gpu-check"
    reports.mkdir(parents=True, exist_ok=True)

    def run(job: tuple[Path, str]) -> Step:
        path, backend = job
        report = reports / f"{path.stem}-{backend}.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path, f"--junitxml={report}"]
        step = check.command(
            f"{path} on {backend}",
            [*command, "--backend", backend],
            OMP_NUM_THREADS="2",
            CUBLAS_WORKSPACE_CONFIG=":4096:8",
        )
        step.detail |= outcome(report)
        if step.detail.get("exit") == NO_TESTS:
            step.status = "skipped"
        return step

    jobs = [(path, backend) for path in files for backend in backends]
    with ThreadPoolExecutor(max(1, min(len(jobs), (os.cpu_count() or 2) // 2))) as pool:
        for step in pool.map(run, jobs):
            check.record(step)


def outcome(report: Path) -> dict[str, Any]:
    """Counts, and the names of the tests that failed, out of a JUnit file."""
    if not report.exists():
        return {}
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        case.get("name")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "failed": failed[:40]}


def sanitize(check: Check) -> None:
    """compute-sanitizer's four tools at once, each over one small call of every kernel."""
    sanitizer = tool("compute-sanitizer")
    script = [sys.executable, "tests/gpu/every_kernel.py", "cpu" if check.dry_run else "cuda"]
    plain = check.record(check.command("every kernel, without a sanitizer", script))
    if sanitizer is None or check.dry_run:
        reason = "dry run" if check.dry_run else "compute-sanitizer is not installed"
        for name in TOOLS:
            check.record(Step(name, "skipped", 0.0, {"reason": reason}))
        return
    if plain.status != "passed":
        return

    def run(name: str) -> Step:
        # Without torch's caching allocator each tensor is an allocation of its own, with ends that can be watched.
        command = [sanitizer, "--tool", name, "--error-exitcode", "9", "--print-limit", "20", *script]
        return check.command(name, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        for step in pool.map(run, TOOLS):
            check.record(step)


def bench(check: Check, names: Sequence[str]) -> None:
    """Each benchmark in a process of its own, the time that is left shared out evenly; results become details."""
    for i, name in enumerate(names):
        results = check.path.with_name(f"gpu-bench-{name}.json")
        results.unlink(missing_ok=True)
        share = check.left / (len(names) - i)
        seconds = max(1, int(share - ENDING))
        command = [sys.executable, "-m", f"benchmarks.{BENCHMARKS[name]}", "--out", results, "--seconds", seconds]
        command += ["--quick"] if check.dry_run else []
        step = check.command(f"bench {name}", command, limit=share, shown=TABLE)
        if results.exists():
            step.detail |= json.loads(results.read_text())
        check.record(step)
    for goal in (goal for step in check.steps for goal in step.detail.get("goals", [])):
        verdict = "met" if goal["met"] else "NOT MET"
        check.say(f"gpu-check: goal: {goal['of']}: {goal['goal']}: {goal['value']:.4g}, {verdict}")


def main(arguments: list[str] | None = None) -> int:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report and the log")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds (default: 480)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU backend, with what is built")
    options = parser.parse_args(arguments)
    check = Check(options.part, options.out, options.limit, options.dry_run)
    if not requirements(check):
        return 2
    if build(check):
        if options.part == "build+tests":
            conformance(check)
            tests(check)
        elif options.part == "sanitize":
            sanitize(check)
        else:
            name = options.part.removeprefix("bench").removeprefix("-")
            bench(check, [name] if name else list(BENCHMARKS))
    report = check.report()
    check.path.write_text(json.dumps(report, indent=1) + "\n")
    verdict = "passed" if report["passed"] else "FAILED"
    check.say(f"gpu-check: {options.part}: {verdict} in {report['seconds']} s; {check.path}")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
