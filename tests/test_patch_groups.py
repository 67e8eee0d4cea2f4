# SPDX-License-Identifier: Apache-2.0
"""Groups of replacements: whole or not at all, after a look at the installed version, and what the user is told of it."""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as st
import torch
from helpers import run_bare

import fastshard
from fastshard.base import activity
from fastshard.integrations import calls, patch_groups, patch_table, patching
from fastshard.integrations.patching import Entry
from fastshard.integrations.report import NOT_YET

TENSORS = {"a": torch.arange(10.0)}


def ours(original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, Any]:
    return "ours", original(*args, **kwargs)


def two(original: Callable[..., Any], first: int, second: int = 2) -> Any:
    return "ours", first, second


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Each test counts and is told anew."""
    for said in (patching._told, calls.refused, patching._found):
        said.clear()
    activity._forget()
    yield
    fastshard.uninstall()
    for said in (patching._told, calls.refused, patching._found):
        said.clear()


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Writes a package ``gs_library`` and makes a table for it."""
    monkeypatch.syspath_prepend(tmp_path)

    def written(table: tuple[Entry, ...], version: str = "1.2", **modules: str) -> None:
        package = tmp_path / "gs_library"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(f"__version__ = {version!r}\n")
        for name, source in modules.items():
            (package / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        monkeypatch.setattr(patching, "TABLE", table)

    yield written
    fastshard.uninstall()
    for name in [name for name in sys.modules if name.startswith("gs_library")]:
        del sys.modules[name]


def entry(place: str, implementation: str = "ours", parameters: str = "", **given: str) -> Entry:
    module, _, name = place.partition(":")
    return Entry(f"gs_library.{module}", name, f"{__name__}:{implementation}", parameters, **given)


PAIR = (
    entry("one:save", group="gs_library: both"),
    entry("two:load", group="gs_library: both"),
    entry("one:other"),
)


def replaced(function: object) -> bool:
    return hasattr(function, "__wrapped__")


def texts(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "fastshard" and r.levelno == level]


@pytest.mark.parametrize("before", [True, False])
def test_a_group_is_replaced_whole_or_not_at_all(library, caplog, before):
    library(PAIR, one="def save(): return 1\ndef other(): return 3\n", two="")
    if before:
        import gs_library.one  # noqa: F401
    fastshard.install()
    one = importlib.import_module("gs_library.one")
    assert one.save() == 1 and one.other() == ("ours", 3)
    assert not replaced(one.save)
    for _ in range(2):
        fastshard.install()
    [text] = texts(caplog)
    assert "save, load of gs_library 1.2" in text and "gs_library.two has no load" in text
    [found] = [r for r in fastshard.status().replacements if r.functions == ("save", "load")]
    assert (found.library, found.version, found.replaced) == ("gs_library", "1.2", False)
    assert "gs_library.two has no load" in found.why_not and found.why_not in str(fastshard.status())


def test_all_of_a_group_is_replaced_when_the_first_of_it_is_there(library):
    library(PAIR, one="def save(): return 1\ndef other(): return 3\n", two="def load(): return 2\n")
    fastshard.install()
    import gs_library.two

    assert not replaced(gs_library.two.load)  # nothing that it helps is there
    import gs_library.one

    assert gs_library.one.save() == ("ours", 1) and gs_library.two.load() == ("ours", 2)
    fastshard.uninstall()
    assert gs_library.one.save() == 1 and gs_library.two.load() == 2


def test_a_module_that_is_missing_is_told_by_its_name(library, caplog):
    library(PAIR, one="def save(): return 1\ndef other(): return 3\n")
    fastshard.install()
    import gs_library.one

    assert gs_library.one.save() == 1
    assert "there is no module gs_library.two" in texts(caplog)[0]


def test_modules_of_a_group_that_import_each_other(library):
    library(
        PAIR,
        one="from .two import load\ndef save(): return load()\ndef other(): return 3\n",
        two="import gs_library.one\ndef load(): return 2\n",
    )
    fastshard.install()
    import gs_library.one

    assert gs_library.one.save() == ("ours", ("ours", 2))


@pytest.mark.parametrize(("version", "whole"), [("4.57.6", True), ("5.0.0rc1", False), ("5.3", False)])
def test_what_a_version_does_not_have_yet_is_not_missing(library, caplog, version, whole):
    table = (PAIR[0], PAIR[1]._replace(since="5"))
    library(table, version, one="def save(): return 1\n", two="")
    fastshard.install()
    import gs_library.one

    assert replaced(gs_library.one.save) == whole
    assert (texts(caplog) == []) == whole


def test_what_the_implementation_uses_is_looked_for(library, caplog, monkeypatch):
    library(PAIR[2:], one="def other(): return 3\n", two="here = 1\n")
    needs = ("gs_library.two:here", "gs_library.two:gone")
    monkeypatch.setitem(patch_groups.NEEDS, PAIR[2].belongs_to, needs)
    fastshard.install()
    import gs_library.one

    assert gs_library.one.other() == 3
    assert "gs_library.two has no gone" in texts(caplog)[0]


def test_other_parameters_do_not_fit(library, caplog):
    table = (entry("one:save", "two", "first second"),)
    library(table, one="def save(second, first=2): return 'theirs'\n")
    fastshard.install()
    import gs_library.one

    assert gs_library.one.save(1) == "theirs"
    assert "takes (second, first), not (first, second)" in texts(caplog)[0]


def test_another_default_does_not_fit(library, caplog):
    library((entry("one:save", "two", "first second"),), one="def save(first, second=3): return 'theirs'\n")
    fastshard.install()
    import gs_library.one

    for _ in range(2):
        assert gs_library.one.save(1) == "theirs"
    [text] = texts(caplog)
    assert "the default of second is 3, not 2" in text
    assert not any(r.replaced for r in fastshard.status().replacements)
    assert fastshard.status().left == {"save": {"fastshard does not fit": 2}}


def test_an_implementation_that_cannot_be_imported_leaves_the_original(library, caplog):
    bad = entry("one:save")._replace(implementation="fastshard.no_such_module:save")
    library((bad,), one="def save(): return 'theirs'\n")
    fastshard.install()
    import gs_library.one

    assert gs_library.one.save() == "theirs" == gs_library.one.save()
    assert "no_such_module" in texts(caplog)[0] and len(texts(caplog)) == 1


def test_arguments_that_the_installed_version_does_not_have_are_its_own_error(library):
    library((entry("one:save", "two", "first"),), one="def save(first): return 'theirs'\n")
    fastshard.install()
    import gs_library.one

    assert gs_library.one.save(1) == ("ours", 1, 2)
    with pytest.raises(TypeError, match=r"^save\(\)"):
        gs_library.one.save(1, second=5)


def test_a_group_with_a_function_of_somebody_elses_is_left_alone(library, caplog):
    library(PAIR, one="def save(): return 1\ndef other(): return 3\n", two="def load(): return 2\n")
    import gs_library.one
    import gs_library.two

    gs_library.two.load = theirs = lambda: "theirs"
    fastshard.install()
    assert gs_library.one.save() == 1 and gs_library.two.load is theirs
    assert "gs_library.two.load is left alone" in texts(caplog)[0] and "with it save" in texts(caplog)[0]
    [found] = [r for r in fastshard.status().replacements if r.functions == ("save", "load")]
    assert "somebody else has replaced gs_library.two.load" in found.why_not


def test_a_wrapper_that_comes_later_is_no_news(library, caplog):
    library(PAIR, one="def save(): return 1\ndef other(): return 3\n", two="def load(): return 2\n")
    fastshard.install()
    import gs_library.one

    wrapped = gs_library.one.save
    gs_library.one.save = lambda: ["wrapped", wrapped()]
    fastshard.install()
    assert gs_library.one.save() == ["wrapped", ("ours", 1)] and texts(caplog) == []


BINDINGS = [
    "save(a, b)",
    "save(a, /, b=1)",
    "save(a, *, b)",
    "save(*a, b=2, **c)",
    "save(a, /, *, b=1)",
    "save()",
]


@pytest.mark.parametrize("signature", BINDINGS)
def test_the_binder_takes_what_the_function_takes(signature):
    import inspect

    made: dict[str, Any] = {}
    exec(f"def {signature}: return 0", made)
    takes = calls.binder(inspect.signature(made["save"]))
    for args in ((), (1,), (1, 2), (1, 2, 3)):
        for kwargs in ({}, {"a": 1}, {"b": 1}, {"a": 1, "b": 2}, {"c": 1}):
            outcomes = []
            for function in (made["save"], takes):
                try:
                    function(*args, **kwargs)
                    outcomes.append(True)
                except TypeError:
                    outcomes.append(False)
            assert outcomes[0] == outcomes[1], (args, kwargs)


# The libraries that are here ----------------------------------------------------------------------------


NOT_INSTALLED = {row.library for row in patch_table.TABLE if importlib.util.find_spec(row.library) is None}


def expected_of_the_installed() -> list[Entry]:
    """The rows of the table that the installed versions should have, imported."""
    of_the_installed = [row for row in patch_table.TABLE if row.library not in NOT_INSTALLED]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries
        for row in of_the_installed:
            importlib.import_module(row.library)
        rows = patch_groups.expected(of_the_installed)
        for row in rows:
            importlib.import_module(row.module)
    return rows


def test_what_an_old_version_does_not_have_is_not_missed(caplog, monkeypatch):
    pytest.importorskip("torch.distributed.checkpoint.hf_storage")
    monkeypatch.setattr(patch_groups, "version_of", lambda _: "2.4.0")
    with fastshard.installed():
        (found,) = [r for r in fastshard.status().replacements if "_FileSystemWriter.finish" in r.functions]
    assert not found.replaced and found.why_not == NOT_YET
    assert not any("distributed.checkpoint" in text for text in texts(caplog))


def test_the_installed_libraries_fit(caplog):
    expected_of_the_installed()
    with fastshard.installed():
        rest = [r for r in fastshard.status().replacements if not r.replaced and r.why_not != NOT_YET]
    assert {r.library for r in rest} == NOT_INSTALLED
    assert texts(caplog) == []


@pytest.mark.parametrize(
    ("module", "name", "method"),
    [
        ("transformers.integrations.accelerate", "load_offloaded_parameter", "save_pretrained"),
        ("transformers.utils.logging", "EmptyTqdm", "save_pretrained"),
        ("accelerate.utils.modeling", "get_state_dict_offloaded_model", "save_model"),
        (
            "huggingface_hub.serialization._torch",
            "_clean_state_dict_for_safetensors",
            "save_torch_state_dict",
        ),
    ],
)
def test_a_version_without_one_part_is_left_as_it_is(monkeypatch, caplog, module, name, method):
    rows = expected_of_the_installed()
    if any((row.module, row.attribute) == (module, name) for row in set(patch_table.TABLE) - set(rows)):
        pytest.skip(f"the installed version has no {name} yet")
    import accelerate
    import huggingface_hub.serialization._torch as hub
    import transformers

    owner = {
        "save_pretrained": transformers.PreTrainedModel,
        "save_model": accelerate.Accelerator,
        "save_torch_state_dict": hub,
    }[method]
    monkeypatch.delattr(f"{module}.{name}")
    with fastshard.installed():
        assert not replaced(vars(owner)[method])
        assert replaced(st.save_file) and replaced(torch.save)  # other groups
        assert f"{module} has no {name}" in str(fastshard.status())
    [text] = texts(caplog)
    assert f"{module} has no {name}" in text and method in text


@pytest.mark.parametrize(
    "name", ["safetensors.torch._remove_duplicate_names", "torch.serialization.skip_data"]
)
def test_private_names_of_others_break_no_import(name):
    home, _, attribute = name.rpartition(".")
    if not hasattr(importlib.import_module(home), attribute):
        pytest.skip(f"the installed version has no {attribute}")
    script = f"""
        import importlib, sys, io
        import {name.rpartition(".")[0]} as home
        delattr(home, {name.rpartition(".")[2]!r})
        import fastshard.auto, torch, safetensors.torch
        torch.save({{"a": torch.ones(2)}}, sys.argv[1])
        safetensors.torch.save({{"a": torch.ones(2)}})
        print(torch.load(sys.argv[1])["a"].sum().item())
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        result = run_bare(script, f"{folder}/x.pt")
    assert result.stdout == "2.0\n", result.stderr


# What is told -------------------------------------------------------------------------------------------


def test_one_line_at_installation_and_one_for_each_save(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fastshard")
    fastshard.install()
    fastshard.install()
    [text] = texts(caplog, logging.INFO)
    assert "torch.save of torch" in text and "save_file of safetensors" in text
    caplog.clear()
    st.save_file(TENSORS, tmp_path / "a.safetensors")
    torch.save(TENSORS, tmp_path / "b.pt")
    fastshard.save_files({tmp_path / "c": TENSORS, tmp_path / "d": TENSORS})
    st.save_model(torch.nn.Linear(2, 2), tmp_path / "e.safetensors")
    st.save(TENSORS)
    fastshard.save_torch_state_dict(dict(TENSORS), tmp_path)
    # Once, before the first save, where torch has no table of DLPack functions yet.
    lines = [
        line for line in texts(caplog, logging.INFO) if not line.startswith("a file is laid out in Python")
    ]
    names = ["save_file", "torch.save", "save_files", "save_model", "save", "save_torch_state_dict"]
    assert [line.split(":")[0] for line in lines] == names
    assert str(tmp_path / "a.safetensors") in lines[0] and ".fastshard" not in "".join(lines)
    saved = fastshard.status().saved
    assert list(saved) == names and all(total.saves == 1 for total in saved.values())
    assert saved["save_files"].files == 2
    assert saved["save_file"].nbytes == (tmp_path / "a.safetensors").stat().st_size
    for name in names:
        assert f"  {name}: 1 save(s)" in str(fastshard.status())


def test_a_save_that_fails_is_not_counted(tmp_path):
    fastshard.install()
    with pytest.raises(OSError):
        st.save_file(TENSORS, tmp_path / "no" / "where")
    with pytest.raises(KeyError):
        fastshard.save_torch_state_dict({"a": torch.ones(2, dtype=torch.complex128)}, tmp_path)
    assert fastshard.status().saved == {}


def test_what_is_left_to_the_original_is_counted(tmp_path):
    fastshard.install()
    torch.save(TENSORS, io.BytesIO())
    with open(tmp_path / "open.pt", "wb") as file:
        torch.save(TENSORS, file)
    seen = fastshard.status()
    assert sum(seen.left.get("torch.save", {}).values()) + seen.saved.get("torch.save", (0,))[0] == 2
    assert "BytesIO" in str(seen)


def test_others_savers_are_reached_and_counted(tmp_path, monkeypatch):
    """What the original calls is called, where somebody else has replaced that."""
    import huggingface_hub

    called: list[object] = []
    own = st.save_file

    def theirs(tensors: Any, filename: Any, metadata: Any = None) -> None:
        called.append(filename)
        own(tensors, filename, metadata)

    monkeypatch.setattr(st, "save_file", theirs)
    fastshard.install()
    st.save_model(torch.nn.Linear(2, 2), tmp_path / "m.safetensors")
    huggingface_hub.save_torch_state_dict(dict(TENSORS), tmp_path)
    assert [str(name) for name in called] == [
        str(tmp_path / "m.safetensors"),
        str(tmp_path / "model.safetensors"),
    ]
    assert set(fastshard.status().left) == {"save_model", "save_torch_state_dict"}


@pytest.mark.parametrize("place", ["torch", "both"])
@pytest.mark.parametrize("first", ["install", "wrapper"])
def test_a_wrapper_of_torch_save_is_called_once(tmp_path, monkeypatch, place, first):
    called: list[object] = []
    inner: list[Callable[..., None]] = []

    def wrapper(*args: Any, **kwargs: Any) -> None:
        called.append(args[1])
        inner[0](*args, **kwargs)

    def wrap() -> None:
        inner.append(torch.save)
        monkeypatch.setattr(torch, "save", wrapper)
        if place == "both":
            monkeypatch.setattr(torch.serialization, "save", wrapper)

    for step in (fastshard.install, wrap) if first == "install" else (wrap, fastshard.install):
        step()
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, path)
    assert called == [path] and [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    fastshard.torch_save({"a": torch.ones(2)}, path)
    assert called == [path]  # ours, by its own name, is not theirs
    fastshard.uninstall()
    assert torch.save is wrapper and isinstance(torch.load(path)["a"], torch.Tensor)


def test_status_is_a_name_of_the_package():
    assert "status" in fastshard.__all__ and isinstance(fastshard.status(), fastshard.Status)
    assert not any(isinstance(fastshard.status, kind) for kind in (types.ModuleType,))
    assert "not installed" in str(fastshard.status())
