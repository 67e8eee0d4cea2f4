# SPDX-License-Identifier: Apache-2.0
"""The options that public functions have in common: one definition of their names, defaults and types (``How``).

Whoever adds an option there has to give it to every function, or to name here those that leave it out, and why.
"""

from __future__ import annotations

import ast
import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastshard
from fastshard import Engine, Options
from fastshard.engine.pipeline import How

ROOT = Path(fastshard.__file__).parent

LEFT_OUT: dict[str, dict[str, str]] = {
    "save_file": {},
    "save_files": {},
    "save_model": {},
    "save": {
        "durable": "there is no file",
        "keep_cached": "there is no file",
        "manifest": "there is no file",
        "checksums": "there is no file to name them by",
        "base": "there is no file",
    },
    "prepare": {
        "keep_cached": "its files are memory of the page cache, mapped and filled again",
        "progress": "it saves nothing; PreparedSave.save has it",
        "manifest": "its file is written again and again",
        "base": "its files are written again and again, so none may be another's",
    },
    "torch_save": {
        "allow_strided": "pickling keeps strides",
        "dtype": "an archive has what the object has",
        "checksums": "an archive has records, no tensors, and the CRC-32 of each already",
        "base": "archives are always written",
    },
    "save_torch_state_dict": {
        "allow_strided": "it is called force_contiguous, as in huggingface_hub",
        "checksums": "an index could not hold them; manifest does",
    },
    "save_torch_model": {
        "allow_strided": "it is called force_contiguous, as in huggingface_hub",
        "checksums": "an index could not hold them; manifest does",
    },
    "save_distributed": {
        "allow_strided": "strided tensors are always packed",
        "checksums": "no rank sees all bytes of a tensor",
        "base": "its files are written by several ranks, each a part",
    },
    "save_sharded_state": {
        "allow_strided": "strided tensors are always packed",
        "dtype": "the engine that loads expects its own",
        "checksums": "the manifest has them",
        "base": "an engine's weights are saved once",
    },
    "shard_checkpoint": {
        "allow_strided": "files have no strides",
        "dtype": "parts are the source's bytes",
        "checksums": "parts are byte ranges, not tensors",
        "base": "it copies parts of one checkpoint",
    },
    "merge_checkpoint": {
        "allow_strided": "files have no strides",
        "dtype": "the files are the source's, to the byte",
        "checksums": "parts are byte ranges, not tensors",
        "base": "it copies parts of one checkpoint",
    },
    "reshard_checkpoint": {
        "allow_strided": "files have no strides",
        "dtype": "the tensors are the source's bytes",
        "checksums": "tensors are byte ranges of files here",
        "base": "it copies parts of one checkpoint",
    },
    "convert_dcp": {
        "allow_strided": "strided tensors are always packed",
        "checksums": "an index could not hold them",
        "base": "it converts one checkpoint",
    },
}
"""Public function -> common option that it does not have -> why."""

NOT_SAVING = {
    "wait_all", "install", "installed", "uninstall", "load", "load_file", "load_model", "load_sharded_state", "load_distributed", "stats", "status",
    "list_checkpoints", "prune_checkpoints", "latest_checkpoint", "diff_checkpoints", "verify", "write_manifest",
}  # fmt: skip


def function(name: str) -> Callable[..., Any]:
    return getattr(fastshard, name)


def test_every_public_function_that_saves_is_listed() -> None:
    functions = {name for name in fastshard.__all__ if inspect.isfunction(function(name))}
    asynchronous = {name for name in functions if name.endswith("_async")}
    assert functions - asynchronous == LEFT_OUT.keys() | NOT_SAVING
    made_at_once = {
        "save",
        "save_distributed",
        "prepare",
        "shard_checkpoint",
        "merge_checkpoint",
        "reshard_checkpoint",
        "convert_dcp",
    }
    assert asynchronous == {f"{name}_async" for name in LEFT_OUT.keys() - made_at_once}


def test_an_asynchronous_form_has_the_savers_parameters_and_those_of_asynchronous() -> None:
    own = list(inspect.signature(fastshard.asynchronous).parameters.values())
    for name in [name for name in fastshard.__all__ if name.endswith("_async")]:
        saver = function(name.removesuffix("_async"))
        theirs = list(inspect.signature(saver).parameters.values())
        assert list(inspect.signature(function(name)).parameters.values()) == theirs + own, name


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_common_option_is_everywhere_or_left_out_for_a_reason(name: str) -> None:
    parameters = inspect.signature(function(name)).parameters
    common = [option for option in parameters if option in How._fields]
    assert {*common, *LEFT_OUT[name]} == {*How._fields} and not {*common} & {*LEFT_OUT[name]}
    theirs, ours = typing.get_type_hints(function(name)), typing.get_type_hints(How)
    for option in common:
        parameter = parameters[option]
        assert parameter.kind is parameter.KEYWORD_ONLY, option
        assert parameter.default is How._field_defaults[option], option
        assert theirs[option] == ours[option], option
    assert list(parameters)[-1] == "engine"


