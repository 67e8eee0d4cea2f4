# SPDX-License-Identifier: Apache-2.0
"""bench/gpu.py, the run for a machine that is lent for ten minutes: its clock, its build, its order. No GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastshard.bench import budget, build, gpu
from fastshard.bench.brief import MOST_LINES, brief

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    """Also where an installed package is tested, which has no tests beside it."""
    monkeypatch.setattr(gpu, "ROOT", ROOT)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_budget_is_shared():
    now = [100.0]
    clock = budget.Budget(60, lambda: now[0])
    assert (clock.left(), clock.share(20), clock.share(100), clock.share(50, keep=30)) == (60, 20, 60, 30)
    now[0] += 40
    assert (clock.left(), clock.share(20), clock.share(50, keep=30)) == (20, 20, 0)
    now[0] += 40
    assert (clock.left(), clock.share(20)) == (0, 0)


def test_a_command_and_its_output(tmp_path):
    log = tmp_path / "log"
    environment = {"A_VARIABLE": "seen"}
    code = "import os, sys; print(os.environ['A_VARIABLE'], os.getcwd()); sys.exit(3)"
    done = budget.run(python(code), 30, log, environment, tmp_path)
    assert (done.status, done.timed_out, done.ok) == (3, False, False)
    assert done.output.split() == ["seen", str(tmp_path)]
    assert budget.run(python("print('again')"), 30, log).output == "again\n"
    assert "seen" in log.read_text() and "again" in log.read_text()


def _runs(state: Path) -> bool:
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_command_that_takes_too_long_is_ended_with_all_it_started(tmp_path):
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    done = budget.run(python(code), 0.5, tmp_path / "log")
    assert done.timed_out and not done.ok
    assert time.monotonic() - began < budget.GRACE_SECONDS + 5
    grandchild = int(done.output.split()[0])
    state = Path(f"/proc/{grandchild}/stat")
    while _runs(state):  # a kill takes its time where others want the core
        assert time.monotonic() - began < 30
        time.sleep(0.01)


def test_a_command_that_does_not_listen_is_ended_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "GRACE_SECONDS", 0.2)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    done = budget.run(python(code), 1.0, tmp_path / "log")
    assert done.timed_out and done.status == -signal.SIGKILL


def test_without_tools_what_was_built_before_serves(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    for folder in ("fastshard", "bench"):
        (checkout / folder).mkdir(parents=True)
        (checkout / folder / "__init__.py").write_text("")
    module = checkout / "fastshard" / f"_native{build.SUFFIX}"
    module.write_bytes(b"for another Python")
    monkeypatch.setattr(build, "missing_tools", lambda: ["cmake"])
    tried = []

    def try_(path, log):
        tried.append(path)
        return "kernels absent" if len(tried) == 1 else None

    monkeypatch.setattr(build, "_try", try_)
    log = tmp_path / "build.log"
    found = build.make(checkout, tmp_path / "site", 10, log)
    assert found.how.startswith("built before") and found.path == tmp_path / "site"
    assert (found.path / "fastshard" / module.name).is_file()
    assert (found.path / "fastshard" / "bench" / "__init__.py").is_file()
    assert "missing: cmake" in log.read_text()
    # It cannot be loaded, nor is one installed: nothing is left.
    assert build.make(checkout, tmp_path / "again", 10, log) is None
    assert tried == [tmp_path / "site", tmp_path / "again", None]


def test_tools_are_looked_for(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.util, "find_spec", lambda name: None)
    assert build.missing_tools() == ["a C++ compiler", "cmake", "ninja or make", "pybind11"]


def test_the_package_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "/other")
    assert build.environment(tmp_path)["PYTHONPATH"] == f"{tmp_path}:/other"
    assert "PYTHONPATH" not in build.environment(None)
    assert build.environment(None)["PATH"].startswith(os.path.dirname(sys.executable))


def arguments(out: Path, *more: str):
    return gpu._parser().parse_args(["--out", str(out), *more])


def test_commands_of_the_phases(tmp_path):
    run = gpu.Run(arguments(tmp_path, "--cases", "small", "--commit", "abc", "--shm", "/dev/shm"), tmp_path)
    run.site = tmp_path / "site"
    tests = run.test_command()
    assert str(ROOT / "tests" / "test_cuda_path.py") in tests
    assert not any(name.endswith("test_bench.py") for name in tests)
    assert run.environment()["FASTSHARD_REQUIRE_CUDA"] == "1"
    assert run.environment()[gpu.COMMIT_VARIABLE] == "abc"
    command = run.bench_command(300.0)
    given = dict(zip(command[2::2], command[3::2]))
    assert given["--budget"] == "275" and given["--device"] == "cuda" and given["--gib"] == "8.0"
    assert given["--cases"] == "small" and given["--shm"] == "/dev/shm"


def test_earlier_phases_leave_the_bench_its_part(tmp_path, monkeypatch):
    given = {}

    def fake(command, seconds, log, environment=None, cwd=None):
        given[log.name] = seconds
        return budget.Outcome(0, 0.0, False, "25 passed in 1 s")

    monkeypatch.setattr(gpu.budget, "run", fake)
    run = gpu.Run(arguments(tmp_path, "--budget", "100", "--probe", "x.py --gib 1"), tmp_path)
    for phase in ("tests", "probe", "bench"):
        run.phase(phase, getattr(run, phase))
    assert 0 < given["tests.log"] <= 50 and 0 < given["probe.log"] <= 50
    assert 90 < given["bench.txt"] < 100
    assert [phase["state"] for phase in run.phases] == ["ok", "ok", "ok"]
    assert json.loads((tmp_path / "gpu.json").read_text())["phases"][0]["note"] == "25 passed in 1 s"


def test_a_phase_that_breaks_is_noted(tmp_path, monkeypatch):
    run = gpu.Run(arguments(tmp_path), tmp_path)
    run.phase("bench", lambda: 1 / 0)
    assert run.phases[0]["state"] == "failed" and "ZeroDivisionError" in run.phases[0]["note"]
    monkeypatch.setattr(gpu.util, "find_spec", lambda name: None)
    run.phase("tests", run.tests)
    assert run.phases[1]["state"] == "left out" and run.phases[1]["note"] == "no pytest here"
    output = "....F\nFAILED test_cuda_path.py::test_real_large[cuda] - RuntimeError: x\n1 failed, 4 passed in 2 s\n"
    monkeypatch.setattr(gpu.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(gpu.budget, "run", lambda *_: budget.Outcome(1, 2.0, False, output))
    run.phase("tests", run.tests)
    assert run.phases[2]["state"] == "failed"
    assert run.phases[2]["note"] == "1 failed, 4 passed in 2 s: test_real_large[cuda]"


def test_the_short_table_is_short():
    row = {"rival": "fastshard", "mode": "return", "error": None, "median_gib_s": 2.0, "ratio": None}
    case = {"name": "x", "skipped": None, "nbytes": 1 << 30, "rows": [row] * 2, "disturbance": []}
    case |= {"us": "fastshard", "base": "safetensors"}
    skipped = {"name": "y", "skipped": "no room", "rows": [], "disturbance": []}
    machine = dict.fromkeys(["gpu", "cpus", "filesystem", "torch", "safetensors", "commit"], "?")
    goal = {"case": "x", "mode": "return", "against": "link", "limit": 0.5}
    document = {
        "machine": {**machine, "memory_nbytes": 0},
        "cases": [case, skipped] * 20,
        "sound": False,
        "verdict": [{"goal": goal, "value": None, "state": "not measured"}],
    }
    phases = [{"name": "build", "state": "ok", "seconds": 1.0, "note": "n" * 500}]
    lines = brief(phases, document).splitlines()
    assert len(lines) == MOST_LINES and lines[-1] == "..."
    assert any(line.split() == ["y", "skipped:", "no", "room"] for line in lines)
    document["cases"] = [case]
    assert "NOT VERIFIED" in brief(phases, document) and "not measured" in brief(phases, document)
    assert max(map(len, brief(phases, document).splitlines())) <= 150
    assert brief(phases, None).endswith("no bench")


def test_all_of_it_without_a_gpu(tmp_path):
    """From the checkout, as it is started on a GPU, with the module built before."""
    probe = tmp_path / "probe.py"
    probe.write_text("import fastshard, sys; print('asked', sys.argv[1])")
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--tiny", "--no-build"]
    command += ["--cases", "small,tmpfs-eight", "--probe", f"{probe} twice", "--commit", "abc"]
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        [*command, "--dir", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    document = json.loads((out / "gpu.json").read_text())
    assert [(p["name"], p["state"]) for p in document["phases"]] == [
        (name, "ok") for name in ("build", "tests", "probe", "bench")
    ]
    assert [case["name"] for case in document["bench"]["cases"]] == ["small", "tmpfs-eight"]
    assert "asked twice" in (out / "probe.log").read_text()
    assert "time to return" in (out / "bench.txt").read_text()
    assert (out / "gpu.txt").read_text().strip() in done.stdout
    assert len((out / "gpu.txt").read_text().splitlines()) <= MOST_LINES
    assert len(list(out.iterdir())) <= 8
    assert not list(tmp_path.glob("fastshard-bench-*"))


@pytest.mark.parametrize("name", ["samples", "machine", "budget", "build", "brief", "gpu"])
def test_what_runs_before_torch_needs_none(name):
    code = f"import sys; sys.modules['torch'] = None; sys.path.append({str(ROOT)!r}); import bench.{name}"
    subprocess.run(python(code), check=True)
