# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in a folder becomes another one."""
