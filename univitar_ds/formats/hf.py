"""Folders for Hugging Face's transformers: weights, configuration, and code that transformers runs from the folder.

`AutoModel`, `AutoImageProcessor`, `AutoProcessor`, `AutoTokenizer` and the zero-shot pipeline load such a folder with
`trust_remote_code=True` and without this package; the code needs transformers 5, torch, safetensors and Pillow. An
encoder alone has the release's tensor names and config.json fields, so that the release's reader reads it too. With two
towers the tensors have these names:

    vision_model....                  encoder                     stored as vision....
    visual_projection.weight          its projection              stored as vision_proj.weight
    text_model....                    text tower                  stored as text.model....
    text_projection.weight            its projection              stored as text_proj.weight
    pool...., logit_scale, logit_bias                             unchanged

Distillation heads and an optimizer's state are not written. `tokenizer.json` also adds the begin and end tokens, which
the project does itself; `tokenizer.source.json` is the tokenizer as it was.

Pipelines of transformers have limits that the code cannot lift. They make transparent images black before they
pass them to the image processor, which would make them white. The zero-shot pipeline of a sigmoid run cuts labels at 64
tokens, even if the context is longer. Pipelines of the encoder alone need batch_size=1, because its output is one row
of tokens.

Reading executes no code of the folder.
"""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from univitar_ds.atomic_write import replace_bytes
from univitar_ds.config.encoder import CONFIG_FILE, EncoderConfig, read_object
from univitar_ds.errors import CheckpointError, ConfigError, writing
from univitar_ds.formats.stored_model import HEADS, VISION, JointConfig, StoredModel, Tensors
from univitar_ds.formats.weight_files import open_weights, some, write_weights
from univitar_ds.regular_files import is_regular, read_utf8
from univitar_ds.tokenization import special_ids, tokenizer_of

NAME = "hf"
FORMAT_VERSION = 1
"""Version of the folder's layout, in config.json."""
CODE = Path(__file__).with_name("remote_code")
"""Folder of the files with code. They are copied, and import nothing of this package."""
CONFIGURATION = "configuration_univitar"
MODELING = "modeling_univitar"
IMAGE_PROCESSING = "image_processing_univitar"
PROCESSING = "processing_univitar"
TOKENIZER = "tokenizer.json"
SOURCE_TOKENIZER = "tokenizer.source.json"
OWN = "the model's tokenizer"
"""How messages call a tokenizer that was not read from a file."""

