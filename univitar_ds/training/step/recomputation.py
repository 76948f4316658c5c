"""What a stage recomputes in its backward passes: `checkpoint_every: auto`.

The choices are nothing, norms and gates (selective), every 2nd block and every block. On a GPU, "auto" is the least
recomputation with which the activations of a full pack fit, on every rank, into the memory that is free when the stage
begins. The bytes are those of `model.blocks.activations` for the encoder and `_TEXT_TENSORS` for the text tower.
`RESERVED_PER_PARAMETER` bytes of the free memory for each parameter are reserved for later allocations: gradients with
ZeRO 1 and 2, whole weights and buckets with ZeRO-3. The choice does not change results. It must be the same on all
ranks, since a block that runs again gathers its weights again.
"""

from __future__ import annotations

import logging
from typing import Any

from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.model.blocks.activations import LADDER, Kind, bytes_of_pack, least_recomputation
from univitar_ds.training.distributed.process_group import gather_numbers
from univitar_ds.training.engine.engine import Engine
from univitar_ds.training.step.kept_packs import USABLE, GpuMemory, Memory

RESERVED_PER_PARAMETER = 6
"""Bytes of a gradient in float32 and a weight in bfloat16."""
_TEXT_TENSORS = 18
"""Activations of a text block, as a number of tensors of its width (derived: 10, and 8 for the feed-forward layer)."""
NAMES = {0: "nothing", "selective": "norms and gates", 2: "every 2nd block", 1: "every block"}

logger = logging.getLogger(__name__)


def recomputation_of(cfg: RunConfig, stage: StageConfig, engine: Engine, memory: Memory | None = None) -> Kind:
    """Returns the `checkpoint_every` of a stage. All ranks call it when the stage begins.

    Args: memory: of the device; None: as torch counts it, on a GPU. Without a GPU "auto" recomputes nothing.
    """
    wanted = cfg.model.checkpoint_every if stage.checkpoint_every is None else stage.checkpoint_every
    if wanted != "auto":
        return wanted
    if memory is None:
        if engine.world.device.type != "cuda":
            return 0
        memory = GpuMemory(engine.world.device)
    width = engine.dtype.itemsize
    free = USABLE * memory.usable() - memory.used() - RESERVED_PER_PARAMETER * _parameters(engine)
    free -= _text_bytes(cfg, stage, engine, width)
    free = float(gather_numbers([free], engine.world).min())
    config, ranks, tensor = engine.module.vision.config, cfg.model.sequence_parallel, cfg.model.tensor_parallel
    tokens = stage.token_budget * (1 - stage.patch_dropout) / ranks
    shared = {"width": width, "tensor": tensor, "sequence": ranks}
    kind = least_recomputation(config, tokens, free, **shared)
    if engine.world.is_main:
        sizes = {one: bytes_of_pack(config, one, tokens, **shared) for one in LADDER}
        needs = [f"{size / 1e9:.1f} GB ({NAMES[one]})" for one, size in sizes.items()]
        fits = sizes[kind] <= free
        logger.log(
            logging.INFO if fits else logging.WARNING,
            "stage %s recomputes %s (checkpoint_every auto): %.1f GB are free; by recomputation, a pack of %d tokens "
            "needs %s%s",
            *(stage.name, NAMES[kind], free / 1e9, stage.token_budget, ", ".join(needs)),
            "" if fits else "; none fits, so lower token_budget if the memory does not suffice",
        )
    return kind


def _parameters(engine: Engine) -> int:
    """Returns the number of elements of the whole model's parameters; under ZeRO-3 the tensors of a rank are shards."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())


def _text_bytes(cfg: RunConfig, stage: StageConfig, engine: Engine, width: int) -> float:
    """Returns the bytes of the text tower's activations for a pack with as many captions as possible."""
    text: Any = getattr(engine.module, "text", None)
    if text is None or cfg.model.text.frozen or "text" in stage.frozen:
        return 0.0
    shape = text.model.config
    tokens = _most_items(stage) * shape.max_position_embeddings
    return float(tokens * shape.num_hidden_layers * _TEXT_TENSORS * shape.hidden_size * width)


def _most_items(stage: StageConfig) -> int:
    """Returns the number of items of the smallest size that fit into a pack."""
    rules = [(stage.image, 1, stage.video_ratio < 1), (stage.video, stage.video_frames, stage.video_ratio > 0)]
    smallest = min(
        rule.largest_item(frames) if rule.size_px is not None else rule.min_tokens
        for rule, frames, used in rules
        if used
    )
    return max(1, stage.token_budget // max(1, smallest))
