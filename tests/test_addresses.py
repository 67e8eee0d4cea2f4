# SPDX-License-Identifier: Apache-2.0
"""The addresses that users hold: in scripts, in command lines, in the configuration of engines. They do not move."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fastshard

ROOT = Path(__file__).parent.parent

NAMES = """
ArchiveError Changed Engine Options PreparedSave Report SaveError SaveFuture Stats Status asynchronous convert_dcp
diff_checkpoints install installed latest_checkpoint list_checkpoints load load_distributed load_file load_model
load_sharded_state merge_checkpoint prepare prune_checkpoints reshard_checkpoint safe_open save save_distributed
save_file save_file_async save_files save_files_async save_model save_model_async save_sharded_state
save_sharded_state_async save_torch_model save_torch_model_async save_torch_state_dict save_torch_state_dict_async
shard_checkpoint stats status torch_save torch_save_async uninstall verify wait_all write_manifest
""".split()
"""Of the package itself."""

OBJECTS = """
fastshard.__version__
fastshard.cli:main
fastshard.mapped:MappedFile fastshard.mapped:lies_in_file fastshard.mapped:load_mapped fastshard.mapped:same_bytes
fastshard.offload:offloaded_state_dict fastshard.offload:offloaded_tensor
fastshard.sglang:register fastshard.sglang:save_model
fastshard.vllm:WorkerExtension fastshard.vllm:register
""".split()
"""Of its modules."""

ENTRY_POINTS = {
    ("console_scripts", "fastshard"): "fastshard.cli:main",
    ("sglang.srt.plugins", "fastshard"): "fastshard.sglang:register",
    ("vllm.general_plugins", "fastshard"): "fastshard.vllm:register",
}

SAVE_FILE = "tensors filename metadata durable keep_cached progress allow_strided dtype checksums manifest base engine".split()


def test_names_of_the_package() -> None:
    assert sorted(fastshard.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(fastshard, name) is not None and name in dir(fastshard), name
    with pytest.raises(AttributeError, match="no attribute 'save_fiel'"):
        fastshard.save_fiel  # noqa: B018


@pytest.mark.parametrize("address", OBJECTS)
def test_names_of_modules(address: str) -> None:
    module, _, name = address.replace(".__", ":__").partition(":")
    assert getattr(importlib.import_module(module), name) is not None


def test_what_stands_in_for_safetensors_has_its_arguments_first() -> None:
    assert list(inspect.signature(fastshard.save_file).parameters) == SAVE_FILE


def test_the_worker_extension_has_its_method() -> None:
    from fastshard.vllm import WorkerExtension

    assert list(inspect.signature(WorkerExtension.fastshard_save).parameters) == [
        "self",
        "path",
        "pattern",
        "max_size",
    ]


def test_offloaded_models_are_given_by_these_names() -> None:
    from fastshard.offload import offloaded_state_dict, offloaded_tensor

    assert list(inspect.signature(offloaded_state_dict).parameters) == ["model", "scratch"]
    assert list(inspect.signature(offloaded_tensor).parameters) == ["model", "name", "scratch"]


def test_entry_points_lead_to_functions() -> None:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = {("console_scripts", name): value for name, value in project["scripts"].items()}
    for group, names in project["entry-points"].items():
        said |= {(group, name): value for name, value in names.items()}
    assert said == ENTRY_POINTS
    for (group, name), value in ENTRY_POINTS.items():
        assert callable(metadata.EntryPoint(name, value, group).load())


def test_the_command_line_and_the_module_are_one_program() -> None:
    from fastshard.cli import main

    for command in (
        [sys.executable, "-m", "fastshard"],
        [sys.executable, "-c", "import sys; from fastshard.cli import main; sys.exit(main())"],
    ):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=ROOT / "tests")
        assert done.returncode == 0 and fastshard.__version__ in done.stdout, done.stderr
    assert callable(main)


def test_an_import_installs_everything() -> None:
    script = "import fastshard.auto, fastshard; print(fastshard.status().installed)"
    for value, shown in (("0", "True"), ("1", "False")):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            cwd=ROOT / "tests",
            env={**os.environ, "FASTSHARD_DISABLE": value},
        )
        assert done.stdout.strip() == shown, done.stderr


def test_public_names_are_not_looked_for_in_folders_that_may_move() -> None:
    """What other modules of ours import is not what users are told to import: README and pages name public addresses only."""
    shown = "".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    folders = [
        path.name
        for path in (ROOT / "fastshard").iterdir()
        if path.is_dir() and path.name not in ("cli", "bench")
    ]
    assert [folder for folder in folders if f"fastshard.{folder}." in shown] == []
