# SPDX-License-Identifier: Apache-2.0
"""Builds the native module with CMake and Ninja; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
STARTUP_FILE = "fastshard_auto.pth"
STARTUP = (
    "import os; os.environ.get('FASTSHARD_AUTO', '').strip().lower() in "
    "('', '0', 'false', 'no', 'off', 'n', 'f', 'never') or exec("
    '"try:\\n import fastshard.auto\\nexcept Exception as error:\\n import sys\\n'
    " print(f'fastshard: FASTSHARD_AUTO is set, but {error}', file=sys.stderr)\")\n"
)
"""A line that Python runs at each start: it looks at one variable, by the rule of ``fastshard.settings.flag``."""


class CMakeBuild(build_ext):
    """Runs CMakeLists.txt once. ``CMAKE_ARGS`` in the environment is passed on (e.g. -DFASTSHARD_KERNELS=OFF).

    ``FASTSHARD_NATIVE_MODULE`` names a module that is built already (by wheels/build.py), and is taken as it is.
    """

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        if built := os.environ.get("FASTSHARD_NATIVE_MODULE"):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, target)
            return
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # The cache of an earlier build names the tools of pip's environment of then, which is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            "-DCMAKE_COMPILE_WARNING_AS_ERROR=OFF",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_native"], check=True)


class WithStartup(build_py):
    """Puts the line for Python's start beside the package; it goes with the package."""

    def run(self) -> None:
        super().run()
        # What an editable install is made of is not built, but put into its wheel.
        editable = getattr(self, "editable_mode", False)
        folder = self.get_finalized_command("install").install_lib if editable else self.build_lib
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, STARTUP_FILE).write_text(STARTUP)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        if not getattr(self, "editable_mode", False):
            outputs.append(str(Path(self.build_lib, STARTUP_FILE)))
        return outputs


setup(
    ext_modules=[Extension("fastshard._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": WithStartup},
)
