"""The model card: README.md with the metadata of the Hugging Face hub, in every folder that is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from univitar_ds import __version__
from univitar_ds.atomic_write import replace_text
from univitar_ds.config.run_folder import CARD, EVALUATION, EXPORT, MODEL
from univitar_ds.config.schema import RunConfig
from univitar_ds.evaluation.report import render_evaluation, table
from univitar_ds.formats.recognise import HUB_NAME
from univitar_ds.formats.stored_model import HEADS, VISION, StoredModel
from univitar_ds.geometry import PATCH, token_count
from univitar_ds.kernels.reference import PATCH_VALUES
from univitar_ds.model.config import PRESETS
from univitar_ds.regular_files import read_utf8

UNKNOWN_LICENCE = "unknown"
"""The hub's identifier for a model without a stated licence."""
_PAPER = "arxiv.org/abs/2504.01792"
_LOAD = {
    "hf": """from transformers import {auto}, AutoImageProcessor
model = {auto}.from_pretrained(FOLDER, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)""",
    "release": """from univitar_ds import Preprocessor, UniViTAR
model = UniViTAR.from_pretrained(FOLDER)
prepare = Preprocessor.from_pretrained(FOLDER)""",
    "program": """import torch
from univitar_ds import Preprocessor
from univitar_ds.convert.program import program_inputs
prepare = Preprocessor.from_pretrained(FOLDER)
program = torch.export.load(f"{{FOLDER}}/model.pt2").module()
pixel_values, grid_thw = prepare(items)  # images, and videos as lists of frames
{outputs} = program(pixel_values, *program_inputs(grid_thw, prepare.config.spatial_merge_size))""",
    "onnx": """import onnxruntime
from univitar_ds import Preprocessor
prepare = Preprocessor.from_pretrained(FOLDER)
session = onnxruntime.InferenceSession(f"{{FOLDER}}/model.onnx")
pixel_values, grid_thw = prepare(items)  # images, and videos as lists of frames
assert grid_thw.tolist() == {grids}
{outputs} = session.run(None, {{"pixel_values": pixel_values.numpy()}})""",
}
"""Python that loads each format. `FOLDER` is the folder with the card."""
_LOAD_ANY = """from univitar_ds import UniViTARModel
model = UniViTARModel.from_pretrained(FOLDER)"""
_PIPELINE = """
from transformers import pipeline
classify = pipeline("zero-shot-image-classification", model=FOLDER, trust_remote_code=True)"""


Grids = Sequence[tuple[int, int, int]]
"""Tokens along time, height and width of each item of an ONNX file."""


def write_card(model: StoredModel, folder: Path, to: str, licence: str = UNKNOWN_LICENCE, grids: Grids = ()) -> None:
    """Writes the card of a model in the format `to`. Raises: StorageError."""
    replace_text(folder / CARD, card(model, to, licence, grids))


def card(model: StoredModel, to: str, licence: str = UNKNOWN_LICENCE, grids: Grids = ()) -> str:
    """Returns the card: sizes, training, data, results with chance levels, versions, and how to load the model.

    What the source does not record is left out. Data sets are listed by name, without their folders.
    """
    recipe = model.origin.get("recipe")
    parts = [
        _metadata(model, to, licence),
        f"# {model.origin.get('run', model.path.name)}",
        _about(model),
        "## Load",
        f"```python\n{_load(model, to, grids)}\n```",
        *_signature(model, to, grids),
        "## Sizes",
        table(("", "value"), _sizes(model), left=2),
    ]
    if isinstance(recipe, RunConfig):
        parts += ["## Training", _training(model, recipe)]
        results = _results(model)
        parts += ["## Results", results] if results else []
    parts += ["## Versions", _versions(model)]
    return "\n\n".join(parts) + "\n"


def size_name(model: StoredModel) -> str:
    """Returns the name of the encoder's size, such as "0.3b (the released size)", or its number of parameters."""
    for name, preset in PRESETS.items():
        wanted, found = preset.architecture(), model.encoder.architecture()
        if all(wanted[key] == found[key] for key in wanted if key != "spatial_merge_size"):
            return {"tiny": "tiny", "0.3b": "0.3b (the released size)"}.get(name, f"{name} (a published size)")
    return f"{model.encoder.parameter_count() / 1e6:.0f}M parameters"


def _metadata(model: StoredModel, to: str, licence: str) -> str:
    whole = model.joint is not None
    lines = {
        "license": licence,
        "library_name": "transformers" if to == "hf" else "univitar_ds",
        "pipeline_tag": "zero-shot-image-classification" if whole else "image-feature-extraction",
        "tags": "[univitar, vision, native-resolution]",
    }
    return "\n".join(["---", *(f"{name}: {value}" for name, value in lines.items()), "---"])


def _about(model: StoredModel) -> str:
    what = "The image and text towers of a UniViTAR model" if model.joint else "A UniViTAR encoder"
    return (
        f"{what}: a vision transformer for images and videos at native resolution ([UniViTAR](https://{_PAPER})). "
        f"The encoder's size is {size_name(model)}."
    )


def _load(model: StoredModel, to: str, grids: Grids) -> str:
    outputs = "tokens, embeddings" if model.joint else "(tokens,)" if to == "onnx" else "tokens"
    text = _LOAD.get(to, _LOAD_ANY).format(auto="AutoModel", outputs=outputs, grids=[list(grid) for grid in grids])
    if to == "hf" and model.joint is not None:
        text = text.replace("AutoImageProcessor", "AutoProcessor") + "\n" + _PIPELINE
    return text


