# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of saving, beside what others use. Start with ``python bench/save.py --quick``, and on a
machine with a GPU with ``python bench/gpu.py --out DIR --part 1``, then 2.

In reading order: ``grow`` (memory that is there once it is used), ``samples`` (what was measured,
statistics), ``machine`` (where), ``models`` (what transformers makes of tensors), ``job`` (one save, and
one way to do it), ``builders`` (the tensors that are saved), ``training_steps`` (a job that
goes on while its state is saved), ``rivals_fastshard``, ``rivals_torch``, ``rivals_fastsafetensors``, ``rivals_dcp``, ``rivals_sharded``,
``rivals_hub``, ``rivals_async`` and ``rivals_training`` (who saves), ``rivals_verify`` (who reads what was saved), ``rivals`` (all of them), ``ceilings``
(what the hardware allows), ``case`` and ``cases`` (what is saved by whom), ``rank_cases`` (by the ranks of a group), ``goals`` (what
fastshard must show),
``fitting`` (how to measure, and what fits), ``verify`` (are the bytes right), ``memory`` (peak in a fresh
process), ``disturbance`` (what a job beside a save notices), ``harness`` (the rounds), ``rank_job``,
``rivals_ranks``, ``rank_process``, ``rank_readers`` and ``ranks`` (the rounds of a group of processes), ``report`` (table,
verdict, plot), ``small_saves`` (saves made by the thousand), ``planning`` (what laying out costs), ``save``
(the command line), ``load`` (another one, for loading). Then, of the standard library only: ``budget``
(commands under one clock), ``build`` (a package made of the checkout), ``brief`` (the short table of a
run's JSON), ``gpu_tests`` (the tests that need a GPU), ``gpu`` (all of it in one go). A file imports only files that come before it here.
"""
