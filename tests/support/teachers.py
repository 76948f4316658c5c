"""Small teachers with drawn weights, saved as a user's folder would be, and packs for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.model import TeacherConfig
from univitar_ds.geometry import PATCH
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.model.teacher.teacher import Teacher, build_teacher

WIDTH = 32
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
CPU = torch.device("cpu")


def image_model(kind: str, **changes) -> nn.Module:
    """A transformers vision model by its `model_type`, whose position table has 4 x 4 places."""
    import transformers as t

    patch = changes.pop("patch_size", PATCH)
    sized = {**SHAPE, "patch_size": patch, "image_size": 4 * patch, **changes}
    siglip = {**sized, "intermediate_size": 48}
    made = {
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**sized)),
        "dinov2_with_registers": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**sized, num_register_tokens=3)
        ),
        "dinov3_vit": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**sized, intermediate_size=48, num_register_tokens=2)),
        "siglip_vision_model": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**siglip)),
        "siglip2_vision_model": lambda: t.Siglip2VisionModel(
            t.Siglip2VisionConfig(**{k: v for k, v in siglip.items() if k != "image_size"}, num_patches=16)
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = made[kind]().eval()
        for parameter in model.parameters():  # transformers starts with nearly nothing: positions would not count
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def own_encoder(**changes) -> UniViTAR:
    config = EncoderConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return UniViTAR(dataclasses.replace(config, **changes)).eval()


def teacher_of(model: nn.Module, folder: Path, *, merge: int = 1, **settings) -> Teacher:
    """`model` saved to `folder` and read as a teacher, in fp32 unless asked otherwise."""
    model.save_pretrained(folder)
    config = TeacherConfig(path=str(folder), **{"dtype": "fp32", **settings})
    return build_teacher(config, merge=merge, device=CPU)


def drawn_pack(grids: list[tuple[int, int, int]], *, videos: bool = False, seed: int = 0) -> tuple[Tensor, ...]:
    """(pixels, frames, grid_thw) of drawn items; of videos two frames a step, else one."""
    frames = [2 * t if videos else 1 for t, _, _ in grids]
    size = sum(n * h * w * PATCH * PATCH * 3 for n, (_, h, w) in zip(frames, grids, strict=True))
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    return pixels, torch.tensor(frames, dtype=torch.int64), torch.tensor(grids, dtype=torch.int64).view(-1, 3)


def frames_of(pixels: Tensor, frames: Tensor, grid_thw: Tensor) -> list[Tensor]:
    """The items of a pack, each (frames, rows, columns, 3) uint8."""
    shapes = [(n, h * PATCH, w * PATCH, 3) for n, (_, h, w) in zip(frames.tolist(), grid_thw.tolist(), strict=True)]
    parts = pixels.split([n * rows * columns * 3 for n, rows, columns, _ in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
