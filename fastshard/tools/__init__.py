# SPDX-License-Identifier: Apache-2.0
"""Makes another checkpoint of the checkpoint in a folder."""
