"""What other tools call the fields of a configuration; their names are accepted and answered with ours."""

from __future__ import annotations

from typing import Any

ALIASES: dict[str, str] = {
    "model_name_or_path": "model.name",
    "model_name": "model.name",
    "base_model": "model.name",
    "torch_dtype": "model.dtype",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "layers_to_transform": "adapter.layers",
    "bnb_4bit_quant_type": "quantization.quant_type",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "use_bnb_nested_quant": "quantization.double_quant",
    "train_file": "data.train",
    "dataset": "data.train",
    "validation_file": "data.eval",
    "eval_file": "data.eval",
    "eval_dataset": "data.eval",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sample_packing": "data.packing",
    "lr": "training.learning_rate",
    "per_device_train_batch_size": "training.batch_size",
    "micro_batch_size": "training.batch_size",
    "num_train_epochs": "training.num_epochs",
    "epochs": "training.num_epochs",
    "iters": "training.max_steps",
    "grad_accum": "training.gradient_accumulation_steps",
    "lr_scheduler_type": "training.lr_scheduler",
    "load_best_model_at_end": "training.load_best_at_end",
    "save_total_limit": "training.keep_checkpoints",
    "logging_steps": "training.log_steps",
    "steps_per_eval": "training.eval_steps",
    "output_dir": "output",
}
"""Names that other tools use for a field, by the path that graft uses."""

SWITCHES: dict[str, dict[Any, tuple[str, Any]]] = {
    "load_in_4bit": {True: ("quantization.quant_type", "nf4"), False: ("quantization", None)},
    "train_on_inputs": {True: ("data.loss_on", "all"), False: ("data.loss_on", "completion")},
    "mask_prompt": {True: ("data.loss_on", "completion"), False: ("data.loss_on", "all")},
    "completion_only_loss": {True: ("data.loss_on", "completion"), False: ("data.loss_on", "all")},
    "assistant_only_loss": {True: ("data.loss_on", "completion"), False: ("data.loss_on", "all")},
}
"""Switches of other tools whose value decides both our field and its value."""
