# SPDX-License-Identifier: Apache-2.0
"""What wheels are built of, and what they are called. ``make wheels`` builds them."""

from __future__ import annotations

import importlib.util
import itertools
import platform
import re
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from packaging import tags

import fastshard
from fastshard import _native

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "wheels"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"wheels_{name}", WHEELS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python from 3.11 on")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_each_python_and_architecture_gets_a_wheel() -> None:
    build = load("build")
    wheels = build.planned()
    assert len({wheel.tag for wheel in wheels}) == 10
    assert [wheel.architecture for wheel in wheels] == ["x86_64"] * 5 + ["aarch64"] * 5
    only = build.planned(["3.14"], ["aarch64"])
    assert [wheel.tag for wheel in only] == ["cp314-cp314-manylinux_2_28_aarch64"]
    assert only[0].suffix == ".cpython-314-aarch64-linux-gnu.so"


def test_tags_are_those_that_python_and_pip_look_for() -> None:
    version, machine = "{}.{}".format(*sys.version_info), platform.machine()
    build = load("build")
    if (
        version not in build.PYTHONS
        or machine not in build.ARCHITECTURES
        or sysconfig.get_config_var("Py_GIL_DISABLED")
    ):
        pytest.skip(f"no wheel is built for Python {version} on {machine}")
    (wheel,) = build.planned([version], [machine])
    assert wheel.suffix == sysconfig.get_config_var("EXT_SUFFIX")
    if tuple(map(int, platform.libc_ver()[1].split("."))) >= (2, 28):
        assert wheel.tag in {str(tag) for tag in tags.sys_tags()}


def test_cibuildwheel_builds_the_same() -> None:
    build, described = load("build"), project()
    config = described["tool"]["cibuildwheel"]
    assert config["build"].split() == [f"cp{version.replace('.', '')}-*" for version in build.PYTHONS]
    assert config["archs"] == list(build.ARCHITECTURES)
    images = {config[f"manylinux-{architecture}-image"] for architecture in build.ARCHITECTURES}
    assert images == {"manylinux_" + build.GLIBC.replace(".", "_")}
    assert described["project"]["requires-python"] == f">={build.PYTHONS[0]}"


def test_what_is_put_into_wheels_is_pinned() -> None:
    group = project()["dependency-groups"]["wheels"]
    kernels = load("kernels")
    requirements = [*group, *kernels.COMPILERS, kernels.BINDER]
    assert [
        requirement for requirement in requirements if not re.fullmatch(r"[\w-]+==[\d.]+", requirement)
    ] == []


def test_kernels_include_what_nvrtc_is_given() -> None:
    """NVRTC has no standard library: of each header of it that the kernels include there is a text."""
    kernels = load("kernels")
    standard, seen, left = set(), set(), [kernels.KERNELS]
    while left:
        text = left.pop().read_text()
        standard |= set(re.findall(r"^#include <(.+)>", text, re.MULTILINE))
        own = {ROOT / "csrc" / name for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE)}
        left += own - seen
        seen |= own
    assert len(seen) > 5
    assert standard - set(kernels.STANDARD) == set()


def test_headers_are_of_the_python_that_was_asked_for(tmp_path: Path) -> None:
    headers = load("headers")
    (tmp_path / "patchlevel.h").write_text('#define PY_VERSION       \t"3.13.5+"\n')
    assert not headers.is_of(tmp_path, "3.13")  # there is no Python.h
    (tmp_path / "Python.h").touch()
    assert headers.is_of(tmp_path, "3.13")
    assert not headers.is_of(tmp_path, "3.1")
    assert not headers.is_of(tmp_path, "3.12")


def test_the_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert versions[0] == ("Unreleased", "")
    assert versions[1][0] == fastshard.__version__
    assert all(newer[1] >= older[1] > "" for newer, older in itertools.pairwise(versions[1:]))
    assert all(date for _, date in versions[1:])


def test_the_version_is_written_down_once() -> None:
    named = re.compile(
        rf"\bversion\s*[:=]\s*[\"']?{re.escape(fastshard.__version__)}[\"']?\s*$", re.MULTILINE
    )
    places = [ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "CITATION.cff", ROOT / "CMakeLists.txt"]
    places += [
        path for path in (ROOT / "fastshard").rglob("*.py") if path != ROOT / "fastshard" / "__init__.py"
    ]
    assert [str(path) for path in places if named.search(path.read_text())] == []
    assert project()["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastshard.__version__"}


def test_the_native_module_names_no_folder_of_the_machine_that_built_it() -> None:
    content = Path(_native.__file__).read_bytes()
    assert b"/proc/self/" in content  # so strings are seen
    assert str(ROOT).encode() + b"/" not in content
    assert str(Path.home()).encode() + b"/" not in content
