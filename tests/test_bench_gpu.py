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

from fastshard.bench import budget, build, cases, gpu, gpu_tests
from fastshard.bench.brief import MOST_LINES, brief
from fastshard.bench.goals import GOALS

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
    # A shell, which has told its child's number long before the time is up, however busy the machine is.
    command = ["sh", "-c", "sh -c 'echo $$; exec sleep 600'; true"]
    done = budget.run(command, 1.0, tmp_path / "log")
    assert done.timed_out and not done.ok
    grandchild = int(done.output.split()[0])
    state = Path(f"/proc/{grandchild}/stat")
    while _runs(state):  # a kill takes its time where others want the core
        time.sleep(0.01)


def test_a_command_that_does_not_listen_is_ended_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "GRACE_SECONDS", 0.2)
    command = ["sh", "-c", "trap '' INT; sleep 600"]
    done = budget.run(command, 1.0, tmp_path / "log")
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


def given_to(command: list[str]) -> dict[str, str]:
    """Options of bench/save.py, and their values."""
    return {a: b for a, b in zip(command, command[1:]) if a.startswith("--")}


def test_commands_of_the_phases(tmp_path):
    run = gpu.Run(arguments(tmp_path, "--cases", "small", "--commit", "abc", "--shm", "/dev/shm"), tmp_path)
    run.site = tmp_path / "site"
    assert run.environment()["FASTSHARD_REQUIRE_CUDA"] == "1"
    assert run.environment()[gpu.COMMIT_VARIABLE] == "abc"
    command = run.bench_command(300.0)
    given = given_to(command)
    assert given["--budget"] == "275" and given["--device"] == "cuda" and given["--gib"] == "4.0"
    assert given["--cases"] == "small" and given["--shm"] == "/dev/shm"
    assert "--fit" in command  # smaller rather than not at all


def test_the_parts_have_all_cases_of_a_gpu_the_goals_first(tmp_path):
    goals = [goal.case for goal in GOALS if goal.on == "cuda"]
    both = [name for names in gpu.PARTS.values() for name in names]
    assert sorted(both) == sorted(name for name, case in cases.CASES.items() if "cuda" in case.default_on)
    assert set(goals) <= set(both)
    for part, names in gpu.PARTS.items():
        aims = [name in goals for name in names]
        assert aims == sorted(aims, reverse=True)
        run = gpu.Run(arguments(tmp_path, "--part", str(part), "--probe", "x.py"), tmp_path)
        assert given_to(run.bench_command(300.0))["--cases"] == ",".join(names)
    assert run.names == ["build", "memory", "bench", "sanitizer", "probe"]
    run = gpu.Run(arguments(tmp_path, "--part", "1", "--no-tests"), tmp_path)
    assert run.names == ["build", "memory", "bench"]
    run = gpu.Run(arguments(tmp_path), tmp_path)
    assert given_to(run.bench_command(300.0))["--cases"] == ",".join(both)
    assert run.names == ["build", "memory", "tests", "bench", "sanitizer"]


def test_earlier_phases_leave_the_bench_its_part_and_it_leaves_theirs_to_later_ones(tmp_path, monkeypatch):
    given = {}

    def fake(command, seconds, log, environment=None, cwd=None):
        given[command[1] if log.name == "build.log" else log.name] = seconds
        return budget.Outcome(0, 0.0, False, "25 passed in 1 s")

    monkeypatch.setattr(gpu.budget, "run", fake)
    monkeypatch.setattr(gpu_tests, "find_sanitizer", lambda: None)
    run = gpu.Run(arguments(tmp_path, "--budget", "100", "--probe", "x.py --gib 1"), tmp_path)
    for phase in ("memory", "tests", "bench", "sanitizer", "probe"):
        run.phase(phase, getattr(run, phase))
    assert 0 < given[str(ROOT / "bench" / "grow.py")] <= 50 and 0 < given["tests.log"] <= 50
    assert 45 < given["bench.txt"] <= 60 and 80 < given["probe.log"] <= 95
    assert [phase["state"] for phase in run.phases] == ["ok", "ok", "ok", "left out", "ok"]
    assert json.loads((tmp_path / "gpu.json").read_text())["phases"][1]["note"] == "25 passed in 1 s"


