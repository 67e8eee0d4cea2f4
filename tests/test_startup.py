# SPDX-License-Identifier: Apache-2.0
"""Activation without a line in a script: ``FASTSHARD_AUTO``, ``fastshard run``; ``FASTSHARD_DISABLE`` wins everywhere."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

import fastshard.integrations.sglang
import fastshard.integrations.vllm
from fastshard.base import settings
from fastshard.cli import command as cli

ROOT = Path(__file__).parent.parent
YES = ["1", "true", "Yes", " on ", "2", "y"]
NO = ["", "0", "false", "No", "OFF", " n ", "f", "never"]


def startup() -> str:
    """The line that setup.py installs."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STARTUP":
            line: str = ast.literal_eval(node.value)
            return line
    raise AssertionError("setup.py has no STARTUP")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages with nothing but the line, as what a Python finds that starts with it."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "fastshard_auto.pth").write_text(startup())
    return folder


def python(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python in whose start nothing else takes part: not the line of an installed fastshard either."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FASTSHARD_")}
    # What PYTHONPATH names is searched for modules, not for lines.
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    return subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
        env={**kept, **variables},
    )


STARTED = """
    import site, sys
    before = list(sys.meta_path), set(sys.modules)
    site.addsitedir({folder!r})
    new = {{name.partition(".")[0] for name in set(sys.modules) - before[1]}}
    print(sys.meta_path != before[0], "fastshard" in new, "torch" in new)
"""


@pytest.mark.parametrize("value", [None, *NO, *YES])
def test_every_python_starts_with_it_if_the_variable_says_so(site, value):
    variables = {} if value is None else {settings.AUTO_VARIABLE: value}
    done = python(STARTED.format(folder=str(site)), **variables)
    wanted = value in YES
    assert done.stdout == f"{wanted} {wanted} False\n", done.stderr
    assert done.stderr == ""


def test_the_line_has_the_rule_of_the_package():
    said = startup()
    assert said.startswith("import os; ") and said.count("\n") == 1
    assert all(repr(word) in said for word in settings._NO)


def test_disable_wins(site):
    variables = {settings.AUTO_VARIABLE: "1", "FASTSHARD_DISABLE": "yes"}
    done = python(STARTED.format(folder=str(site)), **variables)
    assert done.stdout == "False True False\n" and done.stderr == ""


@pytest.mark.parametrize("missing", ["fastshard", "fastshard.auto", "fastshard._native"])
def test_a_start_is_never_broken(site, missing):
    script = f"""
        import site, sys
        sys.modules[{missing!r}] = None
        site.addsitedir({str(site)!r})
        print("started")
    """
    done = python(script, **{settings.AUTO_VARIABLE: "1"})
    assert done.stdout == "started\n" and done.returncode == 0
    [line] = done.stderr.splitlines()
    assert line.startswith("fastshard: FASTSHARD_AUTO is set, but ")
    assert python(script).stderr == ""


def test_it_works_without_torch(site):
    script = f"""
        import site, sys
        sys.modules["torch"] = None
        site.addsitedir({str(site)!r})
        print("fastshard.auto" in sys.modules)
    """
    done = python(script, **{settings.AUTO_VARIABLE: "1"})
    assert done.stdout == "True\n" and done.stderr == ""


@pytest.mark.parametrize("command", ["build_py"])
def test_setup_puts_the_line_beside_the_package(tmp_path, command):
    pytest.importorskip("setuptools", "77")  # which reads how pyproject.toml names the license
    done = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "egg_info",
            "--egg-base",
            tmp_path,
            command,
            "--build-lib",
            tmp_path / "lib",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lib" / "fastshard_auto.pth").read_text() == startup()
    assert (tmp_path / "lib" / "fastshard" / "auto.py").is_file()


# fastshard run ------------------------------------------------------------------------------------------


def run_command(*arguments: object, path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FASTSHARD_")}
    # PYTHONPATH is on sys.path, but not a folder whose .pth files are run: the child's own `site` line does that.
    script = "import sys; from fastshard.cli.command import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", script, "run", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
        env={**kept, "PYTHONPATH": str(path), **variables},
    )


SEEN = "import os; print(os.environ.get('FASTSHARD_AUTO'))"


def test_run_becomes_the_command(site, tmp_path):
    done = run_command("python", "-c", SEEN + "; import sys; print(sys.prefix); sys.exit(7)", path=site)
    assert done.stdout.split() == ["1", sys.prefix] and done.returncode == 7
    script = tmp_path / "train.py"
    script.write_text(SEEN + "\nimport sys; print(sys.argv[1:])\n")
    done = run_command(script, "--lr", "1", path=site)
    assert done.stdout == "1\n['--lr', '1']\n" and done.returncode == 0
    done = run_command("--", "sh", "-c", "echo $FASTSHARD_AUTO; kill -TERM $$", path=site)
    assert done.stdout == "1\n" and done.returncode == -15
    assert run_command("-c", SEEN, path=site, FASTSHARD_AUTO="0").stdout == "1\n"


def test_run_tells_what_cannot_be_run(site, tmp_path):
    assert run_command(path=site).returncode == 2
    done = run_command("no-such-command", path=site)
    assert done.returncode == 127 and "no-such-command: command not found" in done.stderr
    assert "usage: fastshard run COMMAND" in run_command("--help", path=site).stdout
    unmade = tmp_path / "empty"
    unmade.mkdir()
    bare = run_command("python", "-c", SEEN, path=unmade)
    installed = any(Path(folder, "fastshard_auto.pth").is_file() for folder in sys.path)
    assert bare.returncode == (0 if installed else 1)
    assert installed or "fastshard_auto.pth is not installed" in bare.stderr


def test_workers_inherit_it(site):
    """Processes that are spawned start as their parents did."""
    script = f"""
        import multiprocessing, site, subprocess, sys
        import os
        code = "import site, sys; site.addsitedir({str(site)!r}); print('fastshard.auto' in sys.modules)"
        print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())
    """
    assert run_command("-c", textwrap.dedent(script), path=site).stdout == "True\n"


def test_env_tells_what_is_replaced(capsys):
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    rows = [
        line.split("  ", 1) for line in shown.splitlines() if line.startswith(("replaced by", "not replaced"))
    ]
    assert any("torch.save" in value for _, value in rows) and any("save_file" in value for _, value in rows)
    assert "FASTSHARD_AUTO, fastshard run" in shown


# Plugins ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "active"), [("1", False), ("true", False), ("false", True), ("no", True)])
def test_operators_switch_reaches_the_plugins(monkeypatch, value, active):
    monkeypatch.setenv("FASTSHARD_DISABLE", value)
    others = [finder for finder in sys.meta_path if finder is not fastshard.integrations.vllm._finder]
    monkeypatch.setattr(sys, "meta_path", others)
    fastshard.integrations.vllm.register()
    assert (fastshard.integrations.vllm._finder in sys.meta_path) == active
    registered = []
    registry = types.ModuleType("sglang.srt.plugins.hook_registry")
    registry.HookType = types.SimpleNamespace(REPLACE="replace")
    registry.HookRegistry = types.SimpleNamespace(register=lambda *args: registered.append(args))
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    fastshard.integrations.sglang.register()
    assert bool(registered) == active
