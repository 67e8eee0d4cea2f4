# SPDX-License-Identifier: Apache-2.0
"""The benchmarks, at 1 MiB: that they run, verify and report. Never how fast anything is."""

from __future__ import annotations

import contextlib
import io
import json
import math
import mmap
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import by_one_worker
from safetensors.torch import save_file

import fastshard
from fastshard.bench import (
    builders,
    cases,
    ceilings,
    disturbance,
    fitting,
    grow,
    harness,
    load,
    machine,
    memory,
    models,
    rank_cases,
    rank_job,
    rank_readers,
    report,
    rivals,
    rivals_ranks,
    rivals_torch,
    save,
    training_steps,
)
from fastshard.bench.ceilings import CEILINGS
from fastshard.bench.goals import EXTRA, GOALS, PLANNING, READ, STEP, Goal
from fastshard.bench.grow import touch_and_free
from fastshard.bench.job import OFFLOADED, Job
from fastshard.bench.machine import mount_of
from fastshard.bench.samples import (
    FILE,
    JOB,
    LEAST_LOST_S,
    LOST,
    STALL,
    CaseResult,
    Disturbance,
    Memory,
    Row,
    ratio,
)
from fastshard.bench.verify import Mismatch

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--mib", "1", "--rounds", "1", "--no-memory", "--no-disturbance"]
VARIED = ("qwen-4", "strided", "cast")
"""With every rival: several files, strided, cast; the other cases with those that belong to them."""


