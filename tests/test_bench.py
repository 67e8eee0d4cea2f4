# SPDX-License-Identifier: Apache-2.0
"""The benchmarks, at 1 MiB: that they run, verify and report. Never how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fastshard.bench import cases, memory, rivals, save
from fastshard.bench.ceilings import CEILINGS
from fastshard.bench.harness import touch_and_free
from fastshard.bench.machine import mount_of
from fastshard.bench.samples import CaseResult, Row, ratio

ROOT = Path(__file__).resolve().parents[1]

TINY = ["--mib", "1", "--rounds", "1"]


def run(directory: Path, *arguments: str) -> tuple[int, dict]:
    """The bench in this process: exit status and the JSON it wrote."""
    out = directory / "bench.json"
    status = save.main([*TINY, "--dir", str(directory), "--json", str(out), *arguments])
    return status, json.loads(out.read_text())


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every case with every rival and ceiling, once."""
    directory = tmp_path_factory.mktemp("bench")
    arguments = ["--rivals", "all", "--no-memory", "--plot", str(directory / "bench.png")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", str(directory / "matplotlib"))
        status, document = run(directory, *arguments)
    return status, document, directory


def rows_of(document: dict, case: str) -> dict[tuple[str, str], dict]:
    (found,) = [c for c in document["cases"] if c["name"] == case]
    return {(row["rival"], row["mode"]): row for row in found["rows"]}


def test_everything_is_verified(everything):
    status, document, _ = everything
    assert document["sound"] is True
    assert status == 0
    assert [case["name"] for case in document["cases"]] == list(cases.CASES)


@pytest.mark.parametrize("case", cases.CASES)
def test_case(everything, case):
    rows = rows_of(everything[1], case)
    several = len(cases.CASES[case].build(1 << 20, "cpu")) > 1
    for rival in rivals.RIVALS.values():
        if rival.many_files_only and not several:
            assert (rival.name, "return") not in rows
            continue
        checked = []
        for mode in rival.modes:
            row = rows[rival.name, mode]
            if row["error"] and rival.slow:
                continue  # this torch has no such writer: said in its row
            assert row["error"] is None
            assert len(row["seconds"]) == 1 and row["seconds"][0] > 0
            assert row["ratio"]["against"] == "safetensors"
            assert row["of_ceiling"]["against"] in cases.CASES[case].bound_by[mode]
            checked.append(row["checked"])
        if rival.name == "fastshard":
            assert checked == ["same bytes", "same bytes"]
        elif checked:
            assert checked[0] == ("same bytes" if rival.writes == "safetensors" else "loads back")
    for name in cases.CASES[case].measures:
        row = rows[name, CEILINGS[name].modes[0]]
        assert row["ceiling"] is True
        assert row["seconds"] or name == "direct"  # tmpfs refuses O_DIRECT


def test_report(everything):
    _, document, directory = everything
    goals = [(f["goal"]["case"], f["goal"]["against"]) for f in document["verdict"]]
    assert len(goals) == len(cases.GOALS)
    # Against a writer that this torch does not have there is no verdict.
    absent = {row["rival"] for case in document["cases"] for row in case["rows"] if row["error"]}
    for finding in document["verdict"]:
        if finding["goal"]["against"] not in {"memory", *absent}:
            assert finding["state"] in ("reached", "at median only", "at best only", "not reached")
    assert document["machine"]["filesystem"] == mount_of(directory)[0]
    assert (directory / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not list(directory.glob("fastshard-bench-*")), "scratch files were left behind"


def test_table_and_verdict_are_printed(tmp_path, capsys):
    status, _ = run(tmp_path, "--cases", "four-files", "--modes", "return", "--no-memory")
    out = capsys.readouterr().out
    assert status == 0
    assert "time to return" in out and "safetensors-threads" in out and "[pwrite-n]" in out
    assert "verdict" in out and "bytes verified" in out


def corrupted(name: str, offset: int):
    """The rival, followed by one flipped bit in its first file."""
    honest = rivals.RIVALS[name]

    def prepare(job):
        write = honest.prepare(job)

        def write_wrong():
            write()
            with open(job.paths[0], "r+b") as file:
                file.seek(offset, 2 if offset < 0 else 0)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))

        return write_wrong

    return replace(honest, prepare=prepare)


@pytest.mark.parametrize("offset", [-1, 700_000])
@pytest.mark.parametrize("case", ["one-file", "qwen-4", "strided"])
def test_a_flipped_bit_is_noticed(tmp_path, monkeypatch, capsys, case, offset):
    if case == "qwen-4" and offset > 0:
        offset = 100_000  # its shards are smaller
    monkeypatch.setitem(rivals.RIVALS, "fastshard", corrupted("fastshard", offset))
    status, document = run(
        tmp_path, "--cases", case, "--rivals", "fastshard,safetensors", "--modes", "return", "--no-memory"
    )
    rows = rows_of(document, case)
    assert status == 1
    assert document["sound"] is False
    assert rows["fastshard", "return"]["wrong"] is True
    assert "differs in the 16 MiB at byte 0" in rows["fastshard", "return"]["error"]
    assert rows["safetensors", "return"]["checked"] == "same bytes"
    assert "NOT VERIFIED" in capsys.readouterr().out


