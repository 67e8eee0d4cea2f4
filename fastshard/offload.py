# SPDX-License-Identifier: Apache-2.0
"""The public address of :mod:`fastshard.integrations.offload`: weights that accelerate has offloaded."""

from .integrations.offload import offloaded_state_dict as offloaded_state_dict
from .integrations.offload import offloaded_tensor as offloaded_tensor