def run(directory: Path, *arguments: str) -> tuple[int, dict]:
    """The bench in this process: exit status and the JSON it wrote."""
    out = directory / "bench.json"
    status = save.main([*TINY, "--dir", str(directory), "--json", str(out), *arguments])
    return status, json.loads(out.read_text())


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every case with every ceiling, once."""
    return by_one_worker(tmp_path_factory, "bench", measured)


def measured(directory: Path) -> tuple[int, dict, Path]:
    plain = ",".join(name for name in cases.CASES if name not in VARIED)
    status, document = run(directory, "--cases", plain)
    arguments = ["--rivals", "all", "--cases", ",".join(VARIED), "--plot", str(directory / "bench.png")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", str(directory / "matplotlib"))
        status_of_varied, varied = run(directory, *arguments)
    for key in ("cases", "verdict"):
        document[key] += varied[key]
    document["sound"] &= varied["sound"]
    return status or status_of_varied, document, directory


def rows_of(document: dict, case: str) -> dict[tuple[str, str], dict]:
    (found,) = [c for c in document["cases"] if c["name"] == case]
    return {(row["rival"], row["mode"]): row for row in found["rows"]}


def test_everything_is_verified(everything):
    status, document, _ = everything
    assert document["sound"] is True
    assert status == 0
    assert sorted(case["name"] for case in document["cases"]) == sorted(cases.CASES)


@pytest.mark.parametrize("case", cases.CASES)
def test_case(everything, case):
    chosen = cases.CASES[case]
    for library in chosen.needs:
        pytest.importorskip(library)
    rows = rows_of(everything[1], case)
    several = len(chosen.build(1 << 20, "cpu")) > 1
    for rival in rivals.RIVALS.values() if case in VARIED else map(rivals.RIVALS.get, chosen.rivals):
        excluded = rival.one_file_only if several else rival.many_files_only
        excluded |= rival.own and rival.name not in chosen.rivals
        excluded |= not set(rival.modes) & set(chosen.modes)
        if excluded or "cpu" not in rival.devices:
            assert not any(name == rival.name for name, _ in rows)
            continue
        checked = []
        if rival.name == chosen.without:
            row = rows[rival.name, JOB]
            assert row["ceiling"] and row["seconds"] and (rival.name, STALL) not in rows
            continue
        for mode in (mode for mode in rival.modes if mode in chosen.modes):
            row = rows[rival.name, mode]
            if row["absent"] or (row["error"] and rival.slow):
                continue  # this torch, or this fastshard, has no such writer: said in its row
            assert row["error"] is None
            assert len(row["seconds"]) == 1 and row["seconds"][0] > 0
            assert row["ratio"]["against"] == chosen.base
            assert row["of_ceiling"]["against"] in chosen.bound_by[mode]
            checked.append(row["checked"])
            if mode == STALL:
                stall, job, lost = row, rows[rival.name, JOB], rows[rival.name, LOST]
                alone = rows[chosen.without, JOB]["seconds"]
                assert stall["seconds"] < job["seconds"] == pytest.approx([alone[0] + lost["seconds"][0]])
                assert rival.trains or stall["seconds"] <= rows[rival.name, FILE]["seconds"]
        wanted = "same bytes" if rival.writes == "safetensors" else "loads back"
        if rival.name in ("fastshard", chosen.us):
            assert set(checked) == {wanted}
        elif checked:
            assert checked[0] == wanted
    for name in chosen.measures:
        if "cpu" not in CEILINGS[name].devices:
            continue
        mode = JOB if name == chosen.without else next(m for m in CEILINGS[name].modes if m in chosen.modes)
        row = rows[name, mode]
        assert row["ceiling"] is True
        assert row["seconds"] or name == "direct"  # tmpfs refuses O_DIRECT


def test_report(everything):
    _, document, directory = everything
    asked = [goal for goal in GOALS if goal.on == "cpu" and goal.case in cases.CASES]
    assert len(document["verdict"]) == len(asked)
    # Against a writer that this torch does not have there is no verdict.
    absent = {row["rival"] for case in document["cases"] for row in case["rows"] if row["error"]}
    for finding in document["verdict"]:
        if not {finding["goal"]["against"], finding["goal"]["by"]} & {*EXTRA, *absent}:
            assert finding["state"] in ("reached", "at median only", "at best only", "not reached")
    assert document["machine"]["filesystem"] == mount_of(directory)[0]
    assert (directory / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not list(directory.glob("fastshard-bench-*")), "scratch files were left behind"


def test_table_and_verdict_are_printed(tmp_path, capsys):
    status, _ = run(tmp_path, "--cases", "four-files", "--modes", "return")
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
        tmp_path, "--cases", case, "--rivals", "fastshard,safetensors", "--modes", "return"
    )
    rows = rows_of(document, case)
    assert status == 1
    assert document["sound"] is False
    assert rows["fastshard", "return"]["wrong"] is True
    assert "differs in the 16 MiB at byte 0" in rows["fastshard", "return"]["error"]
    assert rows["safetensors", "return"]["checked"] == "same bytes"
    assert "NOT VERIFIED" in capsys.readouterr().out


def followed_by(name: str, change):
    """The rival, followed by a change of what it has written."""
    honest = rivals.RIVALS[name]

    def prepare(job):
        write = honest.prepare(job)

        def write_and_change():
            write()
            change(job.out)

        return write_and_change

    return replace(honest, prepare=prepare)


def flip_in_optimizer(out):
    path = out / "checkpoint-1" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "case, change, reason",
    [
        ("hub", lambda out: (out / "model.safetensors.index.json").unlink(), "files are"),
        ("pretrained", lambda out: (out / ".left").touch(), "files are"),
        ("pretrained", lambda out: (out / "config.json").write_text("{}"), "config.json has 2 bytes"),
        ("trainer", flip_in_optimizer, "checkpoint-1/optimizer.pt differs in the 16 MiB at byte 0"),
    ],
)
def test_whole_checkpoints_are_compared_file_by_file(tmp_path, monkeypatch, case, change, reason):
    for library in cases.CASES[case].needs:
        pytest.importorskip(library)
    us = cases.CASES[case].us
    monkeypatch.setitem(rivals.RIVALS, us, followed_by(us, change))
    status, document = run(tmp_path, "--cases", case)
    rows = rows_of(document, case)
    assert status == 1 and document["sound"] is False
    assert rows[us, "return"]["wrong"] is True and reason in rows[us, "return"]["error"]
    assert rows[cases.CASES[case].base, "return"]["checked"] == "same bytes"


def test_only_ours_runs_with_fastshard_in_place(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    original, replaced = safetensors.torch.save_file, {}
    chosen = cases.CASES["pretrained"]
    for name in chosen.rivals:

        def note(out, name=name):
            replaced.setdefault(name, set()).add(safetensors.torch.save_file is not original)

        monkeypatch.setitem(rivals.RIVALS, name, followed_by(name, note))
    assert run(tmp_path, "--cases", "pretrained")[0] == 0
    assert replaced == {chosen.us: {True}, chosen.base: {False}}
    assert safetensors.torch.save_file is original


def test_a_case_whose_library_is_missing_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "find_spec", lambda name: None)
    status, document = run(tmp_path, "--cases", "trainer,small", "--modes", "return")
    assert status == 0
    left_out, ran = document["cases"]
    assert left_out["skipped"] == "transformers, accelerate not installed" and not left_out["rows"]
    assert ran["skipped"] is None
    assert {f["state"] for f in document["verdict"] if f["goal"]["case"] == "trainer"} == {"not measured"}
    assert "skipped: transformers" in capsys.readouterr().out


def test_a_case_whose_base_fails_is_left_out(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")

    def prepare(job):
        raise TypeError("no such argument in this version")

    base = replace(rivals.RIVALS["huggingface_hub"], prepare=prepare)
    monkeypatch.setitem(rivals.RIVALS, "huggingface_hub", base)
    status, document = run(tmp_path, "--cases", "hub,small", "--modes", "return")
    assert status == 0
    skipped = [case["skipped"] for case in document["cases"]]
    assert skipped == ["huggingface_hub: TypeError: no such argument in this version", None]


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
    status, document = run(tmp_path, "--cases", "one-file", "--rivals", names)
    rows = rows_of(document, "one-file")
    assert status == 0
    assert rows["dcp-hf", "return"]["error"] == "ImportError: no such writer in this torch"
    assert rows["fastshard", "durable"]["checked"] == "same bytes"


def test_no_verify_is_said_aloud(tmp_path, capsys):
    arguments = ["--cases", "small", "--no-verify", "--modes", "return"]
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


def test_memory_of_a_save_that_goes_on_after_its_call(tmp_path):
    (tmp_path / "out").mkdir()
    nbytes = 32 << 20
    found = memory.measure("async", "async-copy", nbytes, "cpu", tmp_path / "out")
    assert found.error is None
    assert nbytes < found.budget_nbytes <= nbytes + (2 << 20)
    # The snapshot is seen, and there is only one.
    assert 0.9 * nbytes < found.extra_nbytes < 1.5 * nbytes
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > nbytes


def test_memory_reports_a_rival_that_fails(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").mkdir()  # stands where the file should be
    found = memory.measure("small", "safetensors", 1 << 20, "cpu", out)
    assert found.error and found.extra_nbytes is None


@pytest.mark.parametrize("rival", cases.CASES["offloaded"].rivals)
def test_what_the_process_does_whose_memory_is_measured(tmp_path, monkeypatch, capsys, rival):
    """In this process: a fresh one would spend seconds on imports."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n\n"))
    memory.probe(json.dumps(["offloaded", rival, 1 << 20, "cpu", str(out)]))
    assert capsys.readouterr().out == "ready\ndone 0\n"
    (model,) = (tmp_path / OFFLOADED).iterdir()
    assert (out / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_script_lists_what_there_is(tmp_path):
    """As a user starts it: by its path, from anywhere."""
    command = [sys.executable, str(ROOT / "bench" / "save.py"), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    for name in [*cases.CASES, *rivals.RIVALS, *CEILINGS]:
        assert name in listed


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--cases", "no-such-case"], "choose from prepared"),
        (["--rivals", "fastshard,nobody"], "nobody: choose from fastshard"),
        (["--gib", "1000000"], "are needed"),
        (["--shm", "."], "not memory"),
        (["--shm", "/no/such/place"], "no directory"),
        (["--device", "mps"], "torch has none here"),
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
    shapes = dict(builders.qwen_shapes())
    assert len(shapes) == 290
    assert builders.QWEN_NBYTES == 2 * 494_032_768
    assert shapes["model.layers.23.self_attn.k_proj.weight"] == (128, 896)


@pytest.mark.parametrize("case", cases.CASES.values(), ids=lambda case: case.name)
def test_cases_have_about_the_size_asked_for(case):
    for wanted in (1 << 20, 24 << 20):
        found = Job(case.build(wanted, "cpu"), Path("."), durable=False).nbytes
        assert 0.8 * wanted < found < 1.2 * wanted


@pytest.mark.parametrize("seed", range(20))
def test_tensors_are_cut_as_huggingface_hub_cuts_them(seed):
    hub = pytest.importorskip("huggingface_hub")
    numels = torch.randint(1, 50, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    tensors = {str(i): torch.empty(numel, dtype=torch.uint8, device="meta") for i, numel in enumerate(numels)}
    most = 50 + 10 * seed
    shards = builders.cut(tensors, most)
    largest = Job(shards, Path("."), durable=False).largest
    for limit in (most, largest):
        split = hub.split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
        assert [list(shard) for shard in shards] == list(split.filename_to_tensors.values())


def test_shards_are_as_many_as_the_goals_speak_of():
    tensors = {str(i): torch.empty(64 << 20, dtype=torch.uint8, device="meta") for i in range(64)}
    assert len(builders.cut(tensors, builders.GB)) == 5
    assert len(builders.hub(8 << 20, "cpu")) == 4  # of four tensors
    assert len(builders.llama(8 << 20, "cpu")) == 1
    for nbytes in (1 << 20, 8 << 20):
        assert len(builders.llama(nbytes, "cpu", files=4)) == 4


def test_shapes_are_the_models():
    pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    shapes = models.llama_shapes()
    assert sum(map(math.prod, shapes.values())) == 1_100_048_384
    with accelerate.init_empty_weights():
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    assert [(n, t.shape) for n, t in models.llama(tensors).state_dict().items()] == [
        (n, torch.Size(s)) for n, s in shapes.items()
    ]


def test_ratio_is_taken_within_a_round():
    us = Row("a", "return", seconds=[1.0, 1.0, 4.0], rounds=[0, 1, 2])
    base = Row("b", "return", seconds=[2.0, 9.0], rounds=[0, 2])
    found = ratio(us, base)
    assert (found.median, found.best, found.rounds) == ((2.0 + 9.0 / 4.0) / 2, 2.0, 2)
    assert ratio(us, Row("c", "return", seconds=[1.0], rounds=[7])) is None
    assert ratio(None, base) is None


@pytest.mark.parametrize("step", [0, 4, 9])
def test_values_of_a_step_after_the_call_are_noticed(tmp_path, monkeypatch, step):
    """As if the file of a snapshot did not hold what the tensors were at the call."""
    honest = training_steps.Steps.after

    def after(self, save, unchanged):
        def change(number):
            changed(number)
            if number == step and unchanged:
                values = {name: tensor.clone() for name, tensor in tensors.items()}
                save_file(values, tmp_path.glob("*/out/model.safetensors").__next__())

        (tensors,), changed = self.shards, self._step
        monkeypatch.setattr(self, "_step", change)
        return honest(self, save, unchanged)

    monkeypatch.setattr(training_steps.Steps, "after", after)
    status, document = run(tmp_path, "--cases", "async", "--rivals", "async-none,fastshard")
    rows = rows_of(document, "async")
    # After the last step the values are those of the call again.
    assert status == int(step != 9) and rows["async-none", STALL]["wrong"] is (step != 9)
    assert rows["fastshard", STALL]["checked"] == "same bytes"


def test_what_is_lost_within_the_noise_is_not_less_than_nothing():
    us = Row("a", LOST, seconds=[-0.5, 0.5], rounds=[0, 1])
    base = Row("b", LOST, seconds=[2.0, 1.0], rounds=[0, 1])
    found = ratio(us, base)
    assert (found.median, found.best) == ((2.0 / LEAST_LOST_S + 2.0) / 2, 1.0 / LEAST_LOST_S)


def test_the_ceiling_is_the_fastest_of_those_that_ran():
    rows = [
        Row("pwrite-1", "durable", True, [2.0], [0.1], [0]),
        Row("direct", "durable", True, error="OSError: not here"),
    ]
    bounds = {"durable": ("pwrite-1", "direct")}
    result = CaseResult("x", "", 1, 1, 1, 1, bounds, rows)
    assert result.ceiling("durable").rival == "pwrite-1"
    assert result.ceiling("return") is None


class Standing:
    """What fastshard.prepare makes, by other means: the file, and hidden beside it the next generation."""

    wrong_from = 1 << 30
    """The call that begins to write something else."""
    made: list[Standing] = []

    def __init__(self, tensors, path, *, allow_strided, dtype=None):
        if dtype is not None:
            tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        self.tensors, self.path, self.calls, self.closed = tensors, path, 0, False
        self.made.append(self)

    def save(self):
        self.calls += 1
        hidden = self.path.with_name(".next")
        save_file(self.tensors, hidden)
        if self.calls >= self.wrong_from:
            with hidden.open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"!")
        hidden.rename(self.path)
        hidden.write_bytes(b"the former generation")

    def close(self):
        self.closed = True


@pytest.fixture
def standing(monkeypatch):
    monkeypatch.setattr(fastshard, "prepare", Standing, raising=False)
    monkeypatch.setattr(Standing, "made", [])
    return Standing


def test_a_prepared_save_is_prepared_once_and_saved_each_round(tmp_path, standing):
    status, document = run(tmp_path, "--cases", "prepared", "--rounds", "5")
    row = rows_of(document, "prepared")["prepared", "return"]
    assert status == 0
    assert (row["error"], row["checked"], len(row["seconds"])) == (None, "same bytes", 5)
    warm_up, measured = standing.made
    assert (warm_up.calls, measured.calls) == (1, 5)
    assert warm_up.closed and measured.closed
    assert not measured.path.parent.exists()
    assert document["verdict"][0]["state"] != "not measured"


def test_a_later_generation_that_is_wrong_is_noticed(tmp_path, standing, monkeypatch):
    monkeypatch.setattr(standing, "wrong_from", 2)
    status, document = run(tmp_path, "--cases", "prepared", "--rounds", "4")
    row = rows_of(document, "prepared")["prepared", "return"]
    assert status == 1
    assert row["wrong"] and len(row["seconds"]) == 2


def test_without_memory_to_write_to_the_cases_on_it_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(save, "SHM", tmp_path)
    status, document = run(tmp_path, "--cases", "prepared,small", "--modes", "return")
    skipped = [case["skipped"] for case in document["cases"]]
    assert status == 0
    assert "not memory" in skipped[0] and skipped[1] is None
    assert "skipped: " in capsys.readouterr().out
    assert document["verdict"][0]["state"] == "not measured"


def test_cases_fit_into_the_memory_there_is(tmp_path, monkeypatch):
    shm = tmp_path / "out"
    settings = fitting.Settings(
        tmp_path / "out", 1 << 30, 1, 1, ("return",), (), False, (), "cpu", False, shm=shm, no_shm="none here"
    )
    case = cases.CASES["prepared"]
    on_disk = replace(case, place="disk", copies=1.0)
    assert fitting.fitting(on_disk, settings) == fitting.asked(on_disk, settings) == 1 << 30
    monkeypatch.setattr(fitting, "free_nbytes", lambda path: 600 << 20)
    fitted = fitting.fitting(case, settings)
    assert (500 << 20) / 3 < fitted < (600 << 20) / 3
    assert fitting.why_not(case, settings) is None
    # A disk is looked at when that was asked for; and memory that has grown meanwhile is used.
    assert fitting.fitting(on_disk, settings) == 1 << 30
    assert fitting.fitting(on_disk, replace(settings, fit=True)) == 300 << 20
    monkeypatch.setattr(fitting, "memory_nbytes", lambda name: 425 << 20)
    assert fitting.fitting(on_disk, replace(settings, fit=True)) == 100 << 20
    monkeypatch.setattr(fitting, "memory_nbytes", lambda name: 8 << 30)
    assert fitting.fitting(on_disk, replace(settings, fit=True)) == 300 << 20
    monkeypatch.setattr(fitting, "free_nbytes", lambda path: 64 << 20)
    assert "only 20 MiB fit into --shm" in fitting.why_not(case, settings)
    assert "only 32 MiB fit into --dir" in fitting.why_not(on_disk, replace(settings, fit=True))
    assert fitting.why_not(case, replace(settings, shm=None)) == "none here"
    assert fitting.why_not(case, replace(settings, stop=0.0)) == "no time left"


def test_a_case_that_was_made_smaller_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "LEAST_NBYTES", 1)
    monkeypatch.setattr(fitting, "free_nbytes", lambda path: 3 << 20)
    arguments = ["--mib", "2", "--cases", "small,one-file", "--modes", "return", "--fit"]
    status, document = run(tmp_path, *arguments, "--rivals", "fastshard,safetensors")
    assert status == 0
    assert [case["fitted"] for case in document["cases"]] == [True, True]
    assert "(1.00 MiB, for want of room, 64 tensors" in capsys.readouterr().out


def test_out_of_time_nothing_more_is_begun(tmp_path, capsys):
    status, document = run(tmp_path, "--cases", "small,one-file", "--budget", "0")
    assert status == 0
    assert [case["skipped"] for case in document["cases"]] == ["no time left"] * 2
    assert "NOT VERIFIED" in capsys.readouterr().out


def test_slow_rivals_are_the_first_to_be_left_out_when_time_runs_out(tmp_path, monkeypatch):
    def prepare(job):
        return lambda: None

    late = replace(rivals.RIVALS["torch.save"], prepare=prepare)
    settings = fitting.Settings(
        tmp_path / "out", 1 << 20, 3, 3, ("return",), ("return",), False, (), "cpu", False, stop=1e18
    )
    contest = harness.Contest(cases.CASES["one-file"], [late, rivals.RIVALS["safetensors"]], settings)
    result = contest.run(deadline=0.0)
    rows = {row.rival: row for row in result.rows}
    assert rows["torch.save"].absent and rows["torch.save"].error == "no time left"
    assert len(rows["safetensors"].seconds) == 1


def test_what_was_found_outlives_a_kill(tmp_path, monkeypatch):
    def killed(case, *rest):
        if case.name != "small":
            raise KeyboardInterrupt
        return harness.run_case(case, *rest)

    monkeypatch.setattr(save, "run_case", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--cases", "small,one-file", "--modes", "return")
    document = json.loads((tmp_path / "bench.json").read_text())
    assert [case["name"] for case in document["cases"]] == ["small"]


def test_a_job_beside_saves_is_watched():
    done = []

    def save():
        torch.randn(300, 300).inverse()
        done.append("save")

    found = disturbance.measure("fastshard", save, "cpu", before=lambda: done.append("before"), quiet_s=0.02)
    assert found.error is None
    assert done == ["before", "save"] * disturbance.SAVES
    assert found.steps >= len(done) / 2 and found.step_ms > 0 and found.worst_ms >= found.during_ms
    assert found.longer == pytest.approx(100 * (found.during_ms - found.step_ms) / found.step_ms)
    broken = disturbance.measure("fastshard", lambda: 1 / 0, "cpu", quiet_s=0.02)
    assert broken.error.startswith("ZeroDivisionError") and broken.excess_ms is None
    assert broken.longer is None


class FakeEvent:
    """A CUDA event of a machine that has none."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = disturbance.time.perf_counter()

    def synchronize(self):
        assert self.at

    def elapsed_time(self, end):
        return (end.at - self.at) * 1000


class FakeStream:
    def __init__(self, device):
        assert device


@pytest.fixture
def as_if_cuda(monkeypatch):
    """Host tensors taken for those of a GPU: all that only a GPU would run is run, and means nothing."""
    monkeypatch.setattr(machine, "device_kind", lambda device: "cuda")
    monkeypatch.setattr(machine, "_gpu", lambda device: {"gpu": "none at all"})
    monkeypatch.setattr(rivals_torch, "_staging", torch.empty_like)
    monkeypatch.setattr(ceilings, "page_locked", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    monkeypatch.setattr(disturbance, "SIZE", {"cuda": 64})
    monkeypatch.setattr(disturbance, "QUIET_S", 0.02)
    for name, value in {
        "is_available": lambda: True,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "Event": FakeEvent,
        "Stream": FakeStream,
        "stream": lambda stream: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_what_a_gpu_would_run(tmp_path, as_if_cuda, standing):
    found = Memory("fastshard", 1 << 20, 1 << 20, device_nbytes=64 << 20, pinned_nbytes=1 << 30)
    names = [
        "prepared",
        "prepared-cast",
        "prepared-small",
        "tmpfs-eight",
        "eight-files",
        "one-file",
        "columns",
    ]
    names += ["small", "hub", "pretrained"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "measure", lambda *_: found)
        arguments = ["--mib", "1", "--rounds", "1", "--budget", "90", "--cases", ",".join(names)]
        out = tmp_path / "bench.json"
        status = save.main([*arguments, "--dir", str(tmp_path), "--json", str(out)])
    document = json.loads(out.read_text())
    assert status == 0
    assert [case["skipped"] for case in document["cases"]] == [None] * len(names)
    for name in names:
        rows = rows_of(document, name)
        assert {"link", "link-whole"} <= {rival for rival, _ in rows}
        assert ("memcpy-n", "return") not in rows
        broken = [key for key, row in rows.items() if row["error"] and not row["absent"]]
        assert all(rival.startswith("dcp") for rival, _ in broken)  # it asks for a stream
    assert rows_of(document, "one-file")["dcp-fs", "return"]["error"].startswith("RuntimeError: DCP failed")
    states = {(f["goal"]["case"], f["goal"]["against"]): f["state"] for f in document["verdict"]}
    assert [key for key, state in states.items() if state == "not measured"] == []
    assert states["one-file", "device memory"] == "reached"
    assert states["one-file", "pinned memory"] == "not reached"
    assert {"torch.save-pinned", "dcp-fs"} <= {rival for rival, _ in rows_of(document, "one-file")}
    watched = {case["name"]: [d["rival"] for d in case["disturbance"]] for case in document["cases"]}
    assert watched["prepared"] == ["fastshard", "prepared", "safetensors", "link"]
    assert all(d["error"] is None for case in document["cases"] for d in case["disturbance"])


def test_goals_are_those_of_the_device():
    result = CaseResult("one-file", "", 1, 1, 1, 1, {}, device="cuda")
    assert {finding.goal.on for finding in report.judge([result])} == {"cuda"}
    result.device = "cpu"
    assert {finding.goal.on for finding in report.judge([result])} == {"cpu"}


def test_every_goal_can_be_measured():
    for goal in GOALS:
        case = save.ALL_CASES[goal.case]
        assert goal.on in case.default_on or goal.case in rank_cases.RANK_CASES  # these are asked for
        assert (STALL if goal.mode == LOST else goal.mode) in case.modes
        assert goal.by in case.rivals
        assert goal.against in (*case.rivals, *case.measures, *EXTRA, STEP, PLANNING, READ)
        assert goal.against not in EXTRA or case.memory
        assert goal.against != STEP or (cases.CASES[goal.case].disturbs and goal.by in harness.WATCHED)


def judged(goal: Goal, result: CaseResult) -> tuple[str, float | None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "GOALS", (goal,))
        (finding,) = report.judge([result])
    return finding.state, finding.value


def test_a_step_and_planning_stay_within_their_goals():
    result = CaseResult("x", "", 1, 1, 1000, 1, {})
    step, planning = Goal("x", 3, against=STEP), Goal("x", 0.5, against=PLANNING)
    assert judged(step, result) == judged(planning, result) == ("not measured", None)
    result.disturbance = [
        Disturbance("other", 1.0, 9.0),
        Disturbance("fastshard", step_ms=2.0, during_ms=2.05),
    ]
    result.rows = [Row("fastshard", "return", seconds=[1.0], plan_seconds=[0.0004, 0.0006, 0.0009])]
    state, value = judged(step, result)
    assert state == "reached" and value == pytest.approx(2.5)
    state, value = judged(planning, result)
    assert state == "not reached" and value == pytest.approx(0.6)
    result.disturbance[1].during_ms = 2.5
    assert judged(step, result)[0] == "not reached"
    lines = report.verdict(report.judge([replace(result, name="small")]))
    assert "small, a tensor's planning" in lines and "<= 0.5 us" in lines


def test_what_a_timed_save_fell_back_to_stands_beside_its_figure(tmp_path, monkeypatch, capsys):
    refused = iter([["no kernel"], ["no kernel", "no pinning"], []])

    def told():
        return {"plan_seconds": 0.5, "fallbacks": tuple(next(refused))}

    monkeypatch.setitem(rivals.RIVALS, "fastshard", replace(rivals.RIVALS["fastshard"], detail=told))
    arguments = [
        "--cases",
        "small",
        "--modes",
        "return",
        "--rivals",
        "fastshard,safetensors",
        "--rounds",
        "3",
    ]
    _, document = run(tmp_path, *arguments)
    row = rows_of(document, "small")["fastshard", "return"]
    assert row["fallbacks"] == ["no kernel", "no pinning"] and row["plan_seconds"] == [0.5] * 3
    assert "same bytes; no kernel; no pinning" in capsys.readouterr().out


def test_numbers_are_finite_and_tensors_differ():
    (shard,) = cases.CASES["cast"].build(1 << 20, "cpu")
    tensors = list(shard.values())
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors)
    assert not torch.equal(tensors[0].bfloat16(), tensors[1].bfloat16())


def test_columns_are_slices_of_whole_matrices():
    shards = builders.columns(1 << 20, "cpu")
    assert len(shards) == builders.RANKS
    assert all(not t.is_contiguous() for shard in shards for t in shard.values())
    job = Job(shards, Path("."), durable=False)
    assert len({t.untyped_storage().data_ptr() for s in shards for t in s.values()}) == len(shards[0])
    assert job.nbytes == 1 << 20


@pytest.mark.parametrize("name", ["memcpy-n", "memcpy-all", "memmove-all", "link", "link-whole"])
def test_ceilings_move_every_byte(as_if_cuda, monkeypatch, name):
    """Into a target of their own: what they leave there is the tensors' bytes, where it is large enough."""
    targets = []

    def target(nbytes):
        targets.append(torch.zeros(nbytes, dtype=torch.uint8))
        return targets[-1]

    monkeypatch.setattr(ceilings, "_touched", target)
    monkeypatch.setattr(ceilings, "page_locked", target)
    monkeypatch.setattr(ceilings, "LINK_CHUNK_NBYTES", 1 << 16)
    tensors = {str(i): torch.full((1 << 16,), i + 1, dtype=torch.uint8) for i in range(5)}
    CEILINGS[name].prepare(Job([tensors], Path("."), durable=False))()
    wanted = (
        torch.ones(5 << 16, dtype=torch.uint8) if name == "link-whole" else torch.cat([*tensors.values()])
    )
    assert torch.equal(targets[0][: 5 << 16], wanted)


def test_pinned_staging_saves_what_the_tensors_hold_now(tmp_path, as_if_cuda):
    tensor = torch.zeros(100)
    run_it = rivals.RIVALS["torch.save-pinned"].prepare(Job([{"w": tensor}], tmp_path, durable=False))
    tensor += 1
    run_it()
    assert torch.load(tmp_path / "model.pt")["w"].eq(1).all()


def test_page_locked_memory_is_what_the_savers_say(monkeypatch):
    rival = SimpleNamespace(detail=lambda: {"staging": "pinned", "staging_nbytes": 7})
    assert memory._pinned(rival, "cpu") == 7
    rival.detail = lambda: {"staging": "none", "staging_nbytes": 7}
    assert memory._pinned(rival, "cpu") == 0
    rival.detail = None
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.peak": 5}, raising=False)
    assert memory._pinned(rival, "cuda:0") == 5


def test_files_import_what_comes_before_them():
    """In the order of the package's own description; the demonstration stands beside it."""
    order = re.findall(r"``(\w+)``", (ROOT / "bench" / "__init__.py").read_text())
    assert {path.stem for path in (ROOT / "bench").glob("*.py")} == {*order, "__init__", "demo"}
    for i, name in enumerate(order):
        text = (ROOT / "bench" / f"{name}.py").read_text()
        used = set(re.findall(r"^\s*from \.(\w+) import", text, re.M))
        for line in re.findall(r"^from \. import (.+)$", text, re.M):
            used |= set(line.split(", "))
        assert used <= set(order[:i]), name


@pytest.mark.parametrize("nbytes", [-5, 0, 1 << 20, (65 << 20) + 5])
def test_every_byte_of_the_ballast_is_touched_once(monkeypatch, nbytes):
    touched, memset = [], grow.ctypes.memset

    def recorded(begin, value, size):
        touched.append((begin, begin + size))
        return memset(begin, value, size)

    monkeypatch.setattr(grow.ctypes, "memset", recorded)
    touch_and_free(nbytes)
    touched.sort()
    assert sum(end - begin for begin, end in touched) == max(nbytes, 0)
    assert [begin for begin, _ in touched[1:]] == [end for _, end in touched[:-1]]


@pytest.mark.parametrize("arguments", [[], ["--cold"]])
def test_loading_is_verified(tmp_path, capsys, arguments):
    assert load.main(["--dir", str(tmp_path), "--gib", "0.004", "--rounds", "1", *arguments]) == 0
    out = capsys.readouterr().out
    assert out.count("same bytes") == 2 and "times as fast" in out
    assert not list(tmp_path.iterdir())


def test_wrong_loads_are_noticed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(load.LOADERS, load.BASE, lambda tensors, directory: None)
    assert load.main(["--dir", str(tmp_path), "--gib", "0.004", "--rounds", "1"]) == 1
    assert "WRONG" in capsys.readouterr().out


RANKS = sorted(rank_cases.RANK_CASES)


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    """Every case of the ranks, once."""
    return by_one_worker(
        tmp_path_factory, "bench-of-ranks", lambda folder: (*run(folder, "--cases", ",".join(RANKS)), folder)
    )


@pytest.mark.parametrize("case", RANKS)
def test_a_case_of_ranks(by_ranks, case):
    status, document, directory = by_ranks
    assert status == 0 and document["sound"] is True
    chosen, rows = rank_cases.RANK_CASES[case], rows_of(document, case)
    for name in chosen.rivals:
        rival = rivals_ranks.RANK_RIVALS[name]
        for mode in set(rival.modes) & set(chosen.modes):
            row = rows[name, mode]
            if row["absent"]:
                continue  # this torch has no such writer
            assert row["error"] is None
            assert len(row["seconds"]) == 1 and row["seconds"][0] > 0
            assert row["checked"] == {"safetensors": "same bytes", "loaded": "same values"}.get(
                rival.writes, "loads back"
            )
            if mode == STALL:
                assert row["seconds"] <= rows[name, FILE]["seconds"]
    findings = [f for f in document["verdict"] if f["goal"]["case"] == case]
    assert findings
    for finding in findings:
        assert (finding["state"] == "not measured") == (finding["goal"]["against"] in EXTRA)
    assert sorted(path.name for path in directory.iterdir()) == ["bench.json"]


def test_the_memory_of_ranks(tmp_path):
    out = tmp_path / "bench.json"
    arguments = [
        "--mib",
        "1",
        "--rounds",
        "1",
        "--cases",
        "convert-dcp",
        "--rivals",
        "convert",
        "--no-verify",
    ]
    save.main([*arguments, "--dir", str(tmp_path), "--json", str(out)])
    (case,) = json.loads(out.read_text())["cases"]
    (found,) = case["memory"]
    assert found["rival"] == "convert" and found["error"] is None
    assert found["extra_nbytes"] > 0 and found["high_water_nbytes"] > 0


def test_final_files_that_hold_something_else_are_noticed(tmp_path):
    wanted = {"a": torch.arange(8, dtype=torch.bfloat16), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(wanted, tmp_path / "model.safetensors")
    rank_readers.by_safetensors(tmp_path, wanted)
    with pytest.raises(Mismatch, match="tensor 'a' came back different"):
        rank_readers.by_safetensors(tmp_path, {**wanted, "a": wanted["a"] + 1})
    with pytest.raises(Mismatch, match="1 tensors are missing"):
        rank_readers.by_safetensors(tmp_path, {**wanted, "c": wanted["b"]})


def test_the_parts_of_the_ranks_are_pieces_of_the_whole():
    for size in (1, 2, 4):
        with mmap.mmap(-1, rank_job.shared_nbytes(1 << 20)) as memory:
            whole = rank_job.fill(memory, 1 << 20)
            found = [rank_job.parts(memory, 1 << 20, rank, size) for rank in range(size)]
            for name, tensor in whole.items():
                pieces = [part[name] for part in found]
                assert torch.equal(torch.cat(pieces).view(torch.int16), tensor.view(torch.int16))
                # A view of a larger storage would be copied by some savers.
                assert all(piece.untyped_storage().nbytes() == piece.nbytes for piece in pieces)
            del whole, found, tensor, pieces
