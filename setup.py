"""Builds the native libraries with CMake and puts them into the package; pyproject.toml says the rest.

Environment: QK_CUDA=0|1 (leave CUDA out, or fail without nvcc; default: build it when nvcc is found), QK_CUDA_ARCHS
(targets, default "80;86;89;90a"), QK_EMU=1 (with an in-place or editable build: the emulator of the CUDA kernels, for
tests), QK_JOBS (parallel compile jobs, default: the number of processors).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeExtension(Extension):
    """A stand-in for everything that CMakeLists.txt builds."""

    def __init__(self) -> None:
        super().__init__("quantkernels._lib._host", sources=[])


class CMakeBuild(build_ext):
    """Runs CMake once; libraries land beside the Python files they belong to."""

    def run(self) -> None:
        # setuptools hides `inplace` from build_extension and then copies the one file it knows of.
        self.in_source = bool(self.inplace or self.editable_mode)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        package = ROOT / "quantkernels" / "_lib"
        target = package if self.in_source else Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        options = {
            "Python_EXECUTABLE": sys.executable,
            "QK_VERSION": self.distribution.get_version(),
            "QK_OUTPUT_DIR": target,
            "QK_CUDA": os.environ.get("QK_CUDA", "auto"),
            "QK_CUDA_ARCHS": os.environ.get("QK_CUDA_ARCHS", "80;86;89;90a"),
            "QK_EMU": os.environ.get("QK_EMU", "0") if self.in_source else "0",
        }
        # A switch of generator between builds would stop CMake; the object files are not worth keeping then.
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), *generator]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        if subprocess.run(configure).returncode != 0:
            shutil.rmtree(build, ignore_errors=True)
            subprocess.run(configure, check=True)
        jobs = os.environ.get("QK_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an in-place build has put the libraries there itself."""


setup(ext_modules=[CMakeExtension()], cmdclass={"build_ext": CMakeBuild})
