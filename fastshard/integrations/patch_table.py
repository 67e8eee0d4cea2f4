# SPDX-License-Identifier: Apache-2.0
"""The table of what fastshard replaces.

To add a replacement, add a row to :data:`TABLE`, or to :data:`ASYNCHRONOUS` for what is replaced only on request,
and write its implementation. A row names the module that *defines* the function, the attribute in it
(``"save_file"``; ``"PreTrainedModel.save_pretrained"`` for what a class holds), and the implementation, which is
imported by the first call. Rows that work only together have a group, which is replaced whole or not at all.
"""

from __future__ import annotations

from typing import Final

from .patch_entry import Entry

_ADAPTERS: Final = "fastshard.integrations.adapters"
_PRETRAINED: Final = "transformers: save_pretrained"
_ACCELERATOR: Final = "accelerate: save_model"
_STATE: Final = "accelerate: save_state"
_TRAINER: Final = "transformers: checkpoints of Trainer"
_DCP: Final = "torch: writers of distributed checkpoints"
_CONSOLIDATION: Final = "torch: consolidation of distributed checkpoints"
_WRITER: Final = "filesystem:_FileSystemWriter."
_DISTRIBUTED: Final = tuple(
    Entry(
        f"torch.distributed.checkpoint.{where.partition(':')[0]}",
        where.partition(":")[2],
        f"fastshard.integrations.dcp:{ours}",
        known,
        group,
        since="2.13",  # older ones have some of it
    )
    for where, ours, known, group in (
        # First what is imported last.
        ("hf_storage:HuggingFaceStorageWriter.finish", "finish_tensors", "self metadata results", _DCP),
        (_WRITER + "__init__", "__init__", "self path", _DCP),
        (_WRITER + "set_up_storage_writer", "set_up_storage_writer", "self is_coordinator", _DCP),
        (_WRITER + "_write_data", "_write_data", "self planner file_queue", _DCP),
        (_WRITER + "finish", "finish", "self metadata results", _DCP),
        ("staging:BlockingAsyncStager.stage", "stage_blocking", "self state_dict", ""),
        ("staging:DefaultStager.stage", "stage_by_default", "self state_dict", ""),
        (
            "_async_process_executor:_ProcessBasedAsyncCheckpointExecutor.execute_save",
            "execute_save",
            "self",
            "",
        ),
        (
            "_consolidate_hf_safetensors:_consolidate_safetensors_files",
            "consolidate",
            "input_dir output_dir fqn_to_file_mapping num_threads",
            _CONSOLIDATION,
        ),
    )
)

TABLE: tuple[Entry, ...] = (
    Entry(
        "torch.serialization",
        "save",
        "fastshard.integrations.adapters:torch_save",
        "obj f pickle_module pickle_protocol _use_new_zipfile_serialization _disable_byteorder_record",
    ),
    Entry("safetensors.torch", "save_file", f"{_ADAPTERS}:save_file", "tensors filename metadata"),
    Entry("safetensors.torch", "save", f"{_ADAPTERS}:save", "tensors metadata"),
    Entry(
        "safetensors.torch",
        "save_model",
        f"{_ADAPTERS}:save_model",
        "model filename metadata force_contiguous",
    ),
    Entry(
        "huggingface_hub.serialization._torch",
        "save_torch_state_dict",
        "fastshard.integrations.adapters:save_torch_state_dict",
        "state_dict save_directory",
    ),
    Entry(
        "huggingface_hub.lfs",
        "UploadInfo.from_path",
        "fastshard.integrations.hub_uploads:from_path",
        "cls path",
        since="2.4",  # older ones read the file here
    ),
    Entry(
        "transformers.modeling_utils",
        "PreTrainedModel.save_pretrained",
        "fastshard.integrations.transformers:save_pretrained",
        "self save_directory",
        _PRETRAINED,
    ),
    Entry(
        "transformers.integrations.accelerate",
        "load_offloaded_parameter",
        "fastshard.integrations.transformers:load_offloaded_parameter",
        "model param_name",
        _PRETRAINED,
        since="5",
    ),
    Entry(
        "transformers.utils.logging",
        "_tqdm_cls.__call__",
        "fastshard.integrations.transformers:progress_bar",
        "self",
        _PRETRAINED,
    ),
    Entry(
        "transformers.distributed.checkpoint",
        "_save_model_checkpoint_distributed",
        "fastshard.integrations.transformers_distributed:save_model",
        "model checkpoint_dir",
        since="5.24",
    ),
    Entry(
        "accelerate.accelerator",
        "Accelerator.save_model",
        "fastshard.integrations.accelerate:save_model",
        "self model save_directory",
        _ACCELERATOR,
    ),
    Entry(
        "accelerate.utils.modeling",
        "get_state_dict_offloaded_model",
        "fastshard.integrations.accelerate:get_state_dict_offloaded_model",
        "model",
        _ACCELERATOR,
    ),
    Entry(
        "diffusers.models.modeling_utils",
        "ModelMixin.save_pretrained",
        "fastshard.integrations.diffusers:save_model",
        "self save_directory",
    ),
    Entry(
        "diffusers.pipelines.pipeline_utils",
        "DiffusionPipeline.save_pretrained",
        "fastshard.integrations.diffusers:save_pipeline",
        "self save_directory",
    ),
    *_DISTRIBUTED,
)

