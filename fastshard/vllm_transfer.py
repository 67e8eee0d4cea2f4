# SPDX-License-Identifier: Apache-2.0
"""The public address of :mod:`fastshard.integrations.vllm_transfer`, for trainers that send their weights to vLLM."""

from .integrations.vllm import register as _register
from .integrations.vllm_transfer import ShmTrainerInitInfo as ShmTrainerInitInfo

_register()
