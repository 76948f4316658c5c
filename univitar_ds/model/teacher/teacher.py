"""The frozen teacher: a vision model of transformers, or an encoder of this project, whose features the student
matches.

transformers is imported only when a teacher is read. A teacher is not part of the engine: it has no gradient and no
optimizer state, and is not stored in checkpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from univitar_ds.config.encoder import CONFIG_FILE, EncoderConfig
from univitar_ds.config.model import TeacherConfig
from univitar_ds.errors import CheckpointError, ConfigError, first_line
from univitar_ds.geometry import PATCH, token_count
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.model.libraries import working_imports
from univitar_ds.model.teacher import packing
from univitar_ds.model.teacher.cache import FeatureCache
from univitar_ds.model.teacher.packing import Packing
from univitar_ds.model.teacher.towers import (
    FrameTower,
    ImageModel,
    PackTower,
    Tower,
    from_raster,
    run_siglip,
    run_siglip2,
    run_with_prefix,
)
from univitar_ds.model.towers import quiet
from univitar_ds.model.transfer import to_device
from univitar_ds.regular_files import read_utf8

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OWN = "univitar"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Family:
    """Models with the same interface: class name in transformers, forward function, its parts, default mean and std."""

    loader: str
    run: ImageModel
    packing: Packing
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]


_SIGLIP = Family("SiglipVisionModel", run_siglip, packing.SIGLIP, HALF)
_SIGLIP2 = Family("Siglip2VisionModel", run_siglip2, packing.SIGLIP2, HALF)
FAMILIES = {
    "dinov2": Family("Dinov2Model", run_with_prefix, packing.DINOV2, IMAGENET),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", run_with_prefix, packing.DINOV2, IMAGENET),
    "dinov3_vit": Family("DINOv3ViTModel", run_with_prefix, packing.DINOV3, IMAGENET),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
}
"""Families by `model_type` of transformers. SigLIP 2 models with a fixed size have the type siglip."""


@dataclass(frozen=True)
class TeacherShape:
    """The content of a teacher's configuration that is needed to build the student or to reject the teacher early."""

    kind: str  # a key of FAMILIES, or OWN
    width: int  # Dt
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class TeacherFeatures(NamedTuple):
    """Features of a pack in the teacher's precision and on its device, with tokens in the student's order.

    Features of items that the teacher does not support are 0 and marked as not valid.
    """

    patches: Tensor  # (T, Dt)
    pooled: Tensor  # (N, Dt)
    valid: Tensor  # (T,) bool
    supported: Tensor  # (N,) bool