ASYNCHRONOUS: tuple[Entry, ...] = (
    Entry(
        "transformers.trainer",
        "Trainer._save_checkpoint",
        "fastshard.integrations.trainer:save_checkpoint",
        "self model trial",
        _TRAINER,
    ),
    Entry(
        "transformers.trainer",
        "Trainer._get_output_dir",
        "fastshard.integrations.trainer:run_folder",
        "self trial",
        _TRAINER,
    ),
    Entry(
        "transformers.trainer",
        "Trainer._rotate_checkpoints",
        "fastshard.integrations.trainer:rotate_by_method",
        "self use_mtime output_dir",
        _TRAINER,
        until="5.2",
    ),
    Entry(
        "transformers.trainer_utils",
        "rotate_checkpoints",
        "fastshard.integrations.trainer:rotate",
        "output_dir save_total_limit best_model_checkpoint use_mtime",
        _TRAINER,
        since="5.2",
    ),
    *(
        Entry(module, name, "fastshard.integrations.trainer:after_checkpoints", known, _TRAINER)
        for module, name, known in (
            ("transformers.trainer", "Trainer._load_best_model", "self"),
            ("transformers.trainer_utils", "get_last_checkpoint", "folder"),
        )
    ),
    Entry(
        "transformers.trainer",
        "Trainer.train",
        "fastshard.integrations.trainer:train",
        "self resume_from_checkpoint trial",
        _TRAINER,
    ),
    Entry(
        "huggingface_hub.serialization._torch",
        "split_torch_state_dict_into_shards",
        "fastshard.integrations.transformers:split_into_shards",
        "state_dict filename_pattern max_shard_size",
    ),
    Entry(
        "accelerate.accelerator",
        "Accelerator.save_state",
        "fastshard.integrations.accelerate_state:save_state",
        "self output_dir",
        _STATE,
    ),
    Entry(
        "accelerate.accelerator",
        "Accelerator.load_state",
        "fastshard.integrations.accelerate_state:load_state",
        "self",
        _STATE,
    ),
    Entry(
        "accelerate.accelerator",
        "Accelerator.end_training",
        "fastshard.integrations.accelerate_state:end_training",
        "self",
        _STATE,
    ),
)
"""What ``install(asynchronous=True)``, ``install(manifest=True)`` and ``install(incremental=True)`` replace besides."""

NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "safetensors: save_model": ("safetensors.torch:_remove_duplicate_names",),
    "huggingface_hub: save_torch_state_dict": (
        "huggingface_hub.serialization._torch:_clean_state_dict_for_safetensors",
        "huggingface_hub.serialization._base:split_state_dict_into_shards_factory",
        "huggingface_hub.serialization._torch:split_torch_state_dict_into_shards",
        "huggingface_hub.serialization._torch:logger",
        "huggingface_hub.constants:SAFETENSORS_WEIGHTS_FILE_PATTERN",
        "huggingface_hub.constants:PYTORCH_WEIGHTS_FILE_PATTERN",
    ),
    _PRETRAINED: (
        "transformers.utils.logging:EmptyTqdm",
        "transformers.utils.logging:is_progress_bar_enabled",
    ),
    _TRAINER: ("transformers.trainer_callback:TrainerCallback",),
    _CONSOLIDATION: (
        "torch.distributed.checkpoint._consolidate_hf_safetensors:_OutputFileData",
        "torch.distributed.checkpoint._consolidate_hf_safetensors:_FqnData",
    ),
    _DCP: (
        "torch.distributed.checkpoint.filesystem:FileSystem",
        "torch.distributed.checkpoint.filesystem:_StorageInfo",
        "torch.distributed.checkpoint.filesystem:SerializationFormat",
    ),
    _ACCELERATOR: (
        "accelerate.utils.offload:OffloadedWeightsLoader",
        "accelerate.utils.offload:PrefixedDataset",
    ),
}
"""What the implementations of each group use of the library besides the functions they replace."""
