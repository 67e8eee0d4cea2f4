#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs tests against the oldest, a middle and the newest versions of what fastshard works with: ``make test-versions``.

A source distribution is made first. Each set of versions gets a virtual environment of its own, in which fastshard is
built from that, and which is taken away afterwards (torch's CUDA builds take 5 GB). In all of them the tests of the
ecosystem run in full, of the rest a chosen part, out of the source distribution. A Python that the machine does not have
is brought by a Debian in a folder where that is possible (``debian_root``), and else replaced by the nearest one that the
machine has, which is said under the table.

    python tests/versions.py [NAME ...]      sets by name, or all of them
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import debian_root

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "versions"
DEBIAN = WORK / "debian"


@dataclass(frozen=True)
class Versions:
    """A set of versions that are tested together."""

    name: str
    pythons: tuple[str, ...]
    """In order of preference."""
    requirements: tuple[str, ...]


SETS = (
    Versions(
        "oldest",
        ("3.10", "3.11"),
        (
            "torch==2.4.0",
            "numpy<2",
            "transformers==4.46.3",
            "accelerate==1.0.0",
            "huggingface_hub==0.26.0",
            "safetensors==0.5.0",
            "diffusers==0.31.0",
        ),
    ),
    Versions(
        "middle",
        ("3.11", "3.12"),
        (
            "torch==2.13.0",
            "numpy",
            "transformers==4.57.*",
            "accelerate==1.10.*",
            "huggingface_hub==0.36.*",
            "safetensors==0.6.*",
            "diffusers==0.36.*",
        ),
    ),
    Versions(
        "newest",
        ("3.14", "3.13", "3.12"),
        (
            "torch==2.15.*",
            "numpy",
            "transformers>=5.24",
            "accelerate==1.15.*",
            "lightning==2.6.*",
            "huggingface_hub>=2,<3",
            "safetensors==0.8.*",
            "torch_checkpointing==0.1.1",
            "diffusers==0.42.*",
        ),
    ),
)
TOOLS = ("pytest", "hypothesis", "tqdm", "packaging")
SHOWN = (
    "torch",
    "transformers",
    "accelerate",
    "diffusers",
    "lightning",
    "huggingface_hub",
    "safetensors",
    "numpy",
)

ECOSYSTEM = (
    "test_install.py",
    "test_patch_groups.py",
    "test_user_code.py",
    "test_startup.py",
    "test_hub.py",
    "test_transformers.py",
    "test_diffusers.py",
    "test_async_trainer.py",
    "test_distributed_training.py",
    "test_lightning.py",
    "test_torch_checkpointing.py",
    "test_offload.py",
    "test_archive.py",
    "test_in_place.py",
    "test_safetensors_contract.py",
)
CHOSEN = (
    "test_byte_identity.py",
    "test_casts.py",
    "test_layout.py",
    "test_sharing.py",
    "test_sharded.py",
    "test_sources.py",
    "test_convert.py",
    "test_manifest_saves.py",
    "test_incremental.py",
    "test_statements.py",
)
INSTALL_SECONDS, TEST_SECONDS = 900, 1500


@dataclass(frozen=True)
class Interpreter:
    """A Python that runs here."""

    version: str
    path: str
    entrance: tuple[object, ...] = ()
    """What stands before each command that is to run where it is."""

    def __str__(self) -> str:
        return f"{self.version} (Debian's)" if self.entrance else self.version


@dataclass
class Outcome:
    """What became of one set."""

    name: str
    python: str = "none found"
    versions: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    trouble: str = ""
    seconds: float = 0.0
    nbytes: int = 0

    @property
    def good(self) -> bool:
        return not self.trouble and not self.failed and self.counts.get("passed", 0) > 0


def interpreters() -> dict[str, str]:
    """``"3.11"`` -> an interpreter that runs: on the path, or one of pyenv's."""
    found: dict[str, str] = {}
    candidates = [
        sys.executable,
        *filter(None, (shutil.which(f"python3.{minor}") for minor in range(10, 20))),
    ]
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True).stdout.strip()
        candidates += map(str, sorted(Path(root).glob("versions/3.*/bin/python"), reverse=True))
    for candidate in candidates:
        script = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        answer = subprocess.run([candidate, "-c", script], capture_output=True, text=True)
        if answer.returncode == 0 and int(answer.stdout.split(".")[1]) >= 10:
            found.setdefault(answer.stdout.strip(), candidate)
    return found


