# SPDX-License-Identifier: Apache-2.0
"""huggingface_hub and transformers save as they come, and with fastshard in the place of what they call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from . import models
from .job import CPU, OFFLOADED, Job, Prepare, Rival
from .rivals_fastshard import detail, require, variant
from .samples import RETURN


def _huggingface_hub(job: Job) -> Callable[[], None]:
    from huggingface_hub import save_torch_state_dict

    tensors = job.merged()
    return lambda: save_torch_state_dict(dict(tensors), job.out, max_shard_size=job.largest)


def _fastshard_hub(job: Job) -> Callable[[], None]:
    import fastshard

    require("save_torch_state_dict")
    save_torch_state_dict, tensors = fastshard.save_torch_state_dict, job.merged()
    return lambda: save_torch_state_dict(dict(tensors), job.out, max_shard_size=job.largest)


def _pretrained(job: Job) -> Callable[[], None]:
    with models.quiet():
        model = models.llama(job.merged())
    return lambda: model.save_pretrained(job.out, max_shard_size=job.largest)


def _trainer(job: Job) -> Callable[[], None]:
    weights, moments = job.shards
    with models.quiet():
        trainer = models.trainer(weights, moments, job.out)
    # What training calls when a checkpoint is due.
    return lambda: trainer._save_checkpoint(trainer.model_wrapped, trial=None)


def _offloaded(job: Job) -> Callable[[], None]:
    with models.quiet():
        model = models.on_disk(job.merged(), job.out.with_name(OFFLOADED) / str(job.nbytes))
    return lambda: model.save_pretrained(job.out)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    import fastshard

    with models.quiet(), fastshard.installed():
        yield


def _with_fastshard(prepare: Prepare) -> Prepare:
    """Prepares the same call, if this fastshard can be put in the place of what it calls."""

    def prepare_if_possible(job: Job) -> Callable[[], None]:
        require("installed")
        return prepare(job)

    return prepare_if_possible


def _transformers(name: str, call: str, prepare: Prepare, **fields: Any) -> tuple[Rival, Rival]:
    """Makes two rivals of a call of transformers: as it comes, and inside ``fastshard.installed()``."""
    fields |= {"modes": (RETURN,), "own": True}
    return (
        Rival(
            f"fastshard-{name}",
            f"{call}, inside fastshard.installed()",
            _with_fastshard(prepare),
            within=installed,
            detail=detail,
            **fields,
        ),
        Rival(f"transformers-{name}", f"{call}, as it comes", prepare, within=models.quiet, **fields),
    )


HUB = (
    variant("fastshard-hub", "save_torch_state_dict", _fastshard_hub, modes=(RETURN,), own=True),
    Rival(
        "huggingface_hub",
        "huggingface_hub.save_torch_state_dict",
        _huggingface_hub,
        modes=(RETURN,),
        own=True,
    ),
)

TRANSFORMERS = (
    *_transformers("pretrained", "PreTrainedModel.save_pretrained", _pretrained),
    *_transformers("trainer", "a checkpoint of a Trainer", _trainer),
    *_transformers(
        "offloaded",
        "save_pretrained of a model on disk",
        _offloaded,
        devices=(CPU,),
        footprint=2.0,  # the model in memory, once
    ),
)
