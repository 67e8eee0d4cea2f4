# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of saving, beside what others use. Start with ``python bench/save.py --quick``.

In reading order: ``samples`` (what was measured, statistics), ``machine`` (where), ``rivals`` and
``ceilings`` (who saves), ``cases`` (what is saved, and the goals), ``verify`` (are the bytes right),
``memory`` (peak in a fresh process), ``harness`` (the rounds), ``report`` (table, verdict, plot),
``save`` (the command line). A file imports only files that come before it here.
"""
