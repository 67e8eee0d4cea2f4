# SPDX-License-Identifier: Apache-2.0
"""Includes and imports point up only: a file may use what stands before it, and has a place before it exists."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

NATIVE_LAYERS = {
    "plan": "error.h places.h places.cc plan.h plan.cc layout.h layout.cc schedule.h schedule.cc",
    "device": """
        device.h processor.h processor.cc cast.h cast.cc pack.h pack.cc streaming.h streaming.cc kernels/table.h kernels/table.cc
        kernels/memory.cuh kernels/elements.cuh kernels/gather.cuh kernels/tiles.cuh kernels/pack.cu kernels/embedded.h
        kernels/embedded.cc host_device.cc numa.h numa.cc cuda_driver.h cuda_driver.cc cuda_info.h cuda_info.cc
        cuda_refusal.h cuda_refusal.cc cuda_context.h cuda_streams.h cuda_streams.cc cuda_link.h cuda_link.cc
        cuda_scratch.h cuda_scratch.cc cuda_copies.h cuda_copies.cc cuda_kernels.h cuda_kernels.cc cuda_gathers.h
        cuda_gathers.cc cuda_device.cc page_lock.h page_lock.cc ring.h ring.cc fetch.h
    """,
    "file": """
        raw_calls.h filesystem.h filesystem.cc mapping.h mapping.cc shared_pages.h shared_pages.cc huge_pages.h huge_pages.cc inherited.h inherited.cc output.h output.cc suspended.cc threads.h threads.cc
        attributes.h attributes.cc target.h target.cc hidden_names.h hidden_names.cc probe.h probe.cc closing.h
        closing.cc placement.h placement.cc linked.h linked.cc temporary.h temporary.cc publish.h publish.cc holders.h holders.cc
        in_place.h in_place.cc direct_io.h direct_io.cc standing.h standing.cc source_file.h source_file.cc
        file_runs.h file_runs.cc
    """,
    "save": """
        crc32.h crc32.cc file_crc32.h file_crc32.cc changes.h changes.cc runs.h writer.h source_pages.h source_pages.cc chunk_writer.h chunk_writer.cc page_cache_writer.h
        page_cache_writer.cc placed_writer.h placed_writer.cc direct_writer.h direct_writer.cc into_memory.h snapshot_writer.h snapshot_writer.cc
        memory_writer.h memory_writer.cc writer.cc targets.h targets.cc forked_child.h forked_child.cc forked.h forked.cc
        save.h save.cc save_amendments.cc save_report.cc save_snapshot.cc
        engine.h engine.cc
    """,
    "bindings": """
        gil.h gil.cc python.h record.h record.cc dlpack.h exchange.h exchange.cc layouts.h layouts.cc page_lock.h plans.h plans.cc errors.cc saves.h saves.cc prepared.cc files.cc memory.cc system.cc
        module.cc
    """,
}
"""csrc/, folder by folder, in reading order. A file may include only what stands before it."""

PYTHON_LAYERS = {
    "": "errors",
    "base": "settings living loading activity originals",
    "formats": """
        json_text naming safetensors torch_archive manifest hf_index sha256sums digests in_toto oci file_kinds inert_pickle torch_items dcp_metadata
    """,
    "engine": """
        options plan limits borrowed mapped sharing tensors planning staged_event parts relief serving future progress arena background copies
        snapshots figures engine pipeline reading checksums unchanged
    """,
    "publish": "hidden_names folder attributes machines staging change record linking exchanging switching directory messages in_place manifests checkpoint incremental staged",
    "api": """
        checked saving holders sources prepared archive_errors archive_skeleton archive_by_torch archive hub sharded_state
        sharded_save sharded_load asynchronous
    """,
    "distributed": """
        group processors boxes rank_plan rank_files rank_own_files rank_save stored slices rank_load unseen_files stock final_files writer reader distcp file_system
        gathering staged stager
    """,
    "tools": "structure verify describe run_folder usage tensors_of values diff convert tp_plan model_plan parts rank_folders outputs reshard stored_boxes dcp_source dcp_folders statements",
    "integrations": """
        patch_entry patch_table patch_groups import_hook calls switches patching overrides report offload transformers_distributed transformers trainer diffusers accelerate accelerate_state hub_uploads lightning torch_checkpointing adapters dcp vllm_states vllm_probe vllm
        vllm_transfer sglang vllm_save
    """,
    "cli": "text files checkpoints verify run_folders diff run serve command __init__",
    " public": "auto mapped offload dcp vllm vllm_transfer sglang lightning torch_checkpointing __init__ __main__",
}
"""fastshard/, folder by folder, in reading order. A module may import only what stands before it."""


def places(layers: dict[str, str]) -> list[str]:
    """The files of a table, named by folder and name."""
    return [
        f"{folder.strip() and folder + '/'}{name}" if folder != " public" else name
        for folder, names in layers.items()
        for name in names.split()
    ]


NATIVE = places(NATIVE_LAYERS)
PYTHON = places(PYTHON_LAYERS)

WITHOUT_TORCH = {
    "errors": {"safetensors"},
    "engine/options": set(),
    "engine/plan": set(),
    "engine/limits": set(),
    "engine/staged_event": set(),
    "engine/parts": set(),
    "engine/relief": set(),
    "engine/serving": set(),
    "engine/future": set(),
    "engine/arena": set(),
    "engine/background": set(),
    "engine/copies": set(),
    "engine/snapshots": set(),
    "engine/engine": set(),
    "engine/reading": {"safetensors"},
    "engine/checksums": set(),
    "publish/hidden_names": set(),
    "publish/folder": set(),
    "publish/attributes": set(),
    "publish/machines": set(),
    "publish/staging": set(),
    "publish/change": set(),
    "publish/record": set(),
    "publish/linking": set(),
    "publish/exchanging": set(),
    "publish/switching": set(),
    "publish/directory": set(),
    "publish/in_place": set(),
    "publish/manifests": set(),
    "integrations/patch_entry": set(),
    "integrations/patch_groups": set(),
    "integrations/import_hook": set(),
    "integrations/calls": set(),
    "integrations/switches": set(),
    "integrations/patching": set(),
    "integrations/overrides": set(),
    "integrations/report": set(),
    "tools/run_folder": set(),
    "tools/usage": set(),
    "tools/tensors_of": set(),
    "tools/values": set(),
    "tools/diff": set(),
    "api/checked": {"safetensors"},
    "tools/tp_plan": set(),
    "tools/structure": set(),
    "tools/verify": set(),
    "tools/describe": set(),
    "cli/text": {"safetensors", "tqdm"},
    "cli/files": set(),
    "cli/checkpoints": set(),
    "cli/run_folders": set(),
    "cli/diff": set(),
    "cli/verify": set(),
    "cli/run": set(),
    "cli/serve": set(),
    "integrations/vllm_probe": set(),
    "cli/command": set(),
    "auto": set(),
    **{name: set() for name in PYTHON if name.startswith(("base/", "formats/"))},
}
"""Modules that must stay usable without torch, and what they may use besides the standard library."""

ONLY_HOME = {
    r"#include [<\"]pybind11|#include [<\"]Python\.h": {"bindings/python.h", "bindings/gil.h"},
    r"#include <cuda\.h>": {"device/cuda_driver.h"},
    r"\bcu[A-Z]\w+\(": {
        "device/cuda_driver.h",
        "device/cuda_driver.cc",
        "device/cuda_info.cc",
        "device/cuda_refusal.cc",
        "device/cuda_context.h",
        "device/cuda_streams.cc",
        "device/cuda_scratch.cc",
        "device/cuda_copies.cc",
        "device/cuda_kernels.cc",
        "device/cuda_gathers.cc",
        "device/cuda_device.cc",
        "device/device.h",
    },
    r"\bio_uring_(?:setup|enter)\b|SYS_": {
        "file/direct_io.cc",
        "file/raw_calls.h",
        "save/forked_child.cc",
        "device/numa.cc",
    },
    r"__builtin_cpu|\bcpuid\b|\bxgetbv\b": {"device/processor.cc", "device/processor.h"},
    r"\bpwritev\b|\brename\b\(|\blinkat\(": {
        "file/output.cc",
        "file/placement.cc",
        "file/probe.cc",
    },
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
            dot = "." if node.module else ""
            found |= {base + dot + alias.name for alias in node.names} if node.level else {base}
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
    folders = {path.parent.name for path in (ROOT / "fastshard").glob("*/*.py")}
    assert folders <= {*PYTHON_LAYERS, "bench"}
    empty = {f"{folder}/__init__" for folder in folders - {"cli", "bench"}}
    present = {
        path.relative_to(ROOT / "fastshard").with_suffix("").as_posix()
        for folder in ("", *folders - {"bench"})
        for path in (ROOT / "fastshard" / folder).glob("*.py")
    }
    assert present == {*PYTHON, *empty}
    for name in empty:
        assert len(ast.parse((ROOT / "fastshard" / f"{name}.py").read_text()).body) == 1, (
            f"{name} does something"
        )


def ours(imported: str, package: str) -> str | None:
    """Which file a relative import leads to; ``None`` where that is not one in the table."""
    level = len(imported) - len(imported.lstrip("."))
    path = [*package.split("/")[: (1 if package else 0) - level + 1], *imported.lstrip(".").split(".")]
    while path and path[0] not in ("_native", "bench", "__version__"):
        name = "/".join(part for part in path if part)
        if name in PYTHON:
            return name
        if f"{name}/__init__" in PYTHON:
            return f"{name}/__init__"
        path.pop()
    return None


@pytest.mark.parametrize("name", PYTHON)
def test_python_imports_point_up(name: str) -> None:
    package = name.rpartition("/")[0]
    tree = ast.parse((ROOT / "fastshard" / f"{name}.py").read_text())
    for imported in imports(tree, only_at_import=False):
        if not imported.startswith("."):
            assert not imported.startswith("fastshard"), f"{name} imports {imported} by its whole name"
            continue
        if imported.lstrip(".").split(".")[0] in ("_native", "bench", "__version__"):
            continue
        module = ours(imported, package)
        assert module is not None, f"{name} imports {imported}, which is not ours"
        assert PYTHON.index(module) < PYTHON.index(name), f"{name} may not import {module}"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_modules_without_torch(name: str) -> None:
    tree = ast.parse((ROOT / "fastshard" / f"{name}.py").read_text())
    tops = {
        module.split(".")[0] for module in imports(tree, only_at_import=True) if not module.startswith(".")
    }
    assert tops - set(sys.stdlib_module_names) <= WITHOUT_TORCH[name]


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
    runtime = 0 if "libstdc++" in needed else 128 << 10  # inside, in wheels
    assert Path(_native.__file__).stat().st_size < (2 << 20) + runtime


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
    if name == "base/activity":
        return  # only tries its lock
    assert "threading.Lock()" not in (ROOT / "fastshard" / f"{name}.py").read_text()


NAMES_OF_FILES = re.compile(
    r"""
    ^\.safetensors$ | ^\.bin$ | ^rank- | ^fastshard-  # suffixes and beginnings
    | \\d\{5\} | \\d\+ .* \\\.safetensors | -of-  # shards
    | \.index\b | weights\.index  # indices
    | -part\b | part-\{  # parts of sharded state
    | pytorch_model | ^model[{-] | ^model\.safetensors | tensor_parallel\.  # whole names
    """,
    re.VERBOSE,
)


def said_in_code(tree: ast.AST) -> list[str]:
    """Texts of a module, the pieces of f-strings too, which are neither docstrings nor part of a sentence."""
    bare = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in bare
        and " " not in node.value
    ]


@pytest.mark.parametrize("name", PYTHON)
def test_names_of_checkpoint_files_have_one_home(name: str) -> None:
    tree = ast.parse((ROOT / "fastshard" / f"{name}.py").read_text())
    found = [text for text in said_in_code(tree) if NAMES_OF_FILES.search(text)]
    if name == "formats/naming":
        assert len(found) > 10
    else:
        assert found == []


def test_there_is_one_import_hook() -> None:
    """Finders are in one file, and no other one changes the list of them."""
    for name in PYTHON:
        if name != "integrations/import_hook":
            text = (ROOT / "fastshard" / f"{name}.py").read_text()
            assert not re.search(r"def find_spec|def exec_module|sys\.meta_path", text), name


def test_sglang_does_not_need_what_is_written_for_vllm() -> None:
    """The module for SGLang imports none of the modules for vLLM, by itself or by way of others."""
    reached, ahead = set[str](), ["integrations/sglang"]
    while ahead:
        name = ahead.pop()
        tree = ast.parse((ROOT / "fastshard" / f"{name}.py").read_text())
        found = {ours(imported, name.rpartition("/")[0]) for imported in imports(tree, only_at_import=False)}
        ahead += [module for module in found if module is not None and module not in reached]
        reached |= {module for module in found if module is not None}
    assert "api/sharded_save" in reached and not any("vllm" in name for name in reached)


@pytest.mark.parametrize("name", PYTHON)
def test_owners_and_modes_are_taken_over_in_one_place(name: str) -> None:
    text = (ROOT / "fastshard" / f"{name}.py").read_text()
    if name != "publish/attributes":
        assert not re.search(r"\bos\.\w*(chown|xattr)\b|\bshutil\.copystat\b", text)


PRIVATE = {
    "_clean_state_dict_for_safetensors": {"api/hub"},
    "_init_from_local_shards_and_global_metadata": {"distributed/stock"},
    "_process_group": {"distributed/stock"},
    "_get_process_group_store": {"distributed/group"},
    "_config": {"integrations/dcp"},
    "_torch": {"api/hub"},
    "_base": {"api/hub"},
    "_C": {"api/archive_skeleton", "engine/borrowed"},
    "_check_dill_version": {"api/archive_skeleton"},
    "_open_zipfile_writer": {"api/archive_skeleton"},
    "_serialization_tls": {"api/archive_skeleton"},
    "_cdata": {"engine/borrowed"},
    "_storage_Use_Count": {"engine/borrowed"},
    "_SIZE": {"engine/borrowed"},
    "_save_to_state_dict": {"integrations/offload"},
    "_save_model_state_pre_hook": {"integrations/accelerate_state"},
    "_hf_hook": {"integrations/offload"},
    "_hf_peft_config_loaded": {"integrations/transformers"},
    "_get_output_dir": {"integrations/trainer"},
    "_filter_subtensors": {"integrations/vllm_states"},
    "_consolidate_hf_safetensors": {"integrations/dcp"},
    "_OutputFileData": {"integrations/dcp"},
    "_FqnData": {"integrations/dcp"},
    "_redistribute_state_dict": {"integrations/transformers_distributed"},
    "_weight_conversions": {"integrations/transformers_distributed"},
    "_keys_to_ignore_on_save": {"integrations/transformers_distributed"},
    "_keys_to_ignore_on_load_unexpected": {"tools/model_plan"},
    "_model_mapping": {"tools/model_plan"},
    # Python's own
    "_getframe": {"api/archive_skeleton", "api/asynchronous", "base/loading", "engine/background"},
    "_initializing": {"base/loading", "integrations/patching"},
    "_run_exitfuncs": {"engine/background"},
    "_SubParsersAction": {"cli/checkpoints", "cli/diff", "cli/files", "cli/run_folders", "cli/verify"},
}
"""What others do not make public -> who uses it: one module for each, which says what is done where it is missing."""

PUBLIC_ROOTS = {"safetensors", "torch", "tqdm"}
"""What modules of ours import of other libraries when they are imported: nothing deeper."""
DCP = {
    f"torch.distributed.checkpoint{name}"
    for name in ("", ".default_planner", ".filesystem", ".metadata", ".planner", ".storage")
}
DEEPER = {
    "integrations/vllm_transfer": {  # vLLM imports it, when it is asked for the backend
        "vllm.distributed.weight_transfer.base",
        "vllm.model_executor.model_loader.reload",
    },
    "distributed/stock": DCP,
    "distributed/final_files": DCP,
    "distributed/writer": DCP,
    "distributed/reader": DCP,
    "distributed/file_system": DCP,
    "distributed/stager": {"torch.distributed", "torch.distributed.checkpoint.staging"},
    "integrations/torch_checkpointing": {
        "torch_checkpointing",
        "torch_checkpointing.checkpoint_layout",
        "torch_checkpointing.storage.base_storage",
        "torch_checkpointing.storage.filesystem",
    },
}
"""What these import besides: they are imported by ``fastshard.dcp`` and ``fastshard.torch_checkpointing`` only."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_used(node: ast.AST) -> list[str]:
    """Names in other objects that a node looks up: attributes, texts in ``getattr``, parts of imports."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.ImportFrom) and not node.level:
        path = (node.module or "").split(".")
        return [] if path[0] in sys.stdlib_module_names else [*path, *(alias.name for alias in node.names)]
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr")
    ):
        return [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
    return []


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """What of a module runs when it is imported: not the bodies of functions, nor what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            evaluated = [*node.args.defaults, *(default for default in node.args.kw_defaults if default)]
            evaluated += getattr(node, "decorator_list", [])
            for part in evaluated:
                yield part
                yield from at_import(part)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from at_import(node)


def test_private_names_of_others_have_one_owner() -> None:
    trees = {name: ast.parse((ROOT / "fastshard" / f"{name}.py").read_text()) for name in PYTHON}
    our_own = {"_fields", "_replace", "_asdict", "_field_defaults", "_native", "_fastshard"}
    our_own.add("_exit")  # public, os has it under this name
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                our_own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                our_own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                our_own.add(node.attr)
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            for used in names_used(node):
                if is_private(used) and used not in our_own:
                    found.setdefault(used, set()).add(name)
    assert found == PRIVATE


@pytest.mark.parametrize("name", PYTHON)
def test_an_import_needs_nothing_private_of_others(name: str) -> None:
    if name in ("engine/borrowed", "distributed/stock"):
        return
    tree = ast.parse((ROOT / "fastshard" / f"{name}.py").read_text())
    used = {used for node in at_import(tree) for used in names_used(node) if used in PRIVATE}
    assert not used - {"_SubParsersAction"}
    foreign = {
        module
        for module in imports(tree, only_at_import=True)
        if not module.startswith(".") and module.split(".")[0] not in sys.stdlib_module_names
    }
    assert foreign <= PUBLIC_ROOTS | DEEPER.get(name, set())


BENCH = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "bench").rglob("*.py"))
"""The package fastshard.bench. What its files may import is in tests/test_bench.py."""


@pytest.mark.parametrize("path", [*(f"fastshard/{name}.py" for name in PYTHON), *BENCH])
def test_no_file_is_longer_than_400_lines(path: str) -> None:
    assert len((ROOT / path).read_text().splitlines()) <= 400
