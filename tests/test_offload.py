# SPDX-License-Identifier: Apache-2.0
"""Weights that accelerate has offloaded: found, tied, and saved as if they were not offloaded."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils.offload import OffloadedWeightsLoader, offload_state_dict
from helpers import crc32, filled, run, snapshot

import fastshard
from fastshard import _native
from fastshard.integrations.offload import offloaded_state_dict, offloaded_tensor

pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")


class Model(torch.nn.Module):
    """With a parameter and a buffer of its own, buffers further down, mixed dtypes, and a head that may be tied."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = torch.nn.Parameter(torch.rand(7))
        self.register_buffer("shift", torch.rand(3))
        self.embedding = torch.nn.Embedding(50, 16)
        self.block = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16))
        self.last = torch.nn.Linear(16, 16).bfloat16()
        self.head = torch.nn.Linear(16, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


DEVICES = {"embedding": "cpu", "block": "disk", "last": "cpu", "head": "disk", "scale": "cpu", "shift": "cpu"}
OFFLOAD: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, path: cpu_offload(model),
    "cpu, buffers": lambda model, path: cpu_offload(model, offload_buffers=True),
    "disk": lambda model, path: disk_offload(model, path),
    "disk, buffers": lambda model, path: disk_offload(model, path, offload_buffers=True),
    "disk, by block": lambda model, path: disk_offload(model, path, preload_module_classes=["Sequential"]),
    "mixed": lambda model, path: dispatch_model(model, DEVICES, offload_dir=path),
    "mixed, tied on disk": lambda model, path: dispatch_model(
        model, {**DEVICES, "embedding": "disk", "scale": "disk"}, offload_dir=path
    ),
}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", OFFLOAD)
def test_saves_what_the_model_would_save_that_is_not_offloaded(
    how: str, tied: bool, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tied)
    offloaded = OFFLOAD[how](copy.deepcopy(model), tmp_path / "weights")
    assert any(tensor.device.type == "meta" for tensor in offloaded.state_dict().values())
    state = offloaded_state_dict(offloaded)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    if tied and how.startswith("disk"):
        return  # accelerate has forgotten the tie, and so both are saved
    monkeypatch.setattr("accelerate.accelerator.get_state_dict_offloaded_model", offloaded_state_dict)
    for size in "1GB", 2000:
        for what, folder in (model, "expected"), (offloaded, "found"):
            accelerator.save_model(what, tmp_path / folder, max_shard_size=size)
        assert snapshot(tmp_path / "found") == snapshot(tmp_path / "expected")


