# SPDX-License-Identifier: Apache-2.0
"""What many ranks save together is to the byte what one process saves of the full state dict."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import distributed, nn

import fastshard
from fastshard.distributed.group import store_of


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """The same on every rank."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (made * 100).to(dtype)


def full_state() -> dict[str, torch.Tensor]:
    return {
        "rows": values(7, 5),
        "columns": values(6, 8, dtype=torch.bfloat16),
        "inner": values(3, 8, 4),
        "few": values(2, 3),  # rows for two ranks only
        "replicated": values(300, 9),
        "counts": torch.arange(10),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }


def mesh_of(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    names = ("dp", "tp", "pp")[: len(shape)]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def spread(full: dict[str, torch.Tensor], mesh: Any, **placements: Any) -> dict[str, Any]:
    """A state dict whose tensors of these names are distributed; the others are replicated as they are."""
    from torch.distributed.tensor import distribute_tensor

    return {
        name: distribute_tensor(tensor, mesh, placements[name]) if name in placements else tensor.clone()
        for name, tensor in full.items()
    }


def one_mesh(full: dict[str, torch.Tensor], size: int) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard

    return spread(
        full,
        mesh_of(size),
        rows=[Shard(0)],
        columns=[Shard(1)],
        inner=[Shard(1)],
        few=[Shard(0)],
        counts=[Replicate()],
    )


def two_meshes(full: dict[str, torch.Tensor], size: int) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard

    return spread(
        full,
        mesh_of(2, size // 2),
        rows=[Shard(0), Shard(0)],
        columns=[Shard(0), Shard(1)],
        inner=[Shard(2), Shard(1)],
        few=[Replicate(), Shard(0)],  # hybrid: the same on both halves
        counts=[Shard(0), Replicate()],
    )


def save_and_compare(
    make: Callable[..., dict[str, Any]], folder: Path, options: dict[str, Any]
) -> dict[str, int]:
    full = full_state()
    state = make(full, distributed.get_world_size())
    fastshard.save_distributed(state, folder / "ours", **options)
    written = fastshard.stats()
    distributed.barrier()
    compare(full, folder, options)
    return {"files": written.files, "nbytes": written.nbytes} if written else {}


def compare(full: dict[str, torch.Tensor], folder: Path, options: dict[str, Any]) -> None:
    if distributed.get_rank() == 0:
        (folder / "one").mkdir()
        fastshard.save_torch_state_dict(full, folder / "one", **options)
        same_files(folder / "ours", folder / "one")
        assert not ranks.leftovers(folder)


def same_files(ours: Path, others: Path) -> None:
    assert sorted(os.listdir(ours)) == sorted(os.listdir(others))
    for name in os.listdir(others):
        assert (ours / name).read_bytes() == (others / name).read_bytes(), name


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"manifest": True},
        {"max_shard_size": 200, "metadata": {"step": "3"}, "manifest": "sha256"},
        {"dtype": "bf16", "durable": True},
    ],
    ids=str,
)
def test_one_mesh(tmp_path: Path, size: int, options: dict[str, Any]) -> None:
    ranks.run(size, save_and_compare, one_mesh, tmp_path, options)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 200, "dtype": torch.float16}], ids=str)
def test_two_meshes(tmp_path: Path, options: dict[str, Any]) -> None:
    ranks.run(4, save_and_compare, two_meshes, tmp_path, options)


def test_eight_ranks(tmp_path: Path) -> None:
    ranks.run(8, save_and_compare, two_meshes, tmp_path, {"max_shard_size": 200}, timeout=180)


def test_one_process_without_a_group(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    options = {"max_shard_size": 200, "filename_pattern": "weights{suffix}.safetensors"}
    fastshard.save_distributed(full_state(), tmp_path / "new" / "ours", **options)
    fastshard.save_torch_state_dict(full_state(), tmp_path / "one", **options)
    same_files(tmp_path / "new" / "ours", tmp_path / "one")
    with pytest.raises(ValueError, match="not initialized"):
        fastshard.save_distributed({}, tmp_path / "x", process_group=object())


class Tied(nn.Module):
    """A tiny model with a tied weight and sizes that ranks cannot divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(7))


def fully_sharded(size: int) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = Tied()
    mesh = mesh_of(size)
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def hybrid(size: int) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = Tied()
    fully_shard(model, mesh=mesh_of(2, size // 2))
    return model


def sharded_and_parallel(size: int) -> nn.Module:
    """FSDP2 over tensor parallelism, which gives ``_StridedShard``."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = Tied()
    mesh = mesh_of(2, size // 2)
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return model


def save_model(make: Callable[[int], nn.Module], folder: Path, options: dict[str, Any]) -> str:
    state = make(distributed.get_world_size()).state_dict()
    fastshard.save_distributed(state, folder / "ours", **options)
    distributed.barrier()
    compare(Tied().state_dict(), folder, options)
    return str([getattr(value, "placements", None) for value in state.values()])


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 300, "metadata": {"step": "3"}}], ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_fsdp2(tmp_path: Path, size: int, options: dict[str, Any]) -> None:
    ranks.run(size, save_model, fully_sharded, tmp_path, options)


