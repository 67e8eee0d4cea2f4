# SPDX-License-Identifier: Apache-2.0
"""Ranks fill their parts of a state dict from ordinary files: the right bytes, few others, and all ranks or nobody."""

import itertools
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model

import fastshard
from fastshard import load_distributed

if torch.__version__ < "2.6":
    pytest.skip("loads across ranks need torch 2.6", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = one.contiguous().flatten(), other.contiguous().flatten()
    return one.dtype is other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def save_in_shards(state: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """As another library would."""
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = names[number::shards]
        save_file({name: state[name] for name in mine}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def cases(
    size: int, seed: int
) -> list[tuple[tuple[int, ...], torch.dtype, tuple[int, ...], list[int | None]]]:
    """Shapes, dtypes, meshes, and for each dimension of the mesh which dimension of the tensor it shards."""
    found = []
    draw = random.Random(seed)
    meshes = [(size,), *((n, size // n) for n in (2,) if size % n == 0 and size > n), (1, size)]
    for _ in range(40):
        shape = tuple(draw.choice([0, 1, 2, 3, 5, 8, 17]) for _ in range(draw.randint(0, 4)))
        mesh = draw.choice(meshes)
        dims = [draw.choice([None, *range(len(shape))]) for _ in mesh]
        found.append((shape, draw.choice(DTYPES), mesh, dims))
    return found


def load_placed(folder: str, size: int, seed: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    wanted, found = {}, {}
    for number, (shape, dtype, mesh_shape, dims) in enumerate(cases(size, seed)):
        mesh = init_device_mesh("cpu", mesh_shape)
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        full = numbers(shape, dtype, number)
        # Torch scatters no float8.
        as_bytes = full.view(torch.uint8) if dtype is torch.float8_e4m3fn else full
        wanted[f"t{number}"] = local(distribute_tensor(as_bytes, mesh, placements)).view(dtype)
        empty = distribute_tensor(torch.zeros_like(as_bytes), mesh, placements)
        if dtype is torch.float8_e4m3fn:
            from torch.distributed.tensor import DTensor

            empty = DTensor.from_local(
                empty.to_local().view(dtype), mesh, placements, shape=full.shape, stride=full.stride()
            )
        found[f"t{number}"] = empty
    loaded = load_distributed(found, folder)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in wanted.values())
    assert loaded.nbytes == nbytes and nbytes <= loaded.read_nbytes <= 1.2 * nbytes
    return [name for name in wanted if not same(wanted[name], local(found[name]))]


@pytest.mark.parametrize(("size", "shards"), [(1, 3), (2, 1), (4, 3)])
def test_every_rank_gets_what_torch_would_give_it(tmp_path: Path, size: int, shards: int) -> None:
    """Of any placement on any mesh, uneven and empty parts among them."""
    seed = 10 * size + shards
    state = {f"t{n}": numbers(shape, dtype, n) for n, (shape, dtype, _, _) in enumerate(cases(size, seed))}
    if shards == 1:
        save_file(state, tmp_path / "model.safetensors")
    else:
        save_in_shards(state, tmp_path, shards)
    assert ranks.run(size, load_placed, str(tmp_path), size, seed) == [[]] * size


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(19, 24)
        self.up = torch.nn.Linear(24, 40)
        self.down = torch.nn.Linear(40, 24)
        self.norm = torch.nn.LayerNorm(24)
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(torch.relu(self.up(self.embed(x)))))


def block(seed: int) -> Block:
    torch.manual_seed(seed)
    return Block()


def parallel(kind: str, seed: int) -> torch.nn.Module:
    """The same model, cut by torch's own means."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    size = torch.distributed.get_world_size()
    model = block(seed)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if kind == "fsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    if kind == "tp":
        return parallelize_module(model, init_device_mesh("cpu", (size,)), plan)
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("one", "two"))
    if kind == "hsdp":
        return fully_shard(model, mesh=mesh)
    return fully_shard(parallelize_module(model, mesh["two"], plan), mesh=mesh["one"])


def load_model(folder: str, kind: str) -> bool:
    model = parallel(kind, seed=2)
    loaded = load_distributed(model.state_dict(), folder)
    assert (loaded.missing_keys, loaded.unexpected_keys, loaded.staged_nbytes) == ([], [], 0)
    expected = block(1).state_dict()
    expected["steps"] = torch.tensor(11)
    full = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in model.state_dict().items()
    }
    return full.keys() == expected.keys() and all(same(full[name], expected[name]) for name in full)


@pytest.mark.parametrize(("kind", "size"), [("fsdp", 4), ("tp", 2), ("2-D", 4), ("hsdp", 4)])
def test_models_that_torch_has_cut(tmp_path: Path, kind: str, size: int) -> None:
    state = block(1).state_dict()
    state["steps"] = torch.tensor(11)
    fastshard.save_torch_state_dict(state, tmp_path, max_shard_size=4000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert ranks.run(size, load_model, str(tmp_path), kind) == [True] * size


def save_and_load(folder: str) -> bool:
    """Saved by some ranks in one way, loaded by them in another."""
    fastshard.save_distributed(parallel("fsdp", seed=1).state_dict(), folder, max_shard_size=4000)
    model = parallel("tp", seed=2)
    loaded = load_distributed(model, folder)
    assert loaded.nbytes < sum(tensor.nbytes for tensor in block(1).state_dict().values())
    expected = block(1).state_dict()
    found = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in model.state_dict().items()
    }
    return all(same(found[name], expected[name]) for name in expected)


def test_what_ranks_have_saved_is_loaded_by_ranks_that_are_cut_otherwise(tmp_path: Path) -> None:
    assert ranks.run(2, save_and_load, str(tmp_path)) == [True, True]


def load_columns(folder: str, cast: bool) -> tuple[int, int, int, int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, zeros

    mesh = init_device_mesh("cpu", (2,))
    dtype = torch.bfloat16 if cast else torch.float32
    state = {name: zeros(2048, 4096, dtype=dtype, device_mesh=mesh, placements=[Shard(1)]) for name in "abc"}
    local(state["a"]).fill_(1)
    Path("/proc/self/clear_refs").write_text("5")
    before = most_memory()
    loaded = load_distributed(state, folder)
    grown = most_memory() - before
    rank = torch.distributed.get_rank()
    full = load_file(Path(folder) / "model.safetensors")
    for name, tensor in state.items():
        assert torch.equal(local(tensor), full[name].chunk(2, 1)[rank].to(dtype))
    return loaded.nbytes, loaded.read_nbytes, loaded.staged_nbytes, grown


def most_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError


@pytest.mark.parametrize("cast", [False, True])
def test_a_rank_takes_little_memory_and_reads_its_part_only(tmp_path: Path, cast: bool) -> None:
    state = {name: torch.randn(2048, 4096) for name in "abc"}
    save_file(state, tmp_path / "model.safetensors")
    wanted = 3 * 2048 * 4096 * 4 // 2
    for nbytes, read, staged, grown in ranks.run(2, load_columns, str(tmp_path), cast):
        assert nbytes == wanted and wanted <= read <= 1.2 * wanted
        assert staged == (wanted if cast else 0)
        assert grown < 64 << 20


def load_tied(folder: str) -> dict[str, bool]:
    from torch.distributed.fsdp import fully_shard

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(5, 8)  # on four ranks, the last has none of it
            self.head = torch.nn.Linear(8, 5, bias=False)
            self.head.weight = self.embed.weight

    model = fully_shard(Tied())
    assert [*model.state_dict()] == ["embed.weight", "head.weight"]
    found = {}
    for name in ("embed", "head"):
        with torch.no_grad():
            local(model.embed.weight).fill_(-1)
        load_distributed(model.state_dict(), f"{folder}/{name}")
        found[name] = torch.equal(model.head.weight.full_tensor(), torch.arange(40.0).view(5, 8))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_tied_tensor_is_found_under_any_of_its_names(tmp_path: Path, size: int) -> None:
    for name in ("embed", "head"):
        (tmp_path / name).mkdir()
        save_file({f"{name}.weight": torch.arange(40.0).view(5, 8)}, tmp_path / name / "model.safetensors")
    assert ranks.run(size, load_tied, str(tmp_path)) == [{"embed": True, "head": True}] * size


def test_a_name_is_found_under_the_one_that_it_was_saved_as(tmp_path: Path) -> None:
    """``save_model`` and huggingface_hub write into the file's metadata which names they have left out."""

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(3, 3)
            self.two = self.one

    model = Tied()
    save_model(model, str(tmp_path / "model.safetensors"))
    assert len(load_file(tmp_path / "model.safetensors")) == 2
    apart = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    loaded = load_distributed(apart, tmp_path)
    assert loaded.missing_keys == loaded.unexpected_keys == []
    assert all(torch.equal(apart[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in checkpoint: "three.bias"\.'):
        load_distributed({**apart, "three.bias": torch.zeros(3)}, tmp_path)


def load_experts(folder: str) -> list[bool]:
    rank = torch.distributed.get_rank()
    state = {"router": torch.zeros(4), f"expert.{rank}": torch.zeros(6)}
    load_distributed(state, folder)
    return [bool((tensor == rank).all()) for name, tensor in state.items() if "expert" in name]


def test_ranks_may_have_different_names(tmp_path: Path) -> None:
    save_file(
        {"router": torch.ones(4), **{f"expert.{n}": torch.full((6,), float(n)) for n in range(2)}},
        tmp_path / "a.safetensors",
    )
    assert ranks.run(2, load_experts, str(tmp_path)) == [[True], [True]]


def load_wrongly(folder: str, fault: str) -> tuple[str, str, bool]:
    rank = torch.distributed.get_rank()
    state = {"a": torch.zeros(4, 4), "b": torch.zeros(8)}
    if fault == "missing" and rank == 1:
        state["c"] = torch.zeros(2)
    if fault == "unexpected":
        del state["b"]
    if fault == "shape" and rank == 1:
        state["a"] = torch.zeros(4, 5)
    if fault == "complex":
        state["a"] = torch.zeros(4, 4, dtype=torch.float32)
    if fault == "meta":
        state["a"] = torch.zeros(4, 4, device="meta")
    try:
        load_distributed(state, folder)
    except Exception as error:
        untouched = all(tensor.is_meta or not tensor.any() for tensor in state.values())
        return type(error).__name__, str(error), untouched
    return "", "", False


WRONG = {
    "missing": 'Missing key(s) in checkpoint: "c" (rank 1).',
    "unexpected": 'Unexpected key(s) in checkpoint: "b" of {file!r}.',
    "shape": "size mismatch for a: copying a param with shape torch.Size([4, 4]) of {file!r}, the shape in current "
    "model is torch.Size([4, 5]). (rank 1)",
    "complex": "dtype mismatch for a: torch.complex64 of {file!r} cannot be cast to torch.float32.",
    "meta": "a has no memory to load into (device meta).",
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_does_not_fit_is_told_to_all_ranks_and_changes_nothing(tmp_path: Path, fault: str) -> None:
    file = tmp_path / "model.safetensors"
    dtype = torch.complex64 if fault == "complex" else torch.float32
    save_file({"a": torch.ones(4, 4, dtype=dtype), "b": torch.ones(8)}, file)
    expected = f"Error(s) in loading {str(tmp_path)!r}:\n\t{WRONG[fault].format(file=str(file))}"
    assert ranks.run(2, load_wrongly, str(tmp_path), fault) == [("RuntimeError", expected, True)] * 2


def test_without_strict_names_are_returned(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4), "b": torch.ones(8)}, tmp_path / "model.safetensors")
    state = {"a": torch.zeros(4), "c": torch.zeros(2)}
    loaded = load_distributed(state, tmp_path, strict=False)
    assert (loaded.missing_keys, loaded.unexpected_keys) == (["c"], ["b"])
    assert state["a"].all() and not state["c"].any()
    with pytest.raises(RuntimeError, match="size mismatch for a"):
        load_distributed({"a": torch.zeros(5)}, tmp_path, strict=False)


def damaged(folder: Path, how: str) -> None:
    state = {f"t{n}": torch.ones(1000) for n in range(4)}
    save_in_shards(state, folder, 2)
    first, index = folder / "model-00001-of-00002.safetensors", folder / "model.safetensors.index.json"
    data = first.read_bytes()
    if how == "truncated":
        first.write_bytes(data[:-100])
    elif how == "longer":
        first.write_bytes(data + bytes(8))
    elif how == "header":
        first.write_bytes(data[:8] + b"[" + data[9:])
    elif how == "lost":
        first.unlink()
    elif how == "index":
        places = json.loads(index.read_text())["weight_map"]
        places["t0"], places["t1"] = places["t1"], places["t0"]
        index.write_text(json.dumps({"weight_map": places}))
    elif how == "outside":
        index.write_text(json.dumps({"weight_map": {"t0": "../a.safetensors"}}))
    elif how == "pipe":
        first.unlink()
        os.mkfifo(first)


@pytest.mark.parametrize("how", ["truncated", "longer", "header", "lost", "index", "outside", "pipe"])
def test_damaged_checkpoints_are_refused_before_anything_is_read(tmp_path: Path, how: str) -> None:
    damaged(tmp_path, how)
    state = {f"t{n}": torch.zeros(1000) for n in range(4)}
    with pytest.raises(
        (SafetensorError, OSError), match="index.json" if how == "outside" else "model-00001-of-00002"
    ):
        load_distributed(state, tmp_path)
    assert not any(tensor.any() for tensor in state.values())


def load_or_fail(folder: str, how: str) -> tuple[str, str]:
    from fastshard.distributed import rank_load

    rank = torch.distributed.get_rank()
    state = {"a": torch.zeros(4)}
    if how == "own folder":
        folder = f"{folder}/{rank}"
    if how == "fails" and rank == 1:

        def fail(*_: object, **__: object) -> Any:
            raise OSError(5, "Input/output error", "the file")

        rank_load.read_boxes = fail
    if how == "dies" and rank == 1:
        rank_load.read_boxes = lambda *_, **__: ranks.kill_self()
    if how == "hangs" and rank == 1:
        rank_load.read_boxes = lambda *_, **__: time.sleep(4)
    try:
        load_distributed(state, folder, timeout=2 if how in ("dies", "hangs") else None)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("how", ["fails", "dies", "hangs", "own folder"])
def test_a_failure_of_one_rank_is_one_of_all(tmp_path: Path, how: str) -> None:
    for folder, names in (("", "a"), ("0", "a"), ("1", "ab")):
        (tmp_path / folder).mkdir(exist_ok=True)
        save_file({name: torch.ones(4) for name in names}, tmp_path / folder / "model.safetensors")
    first, second = ranks.outcomes(2, load_or_fail, str(tmp_path), how)
    kind, text = first.result()
    assert kind == "RuntimeError"
    if how == "fails":
        assert text == "rank 1 could not load its part: [Errno 5] Input/output error: 'the file'"
        assert second.result() == ("OSError", "[Errno 5] Input/output error: 'the file'")
    elif how == "own folder":
        assert text == f"rank 1 finds another checkpoint in {str(tmp_path / '0')!r} than rank 0"
        assert second.result()[0] == "RuntimeError"
    else:
        assert "rank 1 has not" in text
        assert second.signal == 9 or second.result()[0] == "RuntimeError"


def test_a_process_that_is_alone_loads_into_anything(tmp_path: Path) -> None:
    """Modules, views that lie between other numbers, other dtypes; without torch.distributed."""
    torch.manual_seed(0)
    model = Block()
    fastshard.save_torch_state_dict(model.state_dict(), tmp_path, max_shard_size=3000)
    torch.manual_seed(1)
    other = Block()
    load_distributed(other, tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    around = torch.zeros(26, 50, dtype=torch.bfloat16)
    state = {
        name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in model.state_dict().items()
    }
    state["down.weight"] = around[1:25, 5:45]
    state["up.weight"] = torch.zeros(24, 40).t()
    load_distributed(state, tmp_path, engine=fastshard.Options(memory_budget="1MiB"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor.to(state[name].dtype))
    assert not around[0].any() and not around[:, :5].any() and not around[:, 45:].any()


def test_a_tensor_that_describes_several_parts_gets_all_of_them(tmp_path: Path) -> None:
    """As ``CheckpointableTensor`` of torch 2.14 does."""
    whole = torch.arange(40.0).view(8, 5)
    save_file({"a": whole}, tmp_path / "model.safetensors")
    buffer: Any = torch.full((5, 5), -1.0)
    buffer.global_shape = (8, 5)
    buffer.global_offsets = [(0, 0), (6, 1)]
    buffer.local_offsets = [(0, 0), (3, 0)]
    buffer.local_sizes = [(3, 5), (2, 4)]
    loaded = load_distributed({"a": buffer}, tmp_path)
    assert torch.equal(buffer[:3], whole[:3]) and torch.equal(buffer[3:, :4], whole[6:, 1:])
    assert bool((buffer[3:, 4] == -1).all()) and loaded.nbytes == 4 * (15 + 8)


def load_shards(folder: str) -> bool:
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.metadata import ShardMetadata

    rank = torch.distributed.get_rank()
    at = ShardMetadata(shard_offsets=[4 * rank, 0], shard_sizes=[4, 5], placement=f"rank:{rank}/cpu")
    shard = sharded_tensor.Shard(torch.zeros(4, 5), at)
    load_distributed({"a": sharded_tensor.init_from_local_shards([shard], 8, 5)}, folder)
    return torch.equal(shard.tensor, torch.arange(40.0).view(8, 5)[4 * rank : 4 * rank + 4])


def test_sharded_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.arange(40.0).view(8, 5)}, tmp_path / "model.safetensors")
    assert ranks.run(2, load_shards, str(tmp_path)) == [True, True]


def test_views_of_the_same_memory_are_filled_in_their_order(tmp_path: Path) -> None:
    save_file(
        {"all": torch.zeros(6), "some": torch.ones(3), "more": torch.full((2,), 2.0)},
        tmp_path / "a.safetensors",
    )
    for order in itertools.permutations(["all", "some", "more"]):
        memory, expected = torch.full((6,), 9.0), torch.full((6,), 9.0)
        views = {"all": slice(0, 6), "some": slice(1, 4), "more": slice(3, 5)}
        load_distributed({name: memory[views[name]] for name in order}, tmp_path / "a.safetensors")
        for name in order:
            expected[views[name]] = {"all": 0.0, "some": 1.0, "more": 2.0}[name]
        assert torch.equal(memory, expected)


def test_a_checkpoint_that_is_replaced_meanwhile_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastshard.distributed import stored

    state = {f"t{n}": torch.ones(10_000) for n in range(6)}
    fastshard.save_torch_state_dict(state, tmp_path, max_shard_size=90_000)
    read, left = stored.read_stored, [1]

    def replaced(path: str) -> Any:
        if left:
            left.pop()
            fastshard.save_torch_state_dict(
                {n: 2 * t for n, t in state.items()}, tmp_path, max_shard_size=90_000
            )
        return read(path)

    monkeypatch.setattr(stored, "read_stored", replaced)
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load_distributed(found, tmp_path)
    assert not left and all(bool((tensor == 2).all()) for tensor in found.values())