class Teacher:
    """A frozen model that computes features of packs. `build_teacher` builds it."""

    def __init__(self, tower: Tower, width: int, *, merge: int, cache: FeatureCache | None = None) -> None:
        """Args: merge: spatial_merge_size of the student, which determines the order of tokens."""
        self.tower, self.width, self.merge, self.cache = tower, width, merge, cache
        parameter = next(tower.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def supports(self, grid_thw: Tensor) -> list[bool]:
        """Returns whether the model supports each item of a pack with grids (N, 3)."""
        return [self.tower.supports(grid) for grid in grid_thw.tolist()]

    def num_forwards(self, grid_thw: Tensor) -> int:
        """Returns the number of forward passes for a pack with these grids; with a cache, the maximum."""
        return self.tower.num_forwards([grid for grid in grid_thw.tolist() if self.tower.supports(grid)])

    @torch.no_grad()
    def __call__(
        self,
        pixels: Tensor,
        frames: Tensor,
        grid_thw: Tensor,
        *,
        min_forwards: int = 0,
        device_pixels: Tensor | None = None,
    ) -> TeacherFeatures:
        """Returns the features of one pack; N may be 0.

        Args:
            pixels: (B,) uint8, see `kernels.reference.patchify`, on any device.
            frames: (N,) number of frames per item; grid_thw: (N, 3) tokens along time, height, width; on the host.
            min_forwards: minimum number of forward passes. A partitioned teacher must run equally often on all ranks.
            device_pixels: copy of `pixels` on the teacher's device, if it exists already.
        """
        grids, supported = grid_thw.tolist(), self.supports(grid_thw)
        chosen = [index for index, good in enumerate(supported) if good]
        features = self._features(pixels, device_pixels, frames.tolist(), grids, chosen)
        for _ in range(self.num_forwards(grid_thw), min_forwards):
            self.tower.idle()
        return self._joined(grids, supported, dict(zip(chosen, features, strict=True)))

    def _features(
        self,
        pixels: Tensor,
        device_pixels: Tensor | None,
        frames: Sequence[int],
        grids: Sequence[Sequence[int]],
        chosen: Sequence[int],
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns the features of the items `chosen` of a pack in raster order, from the cache if it has them."""
        chosen_grids = [grids[i] for i in chosen]
        if self.cache is None:
            source = (pixels if device_pixels is None else device_pixels).to(self.device, non_blocking=True)
            return self.tower(_videos(source, frames, grids, chosen), chosen_grids)
        hosted = _videos(pixels.cpu(), frames, grids, chosen)
        videos = hosted if device_pixels is None else _videos(device_pixels, frames, grids, chosen)
        cached = [self.cache.read(video, grid) for video, grid in zip(hosted, chosen_grids, strict=True)]
        missing = [index for index, features in enumerate(cached) if features is None]
        computed = self.tower([videos[i].to(self.device) for i in missing], [chosen_grids[i] for i in missing])
        for index, features in zip(missing, computed, strict=True):
            self.cache.write(hosted[index], chosen_grids[index], *features)
            cached[index] = features
        return cached

    def _joined(
        self, grids: Sequence[Sequence[int]], supported: Sequence[bool], features_of: dict[int, tuple[Tensor, Tensor]]
    ) -> TeacherFeatures:
        counts = [token_count(grid) for grid in grids]
        options = {"dtype": self.dtype, "device": self.device}
        patches, pooled = [torch.empty(0, self.width, **options)], [torch.empty(0, self.width, **options)]
        for index, (grid, count) in enumerate(zip(grids, counts, strict=True)):
            if index in features_of:
                of_patches, of_item = (features.to(**options) for features in features_of[index])
                patches.append(from_raster(of_patches, grid, self.merge))
                pooled.append(of_item[None])
            else:
                patches.append(torch.zeros(count, self.width, **options))
                pooled.append(torch.zeros(1, self.width, **options))
        items = torch.tensor(supported, dtype=torch.bool)
        valid = items.repeat_interleave(torch.tensor(counts, dtype=torch.int64))
        return TeacherFeatures(
            torch.cat(patches), torch.cat(pooled), to_device(valid, self.device), to_device(items, self.device)
        )


def _videos(
    pixels: Tensor, frames: Sequence[int], grids: Sequence[Sequence[int]], wanted: Sequence[int]
) -> list[Tensor]:
    """Returns views of the items `wanted` of a pack, each (frames, h * 14, w * 14, 3)."""
    shapes = [(n, h * PATCH, w * PATCH, 3) for n, (_, h, w) in zip(frames, grids, strict=True)]
    flat = pixels.split([math.prod(shape) for shape in shapes])
    return [flat[index].view(shapes[index]) for index in wanted]


def read_teacher(config: TeacherConfig) -> TeacherShape:
    """Returns the teacher's configuration, without reading weights.

    Raises: CheckpointError if the configuration cannot be read; ConfigError if the model is not supported;
        InstallationError if transformers cannot be imported.
    """
    own = _own_config(config.path)
    if own is not None:
        return TeacherShape(OWN, own.hidden_size, PATCH, own.image_mean, own.image_std)
    with working_imports("transformers"):
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig
        from transformers.models.auto.image_processing_auto import get_image_processor_config

    local = Path(config.path).is_dir()
    try:
        whole = AutoConfig.from_pretrained(config.path, local_files_only=local)
        images = get_image_processor_config(config.path, local_files_only=local)
    except (OSError, ValueError, KeyError, RecursionError, StrictDataclassError) as error:
        raise CheckpointError(
            f"objective.teacher.path {config.path} is neither a folder with a model's config.json nor the name of a "
            f"model that can be fetched: {' '.join(str(error).split())}; fetch it again, or name another"
        ) from error
    kind = whole.model_type
    if kind not in FAMILIES:
        raise ConfigError(
            f"objective.teacher.path {config.path} holds a {kind} model; supported are: {', '.join(sorted(FAMILIES))} "
            "and the folder of an exported encoder"
        )
    _loader(kind)
    vision = getattr(whole, "vision_config", whole)
    return TeacherShape(kind, vision.hidden_size, _patch_of(vision, config.path), *_normalisation(images, kind))


def build_teacher(config: TeacherConfig, *, merge: int, device: torch.device) -> Teacher:
    """Builds the frozen teacher on `device`, partitioned over all ranks if `config.partitioned`.

    Every rank must build a partitioned teacher and run it equally often (`num_forwards`); each rank reads all weights
    once.
    Args: merge: spatial_merge_size of the student.
    Raises: CheckpointError if the weights cannot be used, and the errors of `read_teacher`.
    """
    shape = read_teacher(config)
    dtype = DTYPES[config.dtype]
    model = _own_encoder(config.path, dtype) if shape.kind == OWN else _image_model(config.path, shape, dtype)
    return teacher_of(model, shape, config, merge=merge, device=device)


def teacher_of(
    model: nn.Module, shape: TeacherShape, config: TeacherConfig, *, merge: int, device: torch.device
) -> Teacher:
    """Returns the frozen teacher of a model that is read already; see `build_teacher`."""
    model = model.eval().requires_grad_(False).to(device)
    cache = None
    if config.cache is not None:
        cache = FeatureCache(Path(config.cache), model, shape, config.dtype)
    partitioned = config.partitioned and dist.is_initialized() and dist.get_world_size() > 1
    if partitioned:
        partition(model)
    tower: Tower = PackTower(model) if shape.kind == OWN else _frame_tower(model, shape, whole=not partitioned)
    return Teacher(tower, shape.width, merge=merge, cache=cache)


def dinov2_without_values(width: int, layers: int, config: TeacherConfig) -> tuple[nn.Module, TeacherShape]:
    """Returns a DINOv2 of another size on the device "meta", and its description: for counting, not for computing.

    Raises: InstallationError if transformers cannot be imported.
    """
    with working_imports("transformers"):
        from transformers import Dinov2Config
    shape = Dinov2Config(hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64))
    with torch.device("meta"):
        model = _loader("dinov2")(shape).to(DTYPES[config.dtype])
    return model, TeacherShape("dinov2", width, shape.patch_size, *IMAGENET)


def partition(model: nn.Module) -> None:
    """Partitions the weights over the ranks. Each block is gathered before it runs and freed afterwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _frame_tower(model: nn.Module, shape: TeacherShape, *, whole: bool) -> FrameTower:
    """Args: whole: whether this rank has all weights. Otherwise only a call of the whole model gathers them."""
    family = FAMILIES[shape.kind]
    return FrameTower(model, family.run, shape.patch, shape.mean, shape.std, family.packing if whole else None)


def _own_config(path: str) -> EncoderConfig | None:
    """Returns the configuration of an encoder of this project; None if `path` is another model."""
    try:
        values = json.loads(read_utf8(Path(path) / CONFIG_FILE))
    except (OSError, ValueError, RecursionError):
        return None
    inner = values.get("vision_config", values) if isinstance(values, dict) else None
    if not isinstance(inner, dict) or inner.get("pe_type") != "rope2d":
        return None
    return EncoderConfig.from_dict(values)


def _own_encoder(path: str, dtype: torch.dtype) -> UniViTAR:
    return UniViTAR.from_pretrained(path).to(dtype)


def _loader(kind: str) -> Any:
    """Returns the class in transformers. Raises: InstallationError if this environment cannot import it."""
    with working_imports("transformers"):
        import transformers

        return getattr(transformers, FAMILIES[kind].loader)


def _image_model(path: str, shape: TeacherShape, dtype: torch.dtype) -> nn.Module:
    try:
        with quiet():
            model, info = _loader(shape.kind).from_pretrained(
                path,
                local_files_only=Path(path).is_dir(),
                attn_implementation="sdpa",
                dtype=dtype,  # not .to(), which would round the frequencies of rotary embeddings too
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the teacher {path} cannot be loaded: {first_line(error)}; fetch it again, or name another in "
            "objective.teacher.path"
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:8])
        raise CheckpointError(f"the teacher {path} lacks weights: {missing}; fetch it again")
    return model


def _patch_of(vision: Any, path: str) -> int:
    sides = getattr(vision, "patch_size", None)
    square = sides if isinstance(sides, list | tuple) else [sides]
    if len(set(square)) != 1 or not isinstance(square[0], int) or square[0] < 1:
        raise ConfigError(
            f"objective.teacher.path {path} has patch_size {sides}; a teacher needs square patches of a whole number "
            "of pixels, name another model"
        )
    if vision.num_channels != 3:
        raise ConfigError(
            f"objective.teacher.path {path} takes {vision.num_channels} channels; images have 3, name another model"
        )
    return square[0]


def _normalisation(detail: dict[str, Any], kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and std of the channels from the model's preprocessor file, or the defaults of the family."""
    if detail.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = FAMILIES[kind].normalisation
    defaults = {"image_mean": mean, "image_std": std}
    mean, std = (tuple(map(float, detail.get(name, value))) for name, value in defaults.items())
    return mean, std
