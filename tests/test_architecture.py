# SPDX-License-Identifier: Apache-2.0
"""Includes and imports point up only: a file may use what stands before it, and has a place before it exists."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

NATIVE = """
error.h plan.h plan.cc schedule.h schedule.cc device.h cast.h cast.cc pack.h pack.cc streaming.h streaming.cc
kernels/table.h kernels/table.cc kernels/memory.cuh kernels/elements.cuh kernels/gather.cuh kernels/tiles.cuh
kernels/pack.cu kernels/embedded.h kernels/embedded.cc host_device.cc numa.h numa.cc cuda_driver.h cuda_driver.cc
cuda_info.h cuda_info.cc cuda_context.h cuda_scratch.h cuda_scratch.cc cuda_device.cc ring.h filesystem.h
filesystem.cc attributes.h attributes.cc target.h target.cc temporary.h temporary.cc probe.h probe.cc mapping.h
mapping.cc file.h threads.h threads.cc closing.h closing.cc file.cc publish.cc suspended.cc holders.h holders.cc in_place.h in_place.cc
direct_io.h direct_io.cc standing.h standing.cc crc32.h crc32.cc source_file.h source_file.cc
writer.h writer.cc
fetch.h save.h save.cc engine.h engine.cc bindings.cc
""".split()
"""csrc/ in reading order."""

PYTHON = """
settings living loading options activity jsontext patch_groups import_hook calls patching overrides report layout records plan errors mapped borrowed sharing tensors limits future engine planning saving holders sources prepared staging change linking exchanging switching directory archive_errors archive_skeleton archive_by_torch in_place archive staged hub offload
transformers accelerate adapters manifest reading sharded vllm sglang vllm_save auto checkpoint whatis convert tp_plan
model_plan parts rank_folders reshard __init__ cli_text cli_files cli_checkpoints cli_run cli __main__
""".split()
"""fastshard/ in reading order."""

FOREIGN = {
    "settings": set(),
    "living": set(),
    "loading": set(),
    "options": set(),
    "activity": set(),
    "jsontext": set(),
    "layout": set(),
    "records": set(),
    "plan": set(),
    "errors": {"safetensors"},
    "limits": set(),
    "future": set(),
    "engine": set(),
    "staging": set(),
    "change": set(),
    "linking": set(),
    "exchanging": set(),
    "switching": set(),
    "directory": set(),
    "in_place": set(),
    "manifest": set(),
    "reading": {"safetensors"},
    "checkpoint": set(),
    "tp_plan": set(),
    "whatis": set(),
    "cli_text": {"safetensors", "tqdm"},
    "cli_files": set(),
    "cli_checkpoints": set(),
    "cli_run": set(),
    "patch_groups": set(),
    "import_hook": set(),
    "calls": set(),
    "patching": set(),
    "overrides": set(),
    "report": set(),
    "auto": set(),
    "cli": set(),
}
"""Modules that must stay usable without torch, and what they may use besides the standard library."""

ONLY_HOME = {
    r"#include [<\"]pybind11|#include [<\"]Python\.h": {"bindings.cc"},
    r"#include <cuda\.h>": {"cuda_driver.h"},
    r"\bcu[A-Z]\w+\(": {
        "cuda_driver.h",
        "cuda_driver.cc",
        "cuda_info.cc",
        "cuda_context.h",
        "cuda_scratch.cc",
        "cuda_device.cc",
        "device.h",
    },
    r"\bio_uring_(?:setup|enter)\b|SYS_": {"direct_io.cc", "numa.cc"},
    r"\bpwritev\b|\brename\b\(|\blinkat\(": {"file.cc", "suspended.cc", "publish.cc", "probe.cc"},
}
"""One file owns each foreign interface."""


def strip_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def test_every_native_file_has_a_place() -> None:
    present = {str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob("*.*")}
    assert present == set(NATIVE)


@pytest.mark.parametrize("name", NATIVE)
def test_native_includes_point_up(name: str) -> None:
    text = (ROOT / "csrc" / name).read_text()
    for included in re.findall(r'#include "([^"]+)"', text):
        included = included.removeprefix("../")
        if included not in NATIVE and name.startswith("kernels/"):
            included = f"kernels/{included}"
        assert included in NATIVE, f"{name} includes {included}, which is not ours"
        assert NATIVE.index(included) < NATIVE.index(name), f"{name} may not include {included}"


@pytest.mark.parametrize("pattern", ONLY_HOME)
def test_foreign_interfaces_have_one_home(pattern: str) -> None:
    users = {
        name for name in NATIVE if re.search(pattern, strip_comments((ROOT / "csrc" / name).read_text()))
    }
    assert users <= ONLY_HOME[pattern]


def imports(tree: ast.AST, *, only_at_import: bool) -> set[str]:
    """Names of the modules imported; ``only_at_import`` leaves out functions and ``if TYPE_CHECKING``."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {base} if node.module else {base + alias.name for alias in node.names}
        elif (
            only_at_import
            and isinstance(node, (ast.FunctionDef, ast.Lambda))
            or only_at_import
            and isinstance(node, ast.If)
            and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            continue
        else:
            found |= imports(node, only_at_import=only_at_import)
    return found


def test_every_python_file_has_a_place() -> None:
    assert {path.stem for path in (ROOT / "fastshard").glob("*.py")} == set(PYTHON)


@pytest.mark.parametrize("name", PYTHON)
def test_python_imports_point_up(name: str) -> None:
    tree = ast.parse((ROOT / "fastshard" / f"{name}.py").read_text())
    for imported in imports(tree, only_at_import=False):
        if not imported.startswith("."):
            continue
        module = imported.lstrip(".").split(".")[0]
        if module in ("_native", "bench", "__version__"):
            continue
        assert module in PYTHON, f"{name} imports {imported}, which is not ours"
        assert PYTHON.index(module) < PYTHON.index(name), f"{name} may not import {module}"


@pytest.mark.parametrize("name", FOREIGN)
def test_modules_without_torch(name: str) -> None:
    tree = ast.parse((ROOT / "fastshard" / f"{name}.py").read_text())
    tops = {
        module.split(".")[0] for module in imports(tree, only_at_import=True) if not module.startswith(".")
    }
    assert tops - set(sys.stdlib_module_names) <= FOREIGN[name]


def test_native_module_links_the_c_runtime_only() -> None:
    from fastshard import _native

    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf here")
    shown = subprocess.run(
        [readelf, "-d", _native.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = {name.split(".so")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", shown)}
    assert needed <= {
        "libstdc++",
        "libgcc_s",
        "libm",
        "libc",
        "libdl",
        "libpthread",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    assert Path(_native.__file__).stat().st_size < 2 << 20


@pytest.mark.parametrize("name", PYTHON)
def test_what_a_thread_has_for_itself_is_never_half_made(name: str) -> None:
    """A signal handler that interrupts the ``__init__`` of a ``threading.local`` finds an object without attributes."""
    tree = ast.parse((ROOT / "fastshard" / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("local") for base in node.bases):
            assert "__init__" not in [f.name for f in node.body if isinstance(f, ast.FunctionDef)], node.name


@pytest.mark.parametrize("name", PYTHON)
def test_locks_that_are_waited_for_can_be_taken_again_by_their_thread(name: str) -> None:
    """A signal handler may come while its thread holds the lock."""
    if name == "activity":
        return  # only tries its lock
    assert "threading.Lock()" not in (ROOT / "fastshard" / f"{name}.py").read_text()
