# SPDX-License-Identifier: Apache-2.0
"""Leads calls of other libraries to the public functions."""