def test_what_lies_in_memory_is_that_very_tensor_and_what_lies_in_a_file_is_mapped(tmp_path: Path) -> None:
    held = {"weight": filled((4, 4)), "bias": filled((4,))}
    offload_state_dict(tmp_path, {"bias": held["bias"]})
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    loader = OffloadedWeightsLoader({"0.weight": held["weight"]}, tmp_path, {"0.bias": {}})
    loader.index = {"0.bias": json.loads((tmp_path / "index.json").read_text())["bias"]}
    os.rename(tmp_path / "bias.dat", tmp_path / "0.bias.dat")
    add_hook_to_module(module, AlignDevicesHook(offload=True, weights_map=loader, place_submodules=True))
    assert offloaded_tensor(module, "0.weight") is held["weight"]
    bias = offloaded_tensor(module, "0.bias")
    assert torch.equal(bias, held["bias"])
    assert _native.SourceFile.at(bias.data_ptr()) == os.fsencode(tmp_path / "0.bias.dat")


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (1,)])
def test_every_kind_of_dat_file(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = filled(shape, dtype)
    try:
        offload_state_dict(tmp_path, {"t": tensor})
    except TypeError as error:
        pytest.skip(f"this accelerate cannot offload it: {error}")
    found = offloaded_tensor(holding(OffloadedWeightsLoader(save_folder=tmp_path)), "t")
    assert found.dtype == dtype and found.shape == shape and crc32(found) == crc32(tensor)


def holding(
    weights_map: Mapping[str, Any], name: str = "t", like: torch.Tensor | None = None
) -> torch.nn.Module:
    """A module whose parameter is on the meta device and held by a mapping."""
    module = torch.nn.Module()
    like = torch.ones(3) if like is None else like
    module.register_parameter(name, torch.nn.Parameter(like.to("meta"), requires_grad=False))
    hook = AlignDevicesHook()
    hook.weights_map = weights_map
    module._hf_hook = hook  # type: ignore[assignment]
    return module


def test_safetensors_entries(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    stored = filled((3, 4))
    fastshard.save_file({"other name": stored, "t": stored + 1}, path)
    index: dict[str, Any] = {"t": {"safetensors_file": str(path), "weight_name": "other name"}}
    module = holding(OffloadedWeightsLoader(index=index, device="cuda:0"))
    found = offloaded_tensor(module, "t")
    assert torch.equal(found, stored) and _native.SourceFile.at(found.data_ptr())
    index["t"]["dtype"] = "float32"
    found = offloaded_tensor(module, "t")
    assert torch.equal(found, stored) and _native.SourceFile.at(found.data_ptr())
    index["t"]["dtype"] = "bfloat16"
    assert torch.equal(offloaded_tensor(module, "t"), stored.bfloat16())
    index["t"]["dtype"] = "load"
    with pytest.raises(ValueError, match="`t` a dtype that torch does not have: 'load'"):
        offloaded_tensor(module, "t")
    del index["t"]["weight_name"]
    del index["t"]["dtype"]
    assert torch.equal(offloaded_tensor(module, "t"), stored + 1)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="w.safetensors"):
        offloaded_tensor(module, "t")


class Own(Mapping[str, torch.Tensor]):
    """A user's mapping."""

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.full((3,), float(len(key)))

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def test_other_mappings_are_asked(tmp_path: Path) -> None:
    module = torch.nn.Module()
    module.inner = holding(Own(), "name")
    assert offloaded_tensor(module, "inner.name").tolist() == [4.0] * 3


def test_what_nobody_holds_is_an_error() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"), torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="0.weight is on the meta device .* the corresponding hook"):
        offloaded_tensor(model, "0.weight")
    with pytest.raises(RuntimeError, match="on the meta device: 0.weight, 0.bias"):
        offloaded_state_dict(model)
    with pytest.raises(RuntimeError, match="on the meta device: t"):
        offloaded_state_dict(holding({}))


def test_shapes_and_dtypes_are_the_models() -> None:
    module = holding({"t": torch.arange(3.0)}, like=torch.ones(3, dtype=torch.float16))
    state = offloaded_state_dict(module)
    assert state["t"].dtype == torch.float16 and state["t"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"`t` has shape \(3,\), but what was offloaded has \(4,\)"):
        offloaded_state_dict(holding({"t": torch.arange(4.0)}))


def test_a_weight_too_many_rather_than_one_too_few(tmp_path: Path) -> None:
    """Said to be tied, but no longer the same."""
    model = OFFLOAD["mixed, tied on disk"](Model(True), tmp_path)
    assert (
        offloaded_tensor(model, "embedding.weight").data_ptr()
        != offloaded_tensor(model, "head.weight").data_ptr()
    )
    state = offloaded_state_dict(model)
    assert state["embedding.weight"].data_ptr() == state["head.weight"].data_ptr()
    with (tmp_path / "head.weight.dat").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")
    state = offloaded_state_dict(model)
    assert state["embedding.weight"].data_ptr() != state["head.weight"].data_ptr()
    assert not torch.equal(state["embedding.weight"], state["head.weight"])


def test_transformers_ties(tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", minversion="5", reason="in 4, an offloaded model says no ties"
    )
    config = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=20, n_positions=8)
    model = disk_offload(transformers.GPT2LMHeadModel(config), tmp_path)
    state = offloaded_state_dict(model)
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()


class Scaled(torch.nn.Linear):
    """Saves more than its parameters, as modules with quantized weights do."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.device.type != "meta":
            destination[f"{prefix}scale"] = self.weight.detach().abs().max()


def test_modules_with_entries_of_their_own(tmp_path: Path) -> None:
    model = torch.nn.Sequential(Scaled(4, 4), torch.nn.Linear(4, 4))
    expected = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    state = offloaded_state_dict(disk_offload(model, tmp_path))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert model[0].weight.device.type == "meta"


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A model of 256 MiB in 73 files, found and saved."""
    code = """
        from accelerate.hooks import attach_align_device_hook
        from accelerate.utils import OffloadedWeightsLoader
        from fastshard.integrations.offload import offloaded_state_dict

        def kib(field):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

        with torch.device("meta"):
            embedding = torch.nn.Embedding(1 << 14, 1024)
            layers = [torch.nn.Linear(1024, 1024, bias=i % 2 == 0) for i in range(48)]
            model = torch.nn.Sequential(embedding, *layers)
        folder, out = sys.argv[1:]
        index = {}
        os.mkdir(folder)
        for name, tensor in model.state_dict().items():
            with open(f"{folder}/{name}.dat", "wb") as file:
                file.truncate(tensor.nbytes)
                file.write(name.encode().ljust(8))
            index[name] = {"dtype": "float32", "shape": list(tensor.shape)}
        loader = OffloadedWeightsLoader(save_folder=folder, index=index)
        attach_align_device_hook(model, execution_device="cpu", offload=True, weights_map=loader)
        save_file({"warm": torch.ones(3)}, out)
        before = kib("VmHWM")
        state = offloaded_state_dict(model)
        save_file(state, out)
        print(kib("VmHWM") - before >> 10, sum(t.nbytes for t in state.values()) >> 20)
        first = open(folder + "/7.weight.dat", "rb").read(64)
        print(state["7.weight"].view(-1)[:16].numpy().tobytes() == first, os.path.getsize(out) >> 20)
        """
    out = tmp_path / "out.safetensors"
    done = run(code, tmp_path / "weights", out)
    assert done.returncode == 0, done.stderr
    peak, nbytes, equal, size = done.stdout.split()
    assert int(peak) < 100 and int(nbytes) >= 256 and equal == "True" and size == nbytes
