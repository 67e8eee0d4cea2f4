# SPDX-License-Identifier: Apache-2.0
"""The benchmark of small saves: that it runs both ways, compares and reports. Never how fast anything is."""

import json
from pathlib import Path

import pytest
import torch

import fastshard
from fastshard.bench import save, small_saves
from fastshard.bench.small_saves import Measured

pytestmark = [pytest.mark.filterwarnings("ignore")]


def test_every_function_is_measured_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.save
    code = save.main(
        ["small-saves", "--dir", str(tmp_path), "--rounds", "2", "--json", str(tmp_path / "x.json")]
    )
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["rounds"] == 2 and torch.save is before
    names = [row["name"] for row in found["saves"]]
    assert names == ["torch.save", "save_file", "save_torch_state_dict", "save_pretrained"]
    assert all(name in shown for name in names) and "medians of 2, in ms" in shown
    assert code == int(not all(row["holds"] for row in found["saves"]))
    assert all(row["original"] > 0 < row["ours"] for row in found["saves"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_mark() -> None:
    assert Measured("a", 1e-3, 1.199e-3).holds and not Measured("a", 1e-3, 1.201e-3).holds
    text = small_saves.table([Measured("a", 1e-3, 2e-3), Measured("b", 1e-3, 1e-3)], 300)
    assert "1.000       2.000       1.200  too slow" in text and text.endswith("holds")


def test_the_engine_saves_in_every_second_turn(tmp_path: Path) -> None:
    installed: list[bool] = []
    small_saves.measure("x", lambda folder: installed.append(fastshard.status().installed), tmp_path, 3)
    assert installed == [False, True] * 4


def test_other_files_are_told(tmp_path: Path) -> None:
    def other(folder: Path) -> None:
        (folder / "a").write_text(folder.name)

    with pytest.raises(RuntimeError, match="x: the files are not the same"):
        small_saves.measure("x", other, tmp_path, 1)
