# SPDX-License-Identifier: Apache-2.0
"""vLLM's weight transfer through a file in shared memory: the backend ``fastshard_shm``.

vLLM's backends send a trainer's weights over NCCL, CUDA IPC or RDMA. This one is for a trainer and a server on the same
host that have no such link, or that must not share a GPU context: the trainer fills a prepared file in ``/dev/shm``
(:func:`fastshard.prepare`), and every worker of the server maps it and loads its part, as from a checkpoint. The
workers of all ranks read the same pages.

The base classes are those of vLLM 0.32 and 0.33, ``vllm/distributed/weight_transfer/base.py``. vLLM imports this module
when the backend is asked for; :mod:`fastshard.integrations.vllm_probe` registers it, if the installed version has them as they
are used here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from ..api.prepared import PreparedSave, prepare
from ..engine.mapped import load_mapped
from .vllm_probe import TRANSFER


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc, unused-ignore]
    """What a worker is told once."""

    path: str
    """The file that the trainer fills."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc, unused-ignore]
    """What a worker is told of each save."""

    inode: int
    nbytes: int


class ShmWeightTransferEngine(WeightTransferEngine):  # type: ignore[misc, unused-ignore]
    """A worker's side: loads the file that the trainer has published."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    # The file has the weights of the model that is served, and no others.
    supports_draft_weight_update = False

    path: str | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Notes where the weights will be. The file need not be there yet."""
        self.path = init_info.path

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads the file. Without an accelerator, which vLLM's method waits for, there is nothing to wait for."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if self.path is None:
            raise RuntimeError("init_weight_transfer_engine has to be called before weights are updated")
        check_same(self.path, update_info)
        self.model.load_weights(load_mapped(self.path).items())

    def shutdown(self) -> None:
        """There is nothing to release: a mapping lasts as long as an update."""


def check_same(path: str, expected: UpdateInfo) -> None:
    """Raises ``ValueError`` unless the file is the one that the trainer has written.

    In a container ``/dev/shm`` is usually the container's own.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    if found is None or (found.st_ino, found.st_size) != (expected.inode, expected.nbytes):
        seen = "there is none" if found is None else "it is another file"
        raise ValueError(
            f"{path!r} is not the file that the trainer has written: here {seen}. Trainer and server must see the same "
            "/dev/shm (containers: --ipc=host, or one volume for both)"
        )


@dataclass
class ShmTrainerInitInfo(TrainerInitInfo):  # type: ignore[misc, unused-ignore]
    """Selects this backend in ``WeightTransferTrainerFactory.trainer_init``, on every rank of a trainer."""

    backend: ClassVar[str] = TRANSFER

    path: str
    """The file to fill, on a filesystem that the server's workers see under the same path, best in ``/dev/shm``."""
    generations: int = 2
    """As for :func:`fastshard.prepare`."""


class ShmTrainerWeightTransferEngine(TrainerWeightTransferEngine):  # type: ignore[misc, unused-ignore]
    """A trainer's side: rank 0 saves what its source yields and tells the server, which answers when it has loaded it."""

    init_info_cls = ShmTrainerInitInfo

    def __init__(self, *, path: str, generations: int, **more: Any) -> None:
        super().__init__(**more)
        self.path, self.generations = path, generations
        self._prepared: PreparedSave | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    @classmethod
    def trainer_init(
        cls, init_info: ShmTrainerInitInfo, *, client: Any, source: Any = None
    ) -> ShmTrainerWeightTransferEngine:
        """Tells the workers where the weights will be. ``source`` is a ``WeightSource``."""
        if source is None:
            raise ValueError(f"{TRANSFER} needs a WeightSource, whose tensors it saves")
        path = os.path.abspath(init_info.path)
        engine = cls(
            path=path,
            generations=init_info.generations,
            client=client,
            source=source,
            is_sender=init_info.is_sender,
        )
        if engine.is_sender:
            client.init_weight_transfer_engine({"path": path})
        return engine

    def send_weights(self) -> None:
        """Saves the weights as they are now, and returns when all workers have loaded them.

        Every rank of the trainer calls it, as the source may have to gather what it yields. The server goes on with
        the old weights until the file is complete.
        """
        self._tensors = dict(self.source)
        if not self.is_sender:
            self._tensors = {}
            return
        if self._prepared is None:
            self._prepared = prepare(
                lambda: self._tensors,
                self.path,
                {"format": "pt"},
                generations=self.generations,
                allow_strided=True,
            )
        self._prepared.save()
        self._tensors = {}
        saved = os.stat(self.path)
        self.client.start_weight_update()
        self.client.update_weights({"inode": saved.st_ino, "nbytes": saved.st_size})
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        """Releases the buffers. The newest weights stay in the file."""
        if self._prepared is not None:
            self._prepared.close()
