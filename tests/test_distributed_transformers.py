# SPDX-License-Identifier: Apache-2.0
"""What transformers saves and loads from several ranks: its own calls, with fastshard installed and without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from helpers import filled, snapshot
from safetensors import safe_open
from safetensors.torch import load_file

import fastshard

checkpoint = pytest.importorskip("torch.distributed.checkpoint")
theirs = pytest.importorskip("torch.distributed.checkpoint._consolidate_hf_safetensors")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")

WHOLE = {
    "rows": filled((11, 6), torch.bfloat16),
    "columns": filled((5, 12), torch.float32, 1),
    "both": filled((6,), torch.float64, 2),
}
OTHERS = {
    "count": torch.tensor(7),
    "flags": filled((5, 3), torch.bool),
    "ids": filled((3, 4), torch.int32, 3),
}


@pytest.fixture
def installed() -> Iterator[None]:
    fastshard.install()
    try:
        yield
    finally:
        fastshard.uninstall()


def _save(folder: str, others: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    how = {"rows": Shard(0), "columns": Shard(1), "both": Replicate(), "flags": Shard(0), "ids": Shard(1)}
    state = {
        name: distribute_tensor(t, mesh, [how[name]]) if name in how else t
        for name, t in {**WHOLE, **(OTHERS if others else {})}.items()
    }
    writer = checkpoint.HuggingFaceStorageWriter(folder, save_distributed=True)
    checkpoint.save(state, storage_writer=writer)


def test_consolidation(tmp_path: Path, installed: None) -> None:
    """As torch's own, and of integers and bools, too."""
    ranks.run(2, _save, str(tmp_path / "parts"), True)
    whole = {**WHOLE, **OTHERS}
    files = {name: 1 + (name in OTHERS) for name in whole}
    (tmp_path / "out").mkdir()
    theirs.consolidate_safetensors_files(str(tmp_path / "parts"), str(tmp_path / "out"), files)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in whole.values())},
        "weight_map": {name: names[number - 1] for name, number in files.items()},
    }
    for name, expected in zip(names, (WHOLE, OTHERS)):
        found = load_file(tmp_path / "out" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert ranks.leftovers(tmp_path) == []


def test_the_same_tensors_as_torchs_own(tmp_path: Path) -> None:
    ranks.run(2, _save, str(tmp_path / "parts"), False)
    found: dict[str, Any] = {}
    for kind in ("stock", "ours"):
        out = tmp_path / kind
        out.mkdir()
        if kind == "ours":
            fastshard.install()
        try:
            theirs.consolidate_safetensors_files(str(tmp_path / "parts"), str(out), dict.fromkeys(WHOLE, 1))
        finally:
            fastshard.uninstall()
        index = (out / "model.safetensors.index.json").read_text()
        found[kind] = index, load_file(out / "model-00001-of-00001.safetensors")
    assert found["stock"][0] == found["ours"][0]
    assert all(torch.equal(found["stock"][1][name], found["ours"][1][name]) for name in WHOLE)


def _consolidate(parts: str, out: str) -> None:
    fastshard.install()
    names = {**WHOLE, **OTHERS}
    theirs.consolidate_safetensors_files_on_every_rank(parts, out, {n: k + 1 for k, n in enumerate(names)})


def test_consolidation_on_every_rank(tmp_path: Path) -> None:
    ranks.run(2, _save, str(tmp_path / "parts"), True)
    (tmp_path / "out").mkdir()
    ranks.run(2, _consolidate, str(tmp_path / "parts"), str(tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, tensor in {**WHOLE, **OTHERS}.items():
        assert torch.equal(load_file(tmp_path / "out" / index["weight_map"][name])[name], tensor)


def test_consolidation_that_fails(tmp_path: Path, installed: None) -> None:
    ranks.run(2, _save, str(tmp_path / "parts"), True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00001.safetensors").write_bytes(b"old")
    lost = next((tmp_path / "parts").glob("shard-00002*"))
    lost.unlink()
    with pytest.raises(
        ValueError, match=f"{tmp_path / 'parts'}: tensor '.*' is not in any file|are not in any file"
    ):
        theirs.consolidate_safetensors_files(
            str(tmp_path / "parts"), str(tmp_path / "out"), dict.fromkeys([*WHOLE, *OTHERS], 1)
        )
    assert snapshot(tmp_path / "out") == {"model-00001-of-00001.safetensors": b"old"}


# save_pretrained ------------------------------------------------------------------------------------------

SIZE = "20KB"


def _model(tied: bool) -> Any:
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def _save_pretrained(source: str, out: str, how: dict[str, Any]) -> tuple[bool, list[str]]:
    """Returns whether the saved model loads in these ranks again with the same slices."""
    import transformers
    from transformers.distributed import DistributedConfig

    fastshard.install()
    load = transformers.LlamaForCausalLM.from_pretrained
    model = load(source, distributed_config=DistributedConfig(**how))
    model.save_pretrained(out, distributed_checkpoint=True, max_shard_size=SIZE)
    again = load(out, distributed_config=DistributedConfig(**how))
    ours, theirs = model.state_dict(), again.state_dict()
    same = ours.keys() == theirs.keys() and all(
        torch.equal(_local(ours[name]), _local(theirs[name])) for name in ours
    )
    return same, [type(value).__name__ for value in ours.values()]


def _local(value: Any) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", [{"fsdp_size": 2}, {"tp_size": 2, "tp_plan": "auto"}], ids=["fsdp", "tp"])
def test_save_pretrained(tmp_path: Path, how: dict[str, Any], tied: bool) -> None:
    """To the byte what one process saves; files of ranks of an earlier save go with it."""
    modeling = pytest.importorskip("transformers.distributed.checkpoint")
    if not hasattr(modeling, "_save_model_checkpoint_distributed"):
        pytest.skip("this transformers saves no distributed checkpoints")
    model = _model(tied)
    model.save_pretrained(tmp_path / "source")
    model.save_pretrained(tmp_path / "expected", max_shard_size=SIZE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"old")
    (tmp_path / "out" / "notes.txt").write_text("kept")
    found = ranks.run(2, _save_pretrained, str(tmp_path / "source"), str(tmp_path / "out"), how)
    assert all("DTensor" in kinds for _, kinds in found)
    assert all(same for same, _ in found)
    out, expected = snapshot(tmp_path / "out"), snapshot(tmp_path / "expected")
    assert out.pop("notes.txt") == b"kept"
    assert out.keys() == expected.keys() and len(out) > 4
    assert {name for name in out if out[name] != expected[name]} <= {"config.json"}
    configs = [json.loads(files["config.json"]) for files in (out, expected)]
    for config in configs:
        config.pop("distributed_config", None)
    assert configs[0] == configs[1]
    assert ranks.leftovers(tmp_path) == []
