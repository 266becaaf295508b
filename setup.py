"""Builds `imf_kernels._C` with CMake and ninja; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def program(name: str) -> str:
    """A build tool: the one on PATH (in an isolated build its own), else the one beside the interpreter."""
    return shutil.which(name) or str(Path(sys.executable).parent / name)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if sysconfig.get_config_var("Py_GIL_DISABLED"):
            sys.exit(
                "imf_kernels: free-threaded Python is not supported, as no test has run on it; install with "
                f"python{sys.version_info.major}.{sys.version_info.minor}, whose interpreter has the lock"
            )
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One folder per interpreter, kept between builds so that only edited sources are compiled again.
        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(build)  # of a tree that was moved or copied: CMake refuses it
        configure = [
            program("cmake"),
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            # Given at every build: an isolated build's tools are gone at the next one, their paths stale.
            f"-DCMAKE_MAKE_PROGRAM={program('ninja')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPython_ROOT_DIR={sys.prefix}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DIMF_CUDA={os.environ.get('IMF_CUDA', 'auto')}",
            f"-DIMF_WERROR={os.environ.get('IMF_WERROR', 'OFF')}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([program("cmake"), "--build", str(build), "--target", "imf_kernels"], check=True)


setup(ext_modules=[Extension("imf_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