def test_hybrid_sharding(tmp_path: Path) -> None:
    ranks.run(4, save_model, hybrid, tmp_path, {"max_shard_size": 300})


def test_strided_shards_of_fsdp2_over_tensor_parallelism(tmp_path: Path) -> None:
    placements = ranks.run(4, save_model, sharded_and_parallel, tmp_path, {"max_shard_size": 300})
    assert "_StridedShard" in placements[0]


MIB = 1 << 20
LARGE = (24 * MIB) // 4
"""Elements of a tensor of 24 MiB."""


def kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise AssertionError(key)


def memory_of_a_save(folder: Path, options: dict[str, Any]) -> int:
    """By how many MiB the memory of a rank grows at most while it saves 144 MiB of its own and as many of the others'."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = mesh_of(distributed.get_world_size())
    tensors = {"rows": [Shard(0)], "columns": [Shard(1)], "replicated": [Replicate()]}
    state = {
        f"{number}.{name}": DTensor.from_local(
            torch.ones(LARGE // 1024, 1024), mesh, placements, run_check=False
        )
        for number in range(2)
        for name, placements in tensors.items()
    }
    small = {
        name: DTensor.from_local(torch.ones(8, 8), mesh, p, run_check=False) for name, p in tensors.items()
    }
    fastshard.save_distributed(small, folder, **options)  # brings what is loaded once
    distributed.barrier()
    before = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    fastshard.save_distributed(state, folder, **options)
    return (kib("VmHWM") - before) >> 10


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"durable": True}], ids=str)
def test_memory_of_a_rank_does_not_grow_with_the_model(tmp_path: Path, options: dict[str, Any]) -> None:
    assert max(ranks.run(2, memory_of_a_save, tmp_path / "ours", options)) <= 64


def expert_parallel(folder: Path) -> None:
    """Names that only one rank has, between those that all have."""
    full = {
        name: values(6, 4, seed=seed)
        for seed, name in enumerate(["a", "experts.0", "experts.1", "experts.2", "z"])
    }
    mine = {"a", "z", f"experts.{distributed.get_rank()}"} | (
        {"experts.2"} if distributed.get_rank() else set()
    )
    state = {name: tensor for name, tensor in full.items() if name in mine}
    fastshard.save_distributed(state, folder / "ours", max_shard_size=150)
    distributed.barrier()
    compare(full, folder, {"max_shard_size": 150})


def test_names_that_differ_between_ranks(tmp_path: Path) -> None:
    ranks.run(2, expert_parallel, tmp_path)


def replicated(folder: Path) -> int:
    """What a rank has written of a state dict that all of them have."""
    fastshard.save_distributed({f"{n}": torch.full((1 << n, 1024), 1.0) for n in range(11)}, folder)
    figures = fastshard.stats()
    return figures.nbytes if figures else 0


def test_what_all_ranks_have_is_written_once_and_by_all(tmp_path: Path) -> None:
    written = ranks.run(4, replicated, tmp_path)
    assert sum(written) == 4096 * 2047 and max(written) < 1.3 * min(written)


def save_twice(folder: Path) -> list[str]:
    """A second save with fewer shards takes the place of the first one."""
    fastshard.save_distributed(full_state(), folder, max_shard_size=200)
    fastshard.save_distributed(full_state(), folder)
    distributed.barrier()
    return sorted(os.listdir(folder))


def test_obsolete_files_go(tmp_path: Path) -> None:
    assert ranks.run(2, save_twice, tmp_path / "new" / "ours") == [["model.safetensors"]] * 2


def odd_state(kind: str) -> dict[str, Any]:
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh, rank = mesh_of(2), distributed.get_rank()
    local = torch.ones(2, 3)
    if kind == "partial":
        return {"odd": DTensor.from_local(local, mesh, [Partial()], run_check=False)}
    if kind == "shape":
        return {"odd": torch.ones(2 + rank, 3)}
    if kind == "dtype":
        return {"odd": local.to(torch.float16 if rank else torch.float32)}
    if kind == "missing":
        shard = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
        return {} if rank else {"odd": shard}
    if kind == "placement":
        from torch.distributed.tensor import placement_types

        strided = placement_types._StridedShard(0, split_factor=3)
        return {
            "odd": DTensor.from_local(local, mesh, [strided], run_check=False, shape=(4, 3), stride=(3, 1))
        }
    if kind == "overlap":
        return {"odd": Described((4, 3), [(rank, 0)], [(0, 0)], [(3, 3)])}
    raise AssertionError(kind)


class Described(torch.Tensor):
    """Describes itself as torch 2.14's ``CheckpointableTensor``."""

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], offsets: Any, begins: Any, sizes: Any, values: Any = None
    ) -> Any:
        return (torch.ones(*sizes[0]) if values is None else values).as_subclass(cls)

    def __init__(
        self, shape: tuple[int, ...], offsets: Any, begins: Any, sizes: Any, values: Any = None
    ) -> None:
        self.global_shape, self.global_offsets = shape, offsets
        self.local_offsets, self.local_sizes = begins, sizes