def test_an_unreadable_checkpoint_is_noticed(tmp_path, monkeypatch):
    def prepare(job):
        return lambda: job.paths[0].with_suffix(".pt").write_bytes(b"nothing")

    monkeypatch.setitem(rivals.RIVALS, "torch.save", replace(rivals.RIVALS["torch.save"], prepare=prepare))
    status, document = run(
        tmp_path, "--cases", "one-file", "--rivals", "fastshard,safetensors,torch.save", "--no-memory"
    )
    assert status == 1
    assert "cannot be read back" in rows_of(document, "one-file")["torch.save", "return"]["error"]


def test_a_failing_rival_does_not_stop_the_others(tmp_path, monkeypatch):
    def prepare(job):
        raise ImportError("no such writer in this torch")

    monkeypatch.setitem(rivals.RIVALS, "dcp-hf", replace(rivals.RIVALS["dcp-hf"], prepare=prepare))
    names = "fastshard,safetensors,dcp-hf"
    status, document = run(tmp_path, "--cases", "one-file", "--rivals", names, "--no-memory")
    rows = rows_of(document, "one-file")
    assert status == 0
    assert rows["dcp-hf", "return"]["error"] == "ImportError: no such writer in this torch"
    assert rows["fastshard", "durable"]["checked"] == "same bytes"


def test_no_verify_is_said_aloud(tmp_path, capsys):
    arguments = ["--cases", "small", "--no-verify", "--no-memory", "--modes", "return"]
    status, document = run(tmp_path, *arguments)
    assert status == 0
    assert rows_of(document, "small")["fastshard", "return"]["checked"] is None
    assert "NOT VERIFIED" in capsys.readouterr().out


def test_memory_in_a_fresh_process(tmp_path):
    (tmp_path / "out").mkdir()
    nbytes = 32 << 20
    found = memory.measure("strided", "safetensors", nbytes, "cpu", tmp_path / "out")
    assert found.error is None
    # .contiguous() takes a second copy: the probe must see it, whatever else it sees.
    assert 0.9 * nbytes < found.extra_nbytes < 2 * nbytes
    assert found.high_water_nbytes > 0.9 * nbytes


def test_memory_reports_a_rival_that_fails(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").mkdir()  # stands where the file should be
    found = memory.measure("small", "safetensors", 1 << 20, "cpu", out)
    assert found.error and found.extra_nbytes is None


def test_script_lists_what_there_is(tmp_path):
    """As a user starts it: by its path, from anywhere."""
    command = [sys.executable, str(ROOT / "bench" / "save.py"), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    for name in [*cases.CASES, *rivals.RIVALS, *CEILINGS]:
        assert name in listed


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--cases", "no-such-case"], "choose from one-file"),
        (["--rivals", "fastshard,nobody"], "nobody: choose from fastshard"),
        (["--gib", "1000000"], "are needed"),
        (["--mib", "0.1"], "the smallest size"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, capsys, arguments, reason):
    with pytest.raises(SystemExit) as caught:
        save.main(["--dir", str(tmp_path), *arguments])
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_qwen_shapes_are_the_model():
    shapes = dict(cases.qwen_shapes())
    assert len(shapes) == 290
    assert cases.QWEN_NBYTES == 2 * 494_032_768
    assert shapes["model.layers.23.self_attn.k_proj.weight"] == (128, 896)


@pytest.mark.parametrize("case", cases.CASES.values(), ids=lambda case: case.name)
def test_cases_have_about_the_size_asked_for(case):
    for wanted in (1 << 20, 24 << 20):
        found = rivals.Job(case.build(wanted, "cpu"), Path("."), durable=False).nbytes
        assert 0.8 * wanted < found < 1.2 * wanted


def test_ratio_is_taken_within_a_round():
    us = Row("a", "return", seconds=[1.0, 1.0, 4.0], rounds=[0, 1, 2])
    base = Row("b", "return", seconds=[2.0, 9.0], rounds=[0, 2])
    found = ratio(us, base)
    assert (found.median, found.best, found.rounds) == ((2.0 + 9.0 / 4.0) / 2, 2.0, 2)
    assert ratio(us, Row("c", "return", seconds=[1.0], rounds=[7])) is None
    assert ratio(None, base) is None


def test_the_ceiling_is_the_fastest_of_those_that_ran():
    rows = [
        Row("pwrite-1", "durable", True, [2.0], [0.1], [0]),
        Row("direct", "durable", True, error="OSError: not here"),
    ]
    bounds = {"durable": ("pwrite-1", "direct")}
    result = CaseResult("x", "", 1, 1, 1, 1, bounds, rows)
    assert result.ceiling("durable").rival == "pwrite-1"
    assert result.ceiling("return") is None


def test_ballast_of_nothing():
    touch_and_free(0)
    touch_and_free(-5)
    touch_and_free(1 << 20)
