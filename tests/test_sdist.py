# SPDX-License-Identifier: Apache-2.0
"""The source distribution holds what it takes to build and test it. ``make test-versions`` builds wheels from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "CMakeLists.txt",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "mkdocs.yml",
    "README.md",
    "DESIGN.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "RELEASING.md",
    "CITATION.cff",
    "pyproject.toml",
    "setup.py",
)
FOLDERS = ("bench", "csrc", "docs", "examples", "fastshard", "tests", "wheels")
MADE = shutil.ignore_patterns("__pycache__", "*.so", "out", "build", ".*_cache", ".hypothesis")


def test_a_source_distribution_is_whole(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in PARTS:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=MADE, symlinks=True)
    (source / "fastshard" / "bench").unlink(missing_ok=True)  # a link in a checkout that is worked on
    expected = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    script = "import setuptools.build_meta as backend; backend.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True)
    (made,) = (source / "dist").iterdir()
    with tarfile.open(made) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert expected - found == set()
    more = {name for name in found - expected if not name.startswith("fastshard.egg-info/")}
    assert more == {"PKG-INFO", "setup.cfg"}