def _signature(model: StoredModel, to: str, grids: Grids) -> list[str]:
    """Returns the section with the inputs and outputs of a program; nothing for other formats."""
    if to not in ("program", "onnx"):
        return []
    fixed = to == "onnx"
    count, items = (sum(map(token_count, grids)), len(grids)) if fixed else ("T", "N")
    types = {str(info.dtype).removeprefix("torch.") for name, info in model.tensors.infos.items() if VISION in name}
    rows = [("input", "pixel_values", f"({count}, {PATCH_VALUES}) float32", "normalised patches")]
    if not fixed:
        rows += [
            ("input", "positions", f"({count}, 2) int64", "row and column of each token"),
            ("input", "cu_seqlens", f"({items} + 1,) int64", "boundaries of the items along the tokens"),
        ]
    width = model.encoder.hidden_size
    rows.append(("output", "tokens", f"({count}, {width}) {' or '.join(sorted(types))}", "tokens of all items"))
    if model.joint is not None:
        rows.append(("output", "embeddings", f"({items}, {model.joint.embed_dim}) float32", "a unit vector per item"))
    about = "For packs of any number of tokens T and items N. Attention has a mask of T * T values."
    if fixed:
        sides = ", ".join(f"{t} x {h} x {w} (images of {w * PATCH} x {h * PATCH} px)" for t, h, w in grids)
        about = f"Only for packs with these grids, in tokens along time, height and width: {sides}."
    return ["## Inputs and outputs", about, table(("", "name", "shape and type", "meaning"), rows, left=4)]


def _token_limits(model: StoredModel) -> list[tuple[str, str]]:
    """Returns the rows with the tokens of an item: of images and videos if the run's last stage has a rule for both."""
    config, recipe = model.encoder, model.origin.get("recipe")
    if isinstance(recipe, RunConfig) and 0 < recipe.stages[-1].video_ratio < 1:
        stage = recipe.stages[-1]
        return [("image", _rule(stage.image)), ("video", _rule(stage.video))]
    return [("tokens of an item", f"{config.min_tokens} to {config.max_tokens}")]


def _sizes(model: StoredModel) -> list[tuple[str, str]]:
    config = model.encoder
    vision = sum(
        info.nbytes // info.dtype.itemsize for name, info in model.tensors.infos.items() if name.startswith(VISION)
    )
    rows = [
        ("encoder parameters", f"{vision:,}"),
        ("width, layers, heads", f"{config.hidden_size}, {config.num_hidden_layers}, {config.num_attention_heads}"),
        *_token_limits(model),
        ("resolution", config.resolution_mode),
    ]
    if model.joint is not None:
        total = sum(
            info.nbytes // info.dtype.itemsize
            for name, info in model.tensors.infos.items()
            if not name.startswith(HEADS)
        )
        rows += [
            ("parameters, all", f"{total:,}"),
            ("embedding", f"{model.joint.embed_dim}"),
            ("text length in tokens", f"{model.joint.context_length}"),
        ]
    types = sorted({str(info.dtype).removeprefix("torch.") for info in model.tensors.infos.values()})
    return [*rows, ("stored as", ", ".join(types))]


def _training(model: StoredModel, recipe: RunConfig) -> str:
    progress: dict[str, Any] = model.origin.get("progress", {})
    teacher = recipe.objective.teacher
    seen = (
        f"{progress['samples']:,} samples, {progress['tokens']:,} tokens" if "samples" in progress else "not recorded"
    )
    lines = [
        f"- weights: {'averaged over updates' if model.origin.get('averaged') else 'as trained'}, "
        f"checkpoint {model.origin.get('checkpoint')}",
        f"- seen: {seen}",
        f"- objective: {recipe.objective.kind}{'' if recipe.objective.classifies else ' contrastive loss'}"
        + (f", features of {Path(teacher.path).name} distilled" if teacher else ""),
        f"- data: {', '.join(source.label for source in recipe.data.sources)}",
    ]
    if recipe.model.init_from is not None:
        part = "whole model" if recipe.model.init_part == "model" else "encoder"
        what = f"{part} of {_model_name(recipe.model.init_from)}"
        lines.insert(1, f"- started from: the {what}, whose samples are not counted")
    rows = [
        (
            stage.name,
            f"{stage.samples:,}",
            _rule(stage.image),
            _rule(stage.video) if stage.video_ratio else "",
            f"{stage.video_ratio:.0%}",
            f"{stage.lr:g}",
        )
        for stage in recipe.stages
    ]
    heads = ("stage", "samples", "images", "videos", "share of video", "learning rate")
    return "\n".join([*lines, "", table(heads, rows, left=1)])


def _model_name(source: str) -> str:
    """Returns the name of a model on the hub, or the last part of another place that names the model."""
    if HUB_NAME.fullmatch(source):
        return source
    parts = [part for part in source.split("/") if part not in ("", EXPORT, MODEL)]
    return parts[-1] if parts else source


def _rule(rule: Any) -> str:
    return f"{rule.size_px} px" if rule.size_px is not None else f"{rule.min_tokens} to {rule.max_tokens} tokens"


def _results(model: StoredModel) -> str:
    """Returns the run's evaluation; empty if it is of another checkpoint or other weights."""
    path = model.path.parent.parent / EVALUATION
    try:
        evaluation = json.loads(read_utf8(path))
        averaged = evaluation.get("weights") == "averaged"
        if evaluation["checkpoint"] != model.path.name or averaged != bool(model.origin.get("averaged")):
            return ""
        return render_evaluation(evaluation)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def _versions(model: StoredModel) -> str:
    found = {"univitar_ds": __version__, "torch": torch.__version__, "transformers": metadata.version("transformers")}
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"Written with {text} from a source in the format {model.format}."