def test_what_is_running_is_on_disk(tmp_path):
    """Should the whole run be killed, one knows in what."""
    run = gpu.Run(arguments(tmp_path), tmp_path)
    seen = []

    def work():
        seen.append(json.loads((tmp_path / "gpu.json").read_text())["phases"])
        return "ok", ""

    run.phase("bench", work)
    assert [(p["name"], p["state"]) for p in seen[0]] == [("bench", "running")]


PROBE = """
import json, os, signal, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
signal.signal(signal.SIGINT, signal.SIG_IGN)
with open(given["--json"], "w") as out:
    json.dump({"seconds": given["--seconds"]}, out)
open(os.path.join(given["--dir"], "fastshard-probe.left"), "w").close()
print("answered", flush=True)
time.sleep(float(given["--sleep"]))
"""


@pytest.mark.parametrize("sleep", [0, 60])
def test_a_probe_has_its_own_deadline_and_one_that_is_killed_loses_little(tmp_path, monkeypatch, sleep):
    monkeypatch.setattr(budget, "GRACE_SECONDS", 0.2)
    monkeypatch.setitem(gpu.CAPS, "probe", 3.0)
    out, scratch, disk = (tmp_path / name for name in ("out", "scratch", "disk"))
    for folder in (out, scratch, disk):
        folder.mkdir()
    (disk / "fastshard-before").touch()
    (tmp_path / "probe.py").write_text(PROBE)
    probe = f"{tmp_path / 'probe.py'} --sleep {sleep} --dir {disk}"
    run = gpu.Run(arguments(out, "--probe", probe, "--dir", str(disk), "--shm", str(disk)), scratch)
    run.phase("probe", run.probe)
    assert run.phases[0]["state"] == ("cut off" if sleep else "ok")
    assert run.phases[0]["note"].startswith("1 answers")
    assert json.loads((out / "gpu.json").read_text())["probe"] == {"seconds": "2"}
    assert "answered" in (out / "probe.log").read_text()
    # What ended well has removed its files itself, or wants them to stay.
    left = {"fastshard-before"} if sleep else {"fastshard-before", "fastshard-probe.left"}
    assert set(os.listdir(disk)) == left


SANITIZER = """#!/bin/sh
echo "$@" >> {log}
case "$2" in memcheck) echo "20 passed in 3.10s"; echo "========= ERROR SUMMARY: 0 errors" ;;
*) echo "20 passed in 4.00s"; echo "========= RACECHECK SUMMARY: 2 hazards displayed"; exit {status} ;; esac
"""


@pytest.mark.parametrize("status, state", [(0, "ok"), (86, "failed")])
def test_compute_sanitizer_watches_the_kernels_once(tmp_path, monkeypatch, status, state):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(log=tmp_path / "asked", status=status))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run = gpu.Run(arguments(tmp_path), tmp_path)
    run.phase("sanitizer", run.sanitizer)
    assert run.phases[0]["state"] == state
    memcheck, racecheck = run.phases[0]["note"].split("; ")
    assert memcheck.startswith("memcheck ok") and "20 passed in 3.10s, ERROR SUMMARY: 0 errors" in memcheck
    assert racecheck.startswith(f"racecheck {state}") and "2 hazards" in racecheck
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[1] for line in asked] == ["memcheck", "racecheck"]
    assert all("-m pytest" in line and "-m real_gpu" in line and "test_real_gpu.py" in line for line in asked)


def test_without_compute_sanitizer_that_is_said(tmp_path, monkeypatch):
    run = gpu.Run(arguments(tmp_path), tmp_path)
    monkeypatch.setattr(gpu_tests, "find_sanitizer", lambda: None)
    run.phase("sanitizer", run.sanitizer)
    monkeypatch.setattr(gpu_tests, "find_sanitizer", lambda: "it")
    refusal = budget.Outcome(1, 1.0, False, "========= Error: Device not supported.\n")
    monkeypatch.setattr(gpu.budget, "run", lambda *_: refusal)
    run.phase("sanitizer", run.sanitizer)
    assert [phase["state"] for phase in run.phases] == ["left out"] * 2
    assert run.phases[0]["note"] == "no compute-sanitizer here"
    assert run.phases[1]["note"].count("Device not supported") == 2


