#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Two machines that share a filesystem, in one: saves of many ranks, and of each rank's own files, into the same folders.

    python tests/two_nodes.py [--per-node 2] [--rounds 6] [--mount-options=-p,0755]

Each node is a network, process, host and mount namespace of its own, with a FUSE mount (bindfs) of the shared folder, so
what the kernel remembers of names and attributes differs between the nodes, and no lock on a folder is seen by both. The
ranks are started by torchrun and speak over a virtual network. It needs root, and the programs bindfs, ip and unshare;
ends with status 77 where these are missing, and with 1 if a file is lost, old, or left over.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TOOLS = ("bindfs", "ip", "unshare", "mount", "hostname")
REMEMBERED_SECONDS = 1
"""How long a mount trusts what it knows of names and attributes, as FUSE filesystems usually do."""
SHARD = "1MB"

NODE = """
set -e
node=$1 shared=$2 mount=$3 per_node=$4 rounds=$5 script=$6 python=$7
shift 7
hostname "node$node"
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
bindfs --multithreaded -o attr_timeout={seconds},entry_timeout={seconds} "$@" "$shared" "$mount"
ip link set lo up
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME="inside$node"
"$python" -m torch.distributed.run --nnodes 2 --node-rank "$node" --nproc-per-node "$per_node" \\
    --master-addr 10.90.0.1 --master-port 29511 "$script" --rank-in "$mount" --rounds "$rounds"
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-node", type=int, default=1, help="ranks on each node")
    parser.add_argument("--rounds", type=int, default=6, help="saves of each kind")
    parser.add_argument(
        "--mount-options", default="", help="more options of bindfs, with commas between them"
    )
    parser.add_argument("--rank-in", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        return rank(Path(options.rank_in), options.rounds)
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        print(f"needs root, and {', '.join(missing) or 'nothing else'}")
        return 77
    with tempfile.TemporaryDirectory(prefix="two-nodes-") as top:
        shared, mount = Path(top, "shared"), Path(top, "mount")
        shared.mkdir()
        mount.mkdir()
        try:
            connect()
            extra = [option for option in options.mount_options.split(",") if option]
            settings = [
                str(options.per_node),
                str(options.rounds),
                os.path.abspath(__file__),
                sys.executable,
                *extra,
            ]
            nodes = [
                subprocess.Popen(
                    [
                        "ip",
                        "netns",
                        "exec",
                        f"fastshard{node}",
                        "unshare",
                        "-muipf",
                        "--propagation",
                        "private",
                    ]
                    + ["bash", "-c", NODE.format(seconds=REMEMBERED_SECONDS), "node", str(node)]
                    + [str(shared), str(mount), *settings]
                )
                for node in range(2)
            ]
            failed = [node.wait() for node in nodes]
        finally:
            disconnect()
        left = [str(path.relative_to(shared)) for path in shared.rglob(".fastshard-*")]
    print("left over:", left) if left else None
    return 1 if any(failed) or left else 0


def connect() -> None:
    disconnect()
    for command in (
        "netns add fastshard0",
        "netns add fastshard1",
        "link add inside0 netns fastshard0 type veth peer name inside1 netns fastshard1",
        "-n fastshard0 addr add 10.90.0.1/24 dev inside0",
        "-n fastshard1 addr add 10.90.0.2/24 dev inside1",
        "-n fastshard0 link set inside0 up",
        "-n fastshard1 link set inside1 up",
    ):
        subprocess.run(["ip", *command.split()], check=True)


def disconnect() -> None:
    for node in range(2):
        subprocess.run(["ip", "netns", "del", f"fastshard{node}"], stderr=subprocess.DEVNULL, check=False)


def rank(top: Path, rounds: int) -> int:
    """What each rank does. Returns its exit status."""
    import torch
    from safetensors.torch import load_file
    from torch import distributed
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    import fastshard
    from fastshard.dcp import FastshardFileSystemWriter, FastshardReader, FastshardWriter

    distributed.init_process_group("gloo")
    number, size = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(0)
    full = {f"layers.{i}.weight": torch.randn(257, 384) for i in range(12)}
    full["steps"] = torch.arange(100)
    wrong: list[str] = []

    def spread(add: int) -> dict[str, DTensor]:
        cuts = [Shard(i % 2) if value.dim() == 2 else Replicate() for i, value in enumerate(full.values())]
        return {
            name: distribute_tensor(value + add, mesh, [cut])
            for (name, value), cut in zip(full.items(), cuts)
        }

    def check(what: str, add: int, load: Callable[[dict[str, DTensor]], object]) -> None:
        found = spread(-1)
        load(found)
        for name, value in found.items():
            if not torch.equal(value.full_tensor(), full[name] + add):
                wrong.append(f"{what}, round {add}: {name}")

    for folder in ("sharded", "own", "files"):
        (top / folder).mkdir(exist_ok=True)
    for add in range(rounds):
        hub = str(top / "hub")
        manifest = (False, True, "sha256")[add % 3]
        fastshard.save_distributed(
            spread(add), hub, max_shard_size=SHARD, durable=bool(add % 2), manifest=manifest
        )
        check("save_distributed", add, lambda found, h=hub: fastshard.load_distributed(found, h))
        for folder, writer, reader in (
            ("dcp", FastshardWriter, FastshardReader),
            ("distcp", FastshardFileSystemWriter, checkpoint.FileSystemReader),
        ):
            path = str(top / folder)
            checkpoint.save(spread(add), storage_writer=writer(path))
            check(folder, add, lambda found, r=reader, p=path: checkpoint.load(found, storage_reader=r(p)))

        mine = {f"{number}.{i}": torch.full((300, 500), float(add * 100 + number)) for i in range(6)}
        distributed.barrier()  # from here on all ranks are in the same folders at once
        fastshard.save_sharded_state(mine, top / "sharded", tp_rank=number, tp_size=size, max_size=1 << 20)
        fastshard.save_distributed(mine, top / "own", writers_publish=True, max_shard_size=SHARD)
        fastshard.save_files({top / "files" / f"{name}.safetensors": {name: mine[name]} for name in mine})
        distributed.barrier()
        time.sleep(1.1 * REMEMBERED_SECONDS)
        for folder in ("sharded", "own", "files"):
            found: dict[str, torch.Tensor] = {}
            for path in (top / folder).glob("*.safetensors"):
                found |= load_file(path)
            for other in range(size):
                for i in range(6):
                    value = found.get(f"{other}.{i}")
                    if value is None or value[0, 0] != add * 100 + other:
                        wrong.append(
                            f"{folder}, round {add}: {other}.{i} is {'missing' if value is None else 'old'}"
                        )
        del found, value
        distributed.barrier()
    print(
        f"{os.uname().nodename}, rank {number} of {size}: {len(wrong)} wrong",
        *wrong[:10],
        sep="\n  ",
        flush=True,
    )
    distributed.destroy_process_group()
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