def candidates(versions: Versions, pythons: dict[str, str], log: Path) -> Iterator[Interpreter]:
    """The interpreters that a set can run with, the best first."""
    wanted = versions.pythons[0]
    if wanted not in pythons and debian_root.make(DEBIAN, wanted, functools.partial(call, log=log)):
        entrance = tuple(debian_root.entrance(DEBIAN, WORK))
        yield Interpreter(wanted, f"/usr/bin/python{wanted}", entrance)
    for version in versions.pythons:
        if version in pythons:
            yield Interpreter(version, pythons[version])


def environment() -> dict[str, str]:
    """Of pip: no constraint of the machine keeps back what is tested."""
    return {
        **os.environ,
        "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin",
        "PIP_CONSTRAINT": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_RETRIES": "10",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_NO_COMPILE": "1",
        "CMAKE_ARGS": os.environ.get("CMAKE_ARGS", "-DFASTSHARD_KERNELS=OFF"),
    }


def call(command: list[object], log: Path, seconds: float = INSTALL_SECONDS, folder: Path = WORK) -> bool:
    """Whether it ends well in time; what it says is added to the log, and nothing that it started goes on."""
    with open(log, "a") as out:
        print("$", *command, file=out, flush=True)
        try:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=folder,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            print(error, file=out)
            return False
        with process:
            try:
                return process.wait(seconds) == 0
            except subprocess.TimeoutExpired:
                print(f"not done after {seconds} s", file=out)
                return False
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def make_source(python: str, log: Path) -> Path | None:
    """The source distribution, unpacked; ``None`` where it cannot be made."""
    tools, made = WORK / "tools", WORK / "dist"
    for folder in (tools, made):
        shutil.rmtree(folder, ignore_errors=True)
    steps: list[list[object]] = [
        [python, "-m", "venv", tools],
        [tools / "bin" / "python", "-m", "pip", "install", "-q", "build"],
        [tools / "bin" / "python", "-m", "build", "-q", "--sdist", "--outdir", made, ROOT],
    ]
    if not all(call(step, log) for step in steps):
        return None
    (archive,) = made.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(made)
    (source,) = (path for path in made.iterdir() if path.is_dir())
    return source


def run(versions: Versions, pythons: dict[str, str], source: Path, log: Path) -> Outcome:
    outcome = Outcome(versions.name, trouble=f"needs Python {' or '.join(versions.pythons)}")
    place = WORK / versions.name
    for interpreter in candidates(versions, pythons, log):
        outcome.python = str(interpreter)
        outcome.trouble = prepare(interpreter, versions, place, log)
        if not outcome.trouble:
            test(interpreter, place, source, log, outcome)
            break
    return outcome


def prepare(interpreter: Interpreter, versions: Versions, place: Path, log: Path) -> str:
    """Makes the environment; what could not be done, if anything."""
    shutil.rmtree(place, ignore_errors=True)
    python = place / "bin" / "python"
    steps: list[tuple[str, list[object]]] = [
        ("make an environment", [interpreter.path, "-m", "venv", place]),
        ("update pip", [python, "-m", "pip", "install", "-q", "--upgrade", "pip"]),
        ("install the versions", [python, "-m", "pip", "install", "-q", *versions.requirements, *TOOLS]),
    ]
    for what, command in steps:
        if not call([*interpreter.entrance, *command], log):
            return f"could not {what}"
    return ""