def test_the_marker_chooses_what_needs_a_gpu():
    """By the fixtures, also in files whose names and tests do not say so."""
    command = gpu_tests.command(ROOT)
    files = {Path(name).name for name in command if name.endswith(".py")}
    assert {"test_cuda_path.py", "test_real_gpu.py", "test_sharded.py", "test_archive.py"} <= files
    assert "test_limits.py" not in files
    done = subprocess.run([*command, "--collect-only"], capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line for line in done.stdout.splitlines() if "::" in line]
    for wanted in ("test_parameters_on_a_device", "test_on_a_real_gpu", "test_real_bytes[cuda]"):
        assert any(name.endswith(wanted) for name in names), wanted
    for kind in ("small", "strided", "cast"):
        assert any(f"test_real_prepared[real-{kind}]" in name for name in names)
    assert not [name for name in names if "[cpu" in name or "simulated" in name or "[host" in name]


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
    disturbed = {"rival": "fastshard", "longer": 2.5, "excess_ms": 4.0, "save_s": 0.1}
    skipped = {"name": "y", "skipped": "no room", "rows": [], "disturbance": []}
    machine = dict.fromkeys(["gpu", "cpus", "filesystem", "torch", "safetensors", "commit"], "?")
    goal = {"case": "x", "mode": "return", "against": "link", "limit": 0.5}
    document = {
        "machine": {**machine, "memory_nbytes": 0},
        "cases": [case, skipped] * 40,
        "sound": False,
        "verdict": [{"goal": goal, "value": None, "state": "not measured"}],
    }
    phases = [{"name": "build", "state": "ok", "seconds": 1.0, "note": "n" * 500}]
    lines = brief(phases, document).splitlines()
    assert len(lines) == MOST_LINES and lines[-1] == "..."
    assert any(line.split() == ["y", "skipped:", "no", "room"] for line in lines)
    document["cases"] = [
        {**case, "rows": [{**row, "fallbacks": ["no kernel: error 200"]}], "disturbance": [disturbed]}
    ]
    assert "NOT VERIFIED" in brief(phases, document) and "not measured" in brief(phases, document)
    lines = brief(phases, document).splitlines()
    beside = next(i for i, line in enumerate(lines) if line.startswith("x, return"))
    assert lines[beside + 1] == "  fell back: no kernel: error 200"
    assert "a job beside x lost: fastshard 2.5 % a step, 4 ms of 100" in lines
    document["verdict"] = [
        {"goal": {**goal, "against": "a step", "unit": "%"}, "value": 2.5, "state": "reached"}
    ]
    assert "  x, a step, % at most" in brief(phases, document)
    assert max(map(len, brief(phases, document).splitlines())) <= 150
    assert brief(phases, None).endswith("no bench")


PHASES = {
    "1": ("build", "memory", "tests", "bench"),
    "2": ("build", "memory", "bench", "sanitizer", "probe"),
}


@pytest.mark.parametrize("part", PHASES)
def test_all_of_it_without_a_gpu(tmp_path, part):
    """From the checkout, as it is started on a GPU, with the module built before."""
    probe = tmp_path / "probe.py"
    probe.write_text("import fastshard, sys; print('asked', sys.argv[1])")
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--tiny", "--no-build"]
    command += ["--part", part, "--probe", f"{probe} twice", "--commit", "abc"]
    if part == "2":  # the other cases are libraries' own
        command += ["--cases", "one-file,tmpfs-one,cast"]
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        [*command, "--dir", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out" / f"part-{part}"
    document = json.loads((out / "gpu.json").read_text())
    states = {phase["name"]: phase["state"] for phase in document["phases"]}
    assert tuple(states) == PHASES[part]
    assert {state for name, state in states.items() if name != "sanitizer"} == {"ok"}
    measured = [case["name"] for case in document["bench"]["cases"]]
    assert measured == (list(gpu.PARTS[1]) if part == "1" else ["one-file", "tmpfs-one", "cast"])
    assert document["bench"]["cases"][0]["disturbance"]
    assert "time to return" in (out / "bench.txt").read_text()
    if part == "2":
        assert "asked twice" in (out / "probe.log").read_text()
    assert (out / "gpu.txt").read_text().strip() in done.stdout
    assert len((out / "gpu.txt").read_text().splitlines()) <= MOST_LINES
    assert len(list(out.iterdir())) <= 8
    assert not list(tmp_path.glob("fastshard-bench-*"))


@pytest.mark.parametrize(
    "name", ["grow", "samples", "machine", "budget", "build", "brief", "gpu_tests", "gpu"]
)
def test_what_runs_before_torch_needs_none(name):
    code = f"import sys; sys.modules['torch'] = None; sys.path.append({str(ROOT)!r}); import bench.{name}"
    subprocess.run(python(code), check=True)
