# SPDX-License-Identifier: Apache-2.0
"""What is inside a wheel's native module, as a CycloneDX document (PEP 770 puts it into the wheel)."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from kernels import BINDER, COMPILERS
from packageurl import PackageURL

LLVM = "Apache-2.0 WITH LLVM-exception"


def document(version: str, architecture: str) -> str:
    """Components are what is copied into the module; tools are what made it."""
    zig, llvm = importlib.metadata.version("ziglang"), llvm_version()
    pybind11 = importlib.metadata.version("pybind11")
    bom = Bom()
    fastshard = component("fastshard", version, "Apache-2.0", PackageURL("pypi", None, "fastshard", version))
    bom.metadata.component = fastshard
    inside = [
        component("pybind11", pybind11, "BSD-3-Clause", PackageURL("pypi", None, "pybind11", pybind11)),
        *(component(name, llvm, LLVM, of="the C++ runtime, linked statically") for name in RUNTIME),
        component("compiler-rt (Zig)", zig, "MIT", of="helpers of the compiler, linked statically"),
        component(
            "glibc (start files)", "2.28", "LGPL-2.1-or-later", of=f"libc_nonshared for {architecture}"
        ),
    ]
    for part in inside:
        bom.components.add(part)
    bom.register_dependency(fastshard, inside)
    tools = [("ziglang", zig), *(requirement.split("==") for requirement in (*COMPILERS, BINDER))]
    tools.append(("nvidia-cuda-runtime", importlib.metadata.version("nvidia-cuda-runtime")))
    bom.metadata.tools = ToolRepository(
        components=[component(name, its, None, PackageURL("pypi", None, name, its)) for name, its in tools]
    )
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


RUNTIME = ("libc++", "libc++abi", "libunwind")


def component(
    name: str, version: str, license: str | None, purl: PackageURL | None = None, of: str | None = None
) -> Component:
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=f"{name}@{version}",
        purl=purl,
        description=of,
        scope=ComponentScope.REQUIRED if license else None,
        licenses=[LicenseExpression(license)] if license else [],
    )


def llvm_version() -> str:
    command = [sys.executable, "-m", "ziglang", "c++", "--version"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"clang version (\S+)", said)
    assert found, said
    return found[1]


def licenses(folder: Path) -> list[str]:
    """Copies the licenses that what is inside asks for into a wheel's folder of licenses. Returns their names there."""
    pybind11 = importlib.metadata.distribution("pybind11")
    (text,) = [path for path in pybind11.files or () if path.match("licenses/LICENSE")]
    ziglang = Path(__import__("ziglang").__file__).parent
    sources = {"pybind11": Path(str(text.locate())), "libcxx": ziglang / "lib" / "libcxx" / "LICENSE.TXT"}
    for name, source in sources.items():
        target = folder / "inside" / name / "LICENSE"
        target.parent.mkdir(parents=True)
        target.write_bytes(source.read_bytes())
    return [f"inside/{name}/LICENSE" for name in sources]
