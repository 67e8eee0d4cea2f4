# SPDX-License-Identifier: Apache-2.0
"""Weights that accelerate has offloaded, by the address that users have."""

from .integrations.offload import offloaded_state_dict as offloaded_state_dict
from .integrations.offload import offloaded_tensor as offloaded_tensor
