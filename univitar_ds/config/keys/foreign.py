"""Names that other trainers use for keys of the run file, so that the error about such a name gives our key.

The names are those of open_clip, timm, transformers' Trainer, Lightning and DeepSpeed, without regard to case, dashes
and leading dashes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from univitar_ds.config.keys.tree import INDEX, all_keys, section_at
from univitar_ds.errors import shortened

DEEPSPEED = "deepspeed"
"""The key that names the DeepSpeed JSON."""
_BATCH = "pairs per step are the items that fit into stages.N.token_budget tokens, times data.lanes"
_LANES = "each process accumulates data.lanes / processes packs (GradCache: one loss over all pairs)"
_SAMPLES = "the length of a stage is counted in samples, not in epochs or steps"
_WARMUP = "the warm-up is counted in samples"
_PRECISION = 'it sets "bf16": {"enabled": true}, or fp32 without it'
_SHIPPED = "choose zero2, zero3, zero3_offload, ... or a JSON of your own"
_RESUME = "`univitar-ds train --resume RUN` continues a run; weights of another model are model.init_from"
_BOARD = "metrics go to metrics.jsonl and TensorBoard; logging.wandb.project or logging.trackio.project adds a tracker"

_ROWS = (
    ("stages.N.lr", "", "learning_rate lr base_lr max_lr peak_lr blr"),
    ("stages.N.final_lr_ratio", "", "min_lr lr_end end_lr eta_min lr_cooldown_end"),
    ("stages.N.lr_schedule", "", "scheduler sched lr_scheduler lr_scheduler_type schedule"),
    (
        "stages.N.warmup_samples",
        _WARMUP,
        "warmup warmup_steps warmup_epochs warmup_ratio warmup_num_steps num_warmup_steps",
    ),
    ("stages.N.decay_samples", "", "decay_steps cooldown_epochs epochs_cooldown decay_epochs"),
    (
        "stages.N.samples",
        _SAMPLES,
        "epochs num_epochs num_train_epochs max_epochs max_steps num_steps train_steps total_steps "
        "max_train_steps train_num_samples num_samples total_num_steps",
    ),
    (
        "stages.N.token_budget",
        _BATCH,
        "batch_size micro_batch_size train_batch_size global_batch_size local_batch_size "
        "per_device_train_batch_size train_micro_batch_size_per_gpu max_tokens_per_batch",
    ),
    ("evaluation.token_budget", "", "per_device_eval_batch_size eval_batch_size"),
    (
        "data.lanes",
        _LANES,
        "accum_freq gradient_accumulation_steps accumulate_grad_batches grad_accum_steps accum_steps "
        "grad_accumulation_steps",
    ),
    ("data.workers", "processes per rank", "num_workers workers dataloader_num_workers n_workers"),
    ("data.prefetch_packs", "", "prefetch_factor dataloader_prefetch_factor"),
    ("data.pool_samples", "", "shuffle_buffer shuffle_buffer_size buffer_size"),
    (
        "data.sources",
        "a list of {path: ...}",
        "train_data data_path data_dir dataset datasets train_dataset train_files shards urls",
    ),
    ("stages.N.weights", "", "train_data_upsampling_factors mixture mix_weights"),
    ("evaluation.sources", "a list of {path: ...}", "val_data eval_data imagenet_val eval_dataset validation val eval"),
    (DEEPSPEED, _PRECISION, "precision amp bf16 fp16 mixed_precision dtype torch_dtype data_types tf32"),
    (
        DEEPSPEED,
        _SHIPPED,
        "zero_stage zero_optimization zero fsdp sharding stage3 offload offload_optimizer "
        "zero_allow_untested_optimizer deepspeed_config ds_config",
    ),
    (
        "model.checkpoint_every",
        "auto, selective, or 1 for every block; stages.N.checkpoint_every for one stage",
        "gradient_checkpointing grad_checkpointing activation_checkpointing use_checkpoint remat",
    ),
    ("output", "", "output_dir logs log_dir save_dir out_dir work_dir default_root_dir"),
    ("name", "", "run_name exp_name experiment experiment_name"),
    ("seed", "", "random_seed manual_seed seed data_seed"),
    (
        "stages.N.image.size_px",
        "with kind fixed; native sizes have min_tokens and max_tokens",
        "image_size img_size input_size force_image_size resolution",
    ),
    ("stages.N.image.size_px", "whole images are resized, none is cropped", "crop_size crop_pct center_crop"),
    ("stages.N.video_frames", "", "num_frames clip_len frames"),
    (
        "model.init_from",
        "",
        "pretrained init_checkpoint initial_checkpoint finetune model_name_or_path pretrained_image weights_path",
    ),
    ("model.encoder", "", "arch model_name backbone vision_tower vision_cfg"),
    ("model.text", "", "text_model text_cfg text_tower hf_model_name"),
    ("model.text.tokenizer", "", "tokenizer hf_tokenizer_name tokenizer_name"),
    ("model.text.context_length", "", "max_seq_length max_length seq_len context_len"),
    ("stages.N.frozen", "", "lock_image freeze_vision lock_text freeze lock"),
    ("model.attention", "", "attn_implementation use_flash_attn flash_attention flash_attn"),
    ("model.compile", "", "torch_compile torchcompile"),
    ("stages.N.stochastic_depth", "", "drop_path drop_path_rate stochastic_depth_rate"),
    ("stages.N.patch_dropout", "", "force_patch_dropout mask_ratio token_dropout"),
    ("optimizer.weight_decay", "", "wd weight_decay adam_weight_decay"),
    ("optimizer.betas", "a list of two", "beta1 beta2 adam_beta1 adam_beta2 opt_betas betas"),
    ("optimizer.eps", "", "epsilon adam_epsilon opt_eps"),
    ("optimizer.kind", "adamw, muon or that of a plugin", "opt optim optimizer_type optimizer_name"),
    ("optimizer.muon.momentum", "", "muon_momentum"),
    (
        "optimizer.clip_norm",
        "",
        "grad_clip grad_clip_norm max_grad_norm gradient_clipping clip_grad gradient_clip_val grad_norm_clip",
    ),
    ("optimizer.layer_decay", "", "layer_lr_decay layerwise_decay llrd"),
    ("optimizer.ema_decay", "", "ema model_ema use_ema model_ema_decay"),
    ("objective.kind", "", "loss loss_type siglip criterion objective_type"),
    ("objective.classification.label_smoothing", "", "smoothing label_smoothing_factor"),
    ("objective.teacher", "", "distill_model teacher teacher_model distill_pretrained"),
    ("stages.N.distill", "", "distill_weight distillation_alpha"),
    ("checkpoint.every_steps", "", "save_steps save_frequency save_interval checkpoint_interval save_every"),
    ("checkpoint.keep", "", "save_total_limit checkpoint_hist save_top_k keep_last"),
    ("logging.every_steps", "", "logging_steps log_every_n_steps log_interval log_every print_freq"),
    ("", _BOARD, "wandb report_to wandb_project use_wandb wandb_project_name log_wandb logger"),
    ("", _RESUME, "resume resume_from_checkpoint ckpt_path"),
    (
        "",
        "`univitar-ds train --nproc N` or a launcher sets the number of processes",
        "nproc gpus num_gpus devices world_size num_processes",
    ),
)
"""Our key ("" if there is none), a remark, and the names in other trainers."""
ANSWERS = {name: (ours, more) for ours, more, names in _ROWS for name in names.split()}
"""Our key and the remark, by the name in other trainers."""


def unknown_key(location: Sequence[Any]) -> str:
    """Returns a sentence about an unknown key that names our key or similar ones. `location`: names and indices."""
    *sections, key = location
    place, name = shortened(".".join(map(str, location))), normalized(str(key))
    section = section_at(sections)
    here = list(section.model_fields) if section else []
    if (found := answer(str(key))) is not None:
        return f"unknown key {place}; {found}"
    if name in here:
        return f"unknown key {place}; write {name}"
    if near := difflib.get_close_matches(name, here, n=1, cutoff=0.75):
        return f"unknown key {place}; did you mean {near[0]!r}?"
    if elsewhere := [ours for ours, found in all_keys().items() if found.parts[-1] == name]:
        return f"unknown key {place}; {name} is a key of another section: {', '.join(elsewhere[:4])}"
    if near := difflib.get_close_matches(name, here, n=1, cutoff=0.5):
        return f"unknown key {place}; did you mean {near[0]!r}?"
    return f"unknown key {place}; known here: {', '.join(here)}"


def answer(name: str) -> str | None:
    """Returns a sentence with our key for a name in other trainers; None if the table does not have the name."""
    found = ANSWERS.get(normalized(name))
    if found is None:
        return None
    ours, more = found
    name = shortened(name)
    if ours == DEEPSPEED:
        return f"{name} belongs to the DeepSpeed JSON that `deepspeed` names: {more}"
    if ours == normalized(name):
        return f"{name} belongs to the top level of the run file"
    return "; ".join(filter(None, [f"{name} is {ours} here" if ours else "", more]))


def similar_keys(name: str, names: Iterable[str]) -> list[str]:
    """Returns at most four of the dotted names that are like `name`, as a whole or in their last part."""
    names = list(names)
    last = normalized(name.split(".")[-1])
    same = [ours for ours in names if ours.split(".")[-1] == last]
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.6)
    lasts = sorted({ours.split(".")[-1] for ours in names})
    near_last = set(difflib.get_close_matches(last, lasts, n=2, cutoff=0.7))
    return list(dict.fromkeys([*same, *near, *(ours for ours in names if ours.split(".")[-1] in near_last)]))[:4]


def normalized(name: str) -> str:
    """Returns a name in the form of the table: lower case, without leading dashes, with underscores."""
    return name.strip().lstrip("-").replace("-", "_").lower()


def pattern_of(name: str) -> str:
    """Returns the dotted name of a key with N for each index of a list: stages.0.lr becomes stages.N.lr."""
    return ".".join(INDEX if part.isdigit() else part for part in name.split("."))
