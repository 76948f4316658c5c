"""Writes models of any size to convert, one tensor at a time and without an engine; or by DeepSpeed's own engine.

    python -m benchmarks.convert.sources release 1b FOLDER     an encoder in the layout of the release, fp32
    python -m benchmarks.convert.sources run 1b FOLDER         a run: both towers with moments, of 4 ranks
    torchrun --nproc-per-node 2 -m benchmarks.convert.sources deepspeed 0.3b FOLDER     after one step of ZeRO stage 3

The text tower has the size of CLIP's for a ViT-L (width 768, 12 layers, 49,408 tokens).
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.finished import CAPTIONS, run_config
from tests.support.standin import LANES
from tests.support.training import ds_config, steps
from univitar_ds.config.load import config_fingerprint, dump_config
from univitar_ds.config.schema import OptimizerConfig, RunConfig
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.elastic import BUFFERS, FORMAT, INDEX, MASTER, STATE
from univitar_ds.formats.sidecar import write_sidecar
from univitar_ds.formats.stored_model import MOMENTS, VISION, JointConfig, StoredModel, Tensors
from univitar_ds.model.build import build_contrastive
from univitar_ds.model.config import PRESETS
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.tokenization import train_tokenizer
from univitar_ds.training.checkpoint import atomic_dir

RANKS = 4
VOCABULARY = 49_408
CONTEXT = 77
STEP = 1000
_NOISE = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02)
"""Values of the weights: drawing all of them would take longer than writing them."""

Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("release", "run", "deepspeed"))
    parser.add_argument("size", choices=tuple(PRESETS))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write = {"release": write_release, "run": write_run, "deepspeed": write_deepspeed}[arguments.kind]
    write(arguments.size, arguments.folder)


def write_release(size: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    shapes = {
        name.removeprefix(VISION): tuple(value.shape)
        for name, value in _model(_config(size)).state_dict().items()
        if name.startswith(VISION)
    }
    write_tensors(folder / "model.safetensors", shapes)
    (folder / "config.json").write_text(json.dumps(PRESETS[size].to_dict()), encoding="utf-8")


def write_run(size: str, folder: Path) -> None:
    """Writes the folder of a run whose last checkpoint has the files of `RANKS` ranks, as ZeRO-3 shards them."""
    config, model = _write_run_files(size, folder)
    checkpoint = folder / "checkpoints" / f"step-{STEP:08d}"
    checkpoint.mkdir(parents=True)
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    kinds = (MASTER, *MOMENTS)
    pieces = {
        name: {"shape": list(shape), "kinds": dict.fromkeys(kinds, "float32"), "parts": _parts(shape)}
        for name, shape in parameters.items()
    }
    for rank in range(RANKS):
        flat = {
            f"{name}/{kind}": (length,)
            for name, piece in pieces.items()
            for owner, _, length in piece["parts"]
            for kind in kinds
            if owner == rank
        }
        write_tensors(checkpoint / f"rank{rank:05d}.safetensors", flat)
    atomic_dir.write_json(checkpoint / INDEX, {"pieces": pieces, "cursors": {}}, indent=None)
    buffers = {name: torch.arange(value.numel()).view(value.shape) for name, value in _buffers(model).items()}
    save_file(buffers, checkpoint / BUFFERS)
    groups = [{"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": decay} for decay in (0.1, 0.0)]
    state = {"fingerprint": config_fingerprint(config), "config": config.model_dump(mode="json")}
    content = {
        "format": FORMAT,
        "world_size": RANKS,
        "optimizer": {"updates": float(STEP), "groups": groups, "global_steps": STEP},
        "run": {**state, "model": model.description()},
    }
    atomic_dir.write_json(checkpoint / STATE, content)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": checkpoint_dir.sha256(path)}
        for path in sorted(checkpoint.iterdir())
    }
    atomic_dir.write_json(checkpoint / checkpoint_dir.MANIFEST, {"files": files})
    (folder / "checkpoints" / "latest").write_text(checkpoint.name, encoding="utf-8")


def write_deepspeed(size: str, folder: Path) -> None:
    """Writes a checkpoint of DeepSpeed after one step, on the ranks of a launcher; the run's files are beside it."""
    from univitar_ds.training.distributed.process_group import start_world
    from univitar_ds.training.engine.engine import build_engine

    world = start_world()
    config = _config(size)
    if world.is_main:
        write_configuration(size, folder / "config")
    engine = build_engine(_built(config), OptimizerConfig(), ds_config(LANES // world.size, stage=3), world)
    steps(engine, 0, 1)
    engine._engine.save_checkpoint(str(folder))


def write_configuration(size: str, folder: Path) -> None:
    """Writes the configuration of the model as `--config-from` takes it."""
    config, model = _write_run_files(size, folder)
    text, ours = model.description()["text"], config.model
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    joint = JointConfig(ours.embed_dim, ours.pool_heads, config.objective.kind, text, CONTEXT, tokenizer)
    write_sidecar(StoredModel(folder, "memory", model.vision.config, Tensors.of({}), joint), folder)


def write_tensors(path: Path, shapes: Shapes, dtype: torch.dtype = torch.float32) -> None:
    """Writes a safetensors file, one tensor at a time."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for shape in shapes.values():
            for block in _blocks(math.prod(shape)):
                file.write(memoryview(block.numpy()))


def _blocks(count: int) -> Iterator[Tensor]:
    while count:
        block = _NOISE[: min(count, len(_NOISE))]
        yield block
        count -= len(block)


def _config(size: str) -> RunConfig:
    text = {"hidden_size": 768, "layers": 12, "heads": 12, "intermediate_size": 3072, "context_length": CONTEXT}
    return run_config(model={"encoder": size, "embed_dim": 768, "pool_heads": 8, "text": text})


def _built(config: RunConfig) -> ContrastiveModel:
    return build_contrastive(config.model, vocab_size=VOCABULARY, eos_id=2, pad_id=0, seed=0)


def _model(config: RunConfig) -> ContrastiveModel:
    with torch.device("meta"):
        return _built(config)


def _write_run_files(size: str, folder: Path) -> tuple[RunConfig, ContrastiveModel]:
    folder.mkdir(parents=True)
    config = _config(size)
    dump_config(config, folder / "config.yaml")
    train_tokenizer(CAPTIONS, 300).save(str(folder / "tokenizer.json"))
    return config, _model(config)


def _parts(shape: tuple[int, ...]) -> list[list[int]]:
    """Returns [rank, start, length] of each part of a parameter."""
    total = math.prod(shape)
    share = math.ceil(total / RANKS)
    return [[rank, start, min(share, total - start)] for rank, start in enumerate(range(0, total, share))]


def _buffers(model: ContrastiveModel) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


if __name__ == "__main__":
    main()