def test(interpreter: Interpreter, place: Path, source: Path, log: Path, outcome: Outcome) -> None:
    shutil.rmtree(source / "build", ignore_errors=True)  # made with another Python, maybe another compiler
    report = WORK / f"{outcome.name}.xml"
    report.unlink(missing_ok=True)
    python = [*interpreter.entrance, place / "bin" / "python"]
    if not call([*python, "-m", "pip", "install", "-q", "--no-deps", source], log):
        outcome.trouble = "could not install fastshard"
        return
    outcome.versions = installed(python)
    outcome.nbytes = sum(path.lstat().st_size for path in place.rglob("*"))
    tests = [f"tests/{name}" for name in (*ECOSYSTEM, *CHOSEN) if (source / "tests" / name).exists()]
    # Others' warnings are news only of the newest; ours have tests of their own.
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--disable-warnings", "-rs"]
    # Not by "python -m", which would look for fastshard in the source first.
    pytest = [*interpreter.entrance, place / "bin" / "pytest", *options, f"--junitxml={report}", *tests]
    ended = call(pytest, log, TEST_SECONDS, source)
    if report.exists():
        read_report(report, outcome)
    if not ended and not outcome.failed:
        outcome.trouble = "the tests did not come to an end"


def installed(python: list[object]) -> dict[str, str]:
    script = (
        "import importlib.metadata as m\n"
        "there = {found.name.replace('-', '_') for found in m.distributions()}\n"
        f"for name in {SHOWN!r}:\n"
        "    if name in there: print(name, m.version(name))"
    )
    command = [*map(str, python), "-c", script]
    said = subprocess.run(command, cwd=WORK, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(line.split() for line in said.splitlines())


def read_report(report: Path, outcome: Outcome) -> None:
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for case in cases(report):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind == "failed":
            outcome.failed.append(f"{case.get('classname')}::{case.get('name')}")
    outcome.counts = counts


def cases(report: Path) -> Iterator[ElementTree.Element]:
    return ElementTree.parse(report).getroot().iter("testcase")


def table(outcomes: list[Outcome]) -> str:
    rows = [["", "python", *SHOWN, "passed", "failed", "skipped", "minutes", "GB"]]
    for outcome in outcomes:
        rows.append(
            [
                outcome.name,
                outcome.python,
                *(re.sub(r"\+.*", "", outcome.versions.get(name, "-")) for name in SHOWN),
                *(str(outcome.counts.get(kind, "-")) for kind in ("passed", "failed", "skipped")),
                f"{outcome.seconds / 60:.1f}",
                f"{outcome.nbytes / 1e9:.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *(versions.name for versions in SETS)])
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    arguments = parser.parse_args()
    chosen = [versions for versions in SETS if not arguments.names or versions.name in arguments.names]
    WORK.mkdir(parents=True, exist_ok=True)
    pythons = interpreters()
    print("Python here:", ", ".join(sorted(pythons, key=lambda v: int(v.split(".")[1]))), flush=True)
    log = WORK / "sdist.log"
    log.unlink(missing_ok=True)
    source = make_source(sys.executable, log)
    if source is None:
        print(log.read_text(errors="replace"), "the source distribution could not be made", sep="\n")
        return 1
    outcomes = []
    for versions in chosen:
        log = WORK / f"{versions.name}.log"
        log.unlink(missing_ok=True)
        began = time.monotonic()
        outcome = run(versions, pythons, source, log)
        outcome.seconds = time.monotonic() - began
        outcomes.append(outcome)
        if not arguments.keep:
            for made in (WORK / versions.name, DEBIAN):
                shutil.rmtree(made, ignore_errors=True)
        print(f"{outcome.name}: {'good' if outcome.good else outcome.trouble or 'tests failed'}", flush=True)
        for name in outcome.failed:
            print("  failed:", name)
        if outcome.trouble and log.exists():
            print(*log.read_text(errors="replace").splitlines()[-30:], sep="\n")
    print(table(outcomes))
    for versions, outcome in zip(chosen, outcomes):
        if outcome.python.split()[0] != versions.pythons[0]:
            wanted = f"Python {versions.pythons[0]} ({versions.name})"
            print(f"not tried: {wanted}, which is not to be had here: {WORK / versions.name}.log says why")
    totals = [sum(outcome.counts.get(kind, 0) for outcome in outcomes) for kind in ("passed", "failed")]
    print(f"{totals[0]} passed, {totals[1]} failed")
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
