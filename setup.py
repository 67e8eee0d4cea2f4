# SPDX-License-Identifier: Apache-2.0
"""Builds the native module with CMake and Ninja; everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMakeLists.txt once. ``CMAKE_ARGS`` in the environment is passed on (e.g. -DFASTSHARD_KERNELS=OFF)."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # The cache of an earlier build names the tools of pip's environment of then, which is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_native"], check=True)


setup(ext_modules=[Extension("fastshard._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