def refusal(kind: str, folder: Path) -> str:
    with pytest.raises((ValueError, RuntimeError)) as raised:
        fastshard.save_distributed(odd_state(kind), folder, timeout=20)
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("partial", "Partial"),
        ("shape", "rank 1"),
        ("dtype", "torch.float16"),
        ("missing", "only 6 of 12 elements"),
        ("placement", "more than one box"),
        ("overlap", "overlap"),
    ],
)
def test_what_is_refused_is_named_on_every_rank(tmp_path: Path, kind: str, text: str) -> None:
    for said in ranks.run(2, refusal, kind, tmp_path / "ours"):
        assert text in said and "'odd'" in said, said
    assert not (tmp_path / "ours").exists() and not ranks.leftovers(tmp_path)


def several_pieces(folder: Path) -> None:
    """A buffer that holds two shards, one of them with merged leading dimensions."""
    full = {"odd": values(4, 3), "merged": values(2, 3, 5)}
    rank = distributed.get_rank()
    rows = [(rank, 0), (rank + 2, 0)]
    buffer = torch.cat([torch.zeros(1, 3), full["odd"][rank : rank + 1], full["odd"][rank + 2 : rank + 3]])
    state = {
        "odd": Described((4, 3), rows, [(1, 0), (2, 0)], [(1, 3), (1, 3)], buffer),
        "merged": Described((2, 3, 5), [(rank, 0, 0)], [(0, 0)], [(1, 3, 5)], full["merged"][rank].clone()),
    }
    fastshard.save_distributed(state, folder / "ours")
    distributed.barrier()
    compare(full, folder, {})


def test_tensors_that_describe_several_shards(tmp_path: Path) -> None:
    ranks.run(2, several_pieces, tmp_path)


def writers_publish(folder: Path) -> list[str]:
    """Each rank has one layer; two are replicated."""
    full = {f"layer.{n}": values(5, 4, seed=n) for n in range(4)}
    rank, size = distributed.get_rank(), distributed.get_world_size()
    state = {name: full[name] for n, name in enumerate(full) if n == rank or n >= size}
    fastshard.save_distributed({"old": torch.ones(9)}, folder / "ours", max_shard_size=100)
    distributed.barrier()
    fastshard.save_distributed(state, folder / "ours", max_shard_size=100, writers_publish=True)
    written = fastshard.stats()
    distributed.barrier()
    compare(full, folder, {"max_shard_size": 100})
    assert written is not None and written.files == 2
    with pytest.raises((ValueError, RuntimeError), match="no rank has all tensors of .* 'rows'"):
        fastshard.save_distributed(one_mesh(full_state(), size), folder / "ours", writers_publish=True)
    return sorted(os.listdir(folder / "ours"))


def test_each_rank_publishes_files_of_its_own(tmp_path: Path) -> None:
    names = ranks.run(2, writers_publish, tmp_path)
    assert len(names[0]) == 5 and names[0] == names[1]


class _Older:
    """A process group of a torch that does not give its store."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __hash__(self) -> int:
        return hash(self.group)

    def __eq__(self, other: object) -> bool:
        return other is self.group


def both_stores() -> tuple[bytes, bytes]:
    group = distributed.group.WORLD
    store_of(group).set("from the public one", "1")
    store_of(_Older(group)).set("from the private one", "2")
    return store_of(_Older(group)).get("from the public one"), store_of(group).get("from the private one")


def test_the_store_of_a_group_is_found_in_older_torch_too() -> None:
    assert ranks.run(2, both_stores) == [(b"1", b"2")] * 2