ENCODER_TYPE = "univitar_vision"
JOINT_TYPES = {"softmax": "univitar", "sigmoid": "univitar_siglip"}
"""`model_type` by objective. The zero-shot pipeline computes sigmoid probabilities if "siglip" is part of it."""
TEXT_TYPES = ("clip_text_model", "siglip_text_model", "siglip2_text_model")
_CLASSES = {"softmax": "UniViTAR", "sigmoid": "UniViTARSigmoid"}
_PREFIXES = {
    "vision.": "vision_model.",
    "vision_proj.": "visual_projection.",
    "text.model.": "text_model.",
    "text_proj.": "text_projection.",
    "pool.": "pool.",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
"""Beginnings of the names of stored tensors, and of those in a folder with two towers."""
_JOINT_TENSORS = (
    "pool.norm.weight", "pool.query", "pool.kv.weight", "pool.kv.bias", "vision_proj.weight", "text_proj.weight",
    "logit_scale", "logit_bias",
)  # fmt: skip
_COUNTS = ("projection_dim", "pool_heads", "context_length")


def recognises(folder: Path) -> bool:
    """Returns whether `folder` is of this format, by its config.json. Never raises."""
    try:
        values = read_object(Path(folder) / CONFIG_FILE)
    except CheckpointError:
        return False
    return values.get("model_type") in (ENCODER_TYPE, *JOINT_TYPES.values())


def read(folder: Path) -> StoredModel:
    """Reads a folder without executing its code.

    Raises: CheckpointError if a file or field is missing, damaged or of another kind of model.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    values = read_object(path)
    kind, version = values.get("model_type"), values.get("format_version", FORMAT_VERSION)
    if kind not in (ENCODER_TYPE, *JOINT_TYPES.values()):
        raise CheckpointError(
            f"{path} has model_type {kind!r}; supported are {', '.join((ENCODER_TYPE, *JOINT_TYPES.values()))}"
        )
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format_version {version!r}, known is {FORMAT_VERSION}; update univitar_ds")
    origin = {"format_version": version, "transformers_version": values.get("transformers_version")}
    stored = open_weights(folder)
    if kind == ENCODER_TYPE:
        encoder, tensors, joint = EncoderConfig.from_dict(values), stored.renamed(lambda name: VISION + name), None
    else:
        joint = _read_joint(folder, values)
        encoder, tensors = EncoderConfig.from_dict(values["vision_config"]), _canonical(folder, stored)
    return StoredModel(folder, NAME, encoder, tensors, joint, origin=origin)


def write(model: StoredModel, folder: Path, shard_bytes: int | None = None) -> None:
    """Writes a model into a new or empty folder.

    Args: shard_bytes: maximum size of a file of weights; None: one file.
    Raises: CheckpointError if the text tower, the tokenizer or a tensor has no place in the format; StorageError if the
        folder cannot be written.
    """
    folder = Path(folder)
    if model.joint is None:
        kept = {name: name.removeprefix(VISION) for name in model.tensors if name.startswith(VISION)}
    else:
        kept = {name: new for name in model.tensors if (new := _exported(name)) is not None}
    texts = _texts(model)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        # Not as text: a tokenizer's line ends are part of it.
        replace_bytes(folder / name, text.encode("utf-8"))
    write_weights(model.tensors.renamed(kept.get), folder, shard_bytes=shard_bytes)


def _exported(name: str) -> str | None:
    """Returns a tensor's name in a folder with two towers; None for distillation heads."""
    if name.startswith(HEADS):
        return None
    for stored, exported in _PREFIXES.items():
        if name.startswith(stored):
            return exported + name.removeprefix(stored)
    raise CheckpointError(f"the tensor {name} has no place in a folder for transformers; it is of another model")


def _canonical(folder: Path, stored: Tensors) -> Tensors:
    """Returns the tensors of a folder with two towers under their stored names."""
    new = {
        name: prefix + name.removeprefix(exported)
        for name in stored
        for prefix, exported in _PREFIXES.items()
        if name.startswith(exported)
    }
    found, absent = set(new.values()), []
    if unknown := [name for name in stored if name not in new]:
        raise CheckpointError(f"{folder} holds weights that UniViTAR lacks: {some(unknown)}; fetch it again")
    for wanted in (*_JOINT_TENSORS, "vision.", "text.model."):
        if not any(name.startswith(wanted) if wanted.endswith(".") else name == wanted for name in found):
            absent.append(_exported(wanted) + "*" * wanted.endswith("."))
    if absent:
        raise CheckpointError(f"{folder} lacks weights: {some(absent)}; fetch it again")
    return stored.renamed(new.get)


def _read_joint(folder: Path, values: dict[str, Any]) -> JointConfig:
    path = folder / CONFIG_FILE
    wanted = ("vision_config", "text_config", "objective", *_COUNTS)
    if missing := [name for name in wanted if name not in values]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; fetch it again, or write the folder again")
    for name in ("vision_config", "text_config"):
        if not isinstance(values[name], dict):
            raise CheckpointError(f"{path} has {name} {values[name]!r}; it must be an object")
    for name in _COUNTS:
        if not isinstance(values[name], int) or isinstance(values[name], bool) or values[name] < 1:
            raise CheckpointError(f"{path} has {name} {values[name]!r}; it must be a whole number above 0")
    if JOINT_TYPES.get(str(values["objective"])) != values["model_type"]:
        raise CheckpointError(
            f"{path} has the objective {values['objective']!r} and model_type {values['model_type']!r}; supported are "
            + " and ".join(f"{objective!r} with {kind!r}" for objective, kind in JOINT_TYPES.items())
        )
    _check_text(values["text_config"], f"text_config of {path}")
    return JointConfig(
        values["projection_dim"], values["pool_heads"], values["objective"], values["text_config"],
        values["context_length"], _read_tokenizer(folder),
    )  # fmt: skip


def _check_text(text: dict[str, Any], name: str) -> None:
    if text.get("model_type") not in TEXT_TYPES:
        raise CheckpointError(
            f"{name} has model_type {text.get('model_type')!r}; supported are {' and '.join(TEXT_TYPES)}"
        )


def _read_tokenizer(folder: Path) -> str:
    """Returns the tokenizer as it was when the folder was written, or `tokenizer.json` if that has changed since."""
    if not is_regular(folder / TOKENIZER):
        raise CheckpointError(f"{folder} has no {TOKENIZER}, so its texts cannot be encoded; fetch it again")
    present = _read_text(folder / TOKENIZER)
    _parsed(present, str(folder / TOKENIZER))
    if not is_regular(folder / SOURCE_TOKENIZER):
        return present
    source = _read_text(folder / SOURCE_TOKENIZER)
    return source if _with_template(source, str(folder / SOURCE_TOKENIZER))[0] == present else present


def _read_text(path: Path) -> str:
    try:
        return read_utf8(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from error


def _texts(model: StoredModel) -> dict[str, str]:
    """Returns all text files of the folder by name."""
    names = [CONFIGURATION, MODELING, IMAGE_PROCESSING] + ([] if model.joint is None else [PROCESSING])
    texts = {f"{name}.py": (CODE / f"{name}.py").read_text(encoding="utf-8") for name in names}
    # transformers caches the model's class by the configuration's class, and that class by the content of its file.
    # Without this line, a process that loads two folders with different models would run the first one's code for both.
    digest = hashlib.sha256("".join(texts.values()).encode("utf-8")).hexdigest()
    texts[f"{CONFIGURATION}.py"] += f"\n# Format {FORMAT_VERSION}, code {digest}\n"
    auto_map = {"AutoImageProcessor": f"{IMAGE_PROCESSING}.UniViTARImageProcessor"}
    common = _common(model)
    common["auto_map"] |= auto_map
    if model.joint is None:
        config = {**model.encoder.to_dict(), **common}
    else:
        # In a separate file: an image processor that is saved elsewhere keeps its auto_map, but not the processor's
        # code.
        processor_map = {"AutoProcessor": f"{PROCESSING}.UniViTARProcessor"}
        processor = {"processor_class": "UniViTARProcessor", "auto_map": processor_map}
        texts["processor_config.json"] = _json(processor)
        common["auto_map"] |= processor_map
        source = model.joint.tokenizer
        texts[TOKENIZER], ends = _with_template(source)
        texts[SOURCE_TOKENIZER] = source
        texts["tokenizer_config.json"] = _json(_tokenizer_config(model.joint, ends))
        config = _joint_config(model, model.joint) | common
    texts[CONFIG_FILE] = _json(config)
    texts["preprocessor_config.json"] = _json(
        {"image_processor_type": "UniViTARImageProcessor", "auto_map": auto_map, **_processing(model)}
    )
    return texts


def _common(model: StoredModel) -> dict[str, Any]:
    """Returns the fields of config.json that both kinds of folder have."""
    if model.joint is None:
        kind, config, architecture = ENCODER_TYPE, "UniViTARVisionConfig", "UniViTARVisionModel"
    else:
        kind, stem = JOINT_TYPES[model.joint.objective], _CLASSES[model.joint.objective]
        config, architecture = f"{stem}Config", f"{stem}Model"
    auto_map = {"AutoConfig": f"{CONFIGURATION}.{config}", "AutoModel": f"{MODELING}.{architecture}"}
    if model.joint is not None:
        auto_map["AutoModelForZeroShotImageClassification"] = f"{MODELING}.{architecture}"
    dtype = next((info.dtype for name, info in model.tensors.infos.items() if name.startswith(VISION)), None)
    if dtype is None:
        raise CheckpointError(f"{model.path} holds no weights of an encoder; name another model")
    common = {
        "model_type": kind,
        "architectures": [architecture],
        "auto_map": auto_map,
        "dtype": str(dtype).removeprefix("torch."),
        "format_version": FORMAT_VERSION,
    }
    try:
        # The names of the text tower's tensors are those of the installed version.
        return common | {"transformers_version": metadata.version("transformers")}
    except metadata.PackageNotFoundError:
        return common


def _joint_config(model: StoredModel, joint: JointConfig) -> dict[str, Any]:
    _check_text(joint.text, "the text tower")
    return {
        "vision_config": {**model.encoder.to_dict(), "model_type": ENCODER_TYPE},
        "text_config": joint.text,
        "projection_dim": joint.embed_dim,
        "pool_heads": joint.pool_heads,
        "objective": joint.objective,
        "context_length": joint.context_length,
        "text_eos_token_id": special_ids(_parsed(joint.tokenizer)).eos_id,
    }


def _processing(model: StoredModel) -> dict[str, Any]:
    """Returns the fields of the configuration that determine the preprocessing."""
    names = (
        "patch_size", "temporal_patch_size", "spatial_merge_size", "resize_factor", "min_tokens", "max_tokens",
        "relarge_ratio", "resolution_mode", "image_mean", "image_std",
    )  # fmt: skip
    values = model.encoder.to_dict()
    return {name: values[name] for name in names}


def _tokenizer_config(joint: JointConfig, ends: dict[str, str]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **ends,
        "model_max_length": joint.context_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "truncation_side": "right",
        "split_special_tokens": True,  # a caption that spells a special token is text
        "clean_up_tokenization_spaces": False,
    }


def _with_template(text: str, name: str = OWN) -> tuple[str, dict[str, str]]:
    """Returns a tokenizer.json that adds begin and end token, and the special tokens by their names in transformers.

    Truncation and padding are left to the caller of the tokenizer.
    """
    tokenizer = _parsed(text, name)
    ids = special_ids(tokenizer)
    end, begin = tokenizer.id_to_token(ids.eos_id), None if ids.bos_id is None else tokenizer.id_to_token(ids.bos_id)
    tokens = {token: tokenizer.token_to_id(token) for token in (begin, end) if token is not None}
    single = [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
    single.insert(len(single) - 1, {"Sequence": {"id": "A", "type_id": 0}})
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in tokens.items()},
    }
    values = json.loads(text) | {"truncation": None, "padding": None, "post_processor": template}
    names = {"bos_token": begin, "eos_token": end, "pad_token": tokenizer.id_to_token(ids.pad_id)}
    return _json(values), {name: token for name, token in names.items() if token is not None}


def _parsed(text: str, name: str = OWN) -> Tokenizer:
    """Returns a tokenizer. Raises: CheckpointError if it cannot be used, here or in transformers."""
    try:
        return tokenizer_of(text, name)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