def test_save_file_has_the_common_options_and_no_others() -> None:
    parameters = inspect.signature(fastshard.save_file).parameters.values()
    assert tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY) == How._fields


def test_a_prepared_save_has_what_prepare_leaves_to_it() -> None:
    progress = inspect.signature(fastshard.PreparedSave.save).parameters["progress"]
    assert progress.kind is progress.KEYWORD_ONLY and progress.default is How._field_defaults["progress"]


def documented(name: str, option: str, seen: tuple[str, ...] = ()) -> bool:
    """Whether a docstring names an option, or that of a function which it refers to."""
    text = inspect.getdoc(function(name)) or ""
    if re.search(rf"\b{option}\b", text):
        return True
    others = {reference.removeprefix("fastshard.") for reference in re.findall(r":func:`([\w.]+)`", text)}
    return any(documented(other, option, (*seen, name)) for other in others & LEFT_OUT.keys() - {*seen, name})


@pytest.mark.parametrize("name", LEFT_OUT)
def test_options_are_documented(name: str) -> None:
    for option in How._fields:
        if option not in LEFT_OUT[name]:
            assert documented(name, option), option


def test_options_are_handed_on_by_name() -> None:
    """An option that comes between two others is not taken for one of them."""
    found = 0
    for path in ROOT.glob("*/*.py"):
        if path.parent.name == "bench":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "How":
                assert not node.args, f"{path}:{node.lineno}"
                found += 1
    assert found > 5


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Engine, dict[str, Any]]]:
    """Every save that an engine is given, with its arguments."""
    found: list[tuple[Engine, dict[str, Any]]] = []

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def submit(self: Engine, *args: Any, **kwargs: Any) -> Any:
            found.append((self, kwargs))
            return method(self, *args, **kwargs)

        return submit

    for name in ("submit", "submit_prepared"):
        monkeypatch.setattr(Engine, name, noting(getattr(Engine, name)))
    return found


def call(name: str, folder: Path, **options: Any) -> None:
    """Saves something small by a public function."""
    tensors = {"a": torch.arange(40.0).view(8, 5), "b": torch.ones(2)}
    path = folder / "model.safetensors"
    if name == "prepare":
        with fastshard.prepare(tensors, path, **options) as prepared:
            prepared.save()
    elif name == "save":
        fastshard.save(tensors, **options)
    elif name == "save_files":
        fastshard.save_files({path: tensors}, **options)
    elif name == "torch_save":
        fastshard.torch_save(tensors, path, **options)
    elif name in ("save_model", "save_torch_model"):
        model = torch.nn.Linear(3, 2)
        function(name)(model, path if name == "save_model" else folder, **options)
    elif name in ("save_torch_state_dict", "save_distributed", "save_sharded_state"):
        function(name)(tensors, folder, **options)
    elif name == "convert_dcp":
        checkpoint = pytest.importorskip("torch.distributed.checkpoint")
        with pytest.warns(UserWarning, match=r"torch\.distributed"):
            checkpoint.save(tensors, checkpoint_id=folder / "dcp", no_dist=True)
        fastshard.convert_dcp(folder / "dcp", folder / "other", **options)
    elif name.endswith("_checkpoint"):
        source = folder / "source"
        source.mkdir()
        fastshard.save_file(tensors, source / "model.safetensors")
        if name == "shard_checkpoint":
            fastshard.shard_checkpoint(source, folder / "parts", 2, plan={"a": "colwise"}, **options)
        elif name == "merge_checkpoint":
            fastshard.shard_checkpoint(source, folder / "parts", 2, plan={"a": "colwise"})
            fastshard.merge_checkpoint(folder / "parts", folder / "whole", **options)
        else:
            fastshard.reshard_checkpoint(source, folder / "other", 100, **options)
    else:
        fastshard.save_file(tensors, path, **options)


@pytest.mark.parametrize("name", LEFT_OUT)
@pytest.mark.parametrize(
    ("option", "value"), [("durable", True), ("keep_cached", False), ("checksums", True)]
)
def test_options_reach_the_engine(
    name: str, option: str, value: bool, submitted: list[tuple[Engine, dict[str, Any]]], tmp_path: Path
) -> None:
    if name.startswith("save_torch"):
        pytest.importorskip("huggingface_hub")
    if option in LEFT_OUT[name]:
        with pytest.raises(TypeError, match=option):
            call(name, tmp_path, **{option: value})
        return
    with Engine(Options(threads=2)) as engine:
        call(name, tmp_path, engine=engine, **{option: value})
        given = [arguments for used, arguments in submitted if used is engine]
        assert given and all(arguments[option] is value for arguments in given)
