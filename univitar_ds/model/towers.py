"""Text towers from transformers. The library is imported only when a tower is built or the library is checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from univitar_ds.config.model import TextConfig
from univitar_ds.errors import CheckpointError, ConfigError, first_line
from univitar_ds.formats.stored_model import TensorInfo
from univitar_ds.formats.weight_files import weight_files
from univitar_ds.model.blocks.attention import CuSeqlens
from univitar_ds.model.libraries import working_imports
from univitar_ds.model.packed import can_pack, packed
from univitar_ds.model.transfer import to_device

FAMILIES = {
    "clip": "clip",
    "clip_text_model": "clip",
    "siglip": "siglip",
    "siglip_text_model": "siglip",
    "siglip2": "siglip2",
    "siglip2_text_model": "siglip2",
}
"""The family of text tower for each supported `model_type` of transformers."""
_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh")
"""Activation functions of the published text models."""


class CausalTextTower(nn.Module):
    """CLIP's text transformer with a causal mask, pooled at the last real token, which attends to all tokens.

    If one call can compute the attention of many texts, they run packed, without padding (`packed.can_pack`).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.width: int = model.config.hidden_size

    def forward(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns (N, Dt) features.

        Args: token_ids: (N, S); lengths: (N,) real tokens of each row, end of text included. Texts run packed only
            if `lengths` is on the host, which needs them as sizes.
        """
        rows = len(token_ids)
        token_ids, lengths = _never_empty(token_ids, lengths)
        if lengths.device.type == "cpu" and can_pack(self.model.config, token_ids.device, self.model.dtype):
            return self.packed(token_ids, lengths)[:rows]
        states = self.model(input_ids=token_ids).last_hidden_state
        lengths = to_device(lengths, states.device)
        return states[torch.arange(len(states), device=states.device), lengths - 1][:rows]

    def packed(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns the features of `forward` from the real tokens alone, for N > 0. Args: lengths: on the host."""
        device = token_ids.device
        items = CuSeqlens.of(lengths.tolist(), device)
        columns = torch.arange(token_ids.shape[1]).expand(token_ids.shape)
        real = columns < lengths[:, None]
        places = torch.stack([real.flatten().nonzero()[:, 0], columns[real]])
        places, positions = to_device(places, device)
        # Each token is a row of one token: the model refuses rows that are longer than its positions.
        ids = token_ids.flatten().index_select(0, places)[:, None]
        with packed(self.model, items, causal=True):
            states = self.model(input_ids=ids, position_ids=positions[:, None]).last_hidden_state[:, 0]
        return states.index_select(0, items.cu_seqlens[1:] - 1)


class PaddedTextTower(nn.Module):
    """The text transformer of SigLIP and SigLIP 2, pooled at the last position.

    It is trained without a mask on rows padded to full length. Tokens attend to the padding, so it cannot be left out.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.width: int = model.config.projection_size

    def forward(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns (N, Dt) features.

        Args: token_ids: (N, S); lengths: (N,) real tokens of each row.
        """
        rows = len(token_ids)
        token_ids, lengths = _never_empty(token_ids, lengths)
        config = self.model.config
        full = token_ids.new_full((len(token_ids), config.max_position_embeddings), config.pad_token_id)
        lengths = to_device(lengths, token_ids.device)
        real = torch.arange(token_ids.shape[1], device=token_ids.device) < lengths[:, None]
        full[:, : token_ids.shape[1]] = token_ids.where(real, config.pad_token_id)
        return self.model(input_ids=full).pooler_output[:rows]


def build_text_tower(config: TextConfig, *, vocab_size: int, eos_id: int, pad_id: int) -> nn.Module:
    """Builds a text tower: from `config.path`, or CLIP-style from scratch with torch's current random state.

    Returns: a module with `width` (Dt) and forward(token_ids (N, S), lengths (N,)) -> (N, Dt); N may be 0.
    Raises: CheckpointError if the folder cannot be used; ConfigError if the model does not fit the tokenizer or
        `config.context_length`; InstallationError if transformers cannot be imported.
    """
    if config.path is None:
        tower = text_tower(text_model_config(config, vocab_size=vocab_size, eos_id=eos_id, pad_id=pad_id))
    else:
        tower = _from_folder(Path(config.path))
        _set_padding(tower.model.config, pad_id)
        _check_fit(config, tower.model.config, vocab_size)
    return tower.requires_grad_(not config.frozen)


def check_text_folder(config: TextConfig, vocab_size: int) -> None:
    """Checks the folder `config.path` of a text tower, without reading weights.

    Raises: as `build_text_tower`, for what the configuration and the names of the files show.
    """
    folder = Path(str(config.path))
    _check_fit(config, _text_part(_read_config(folder)), vocab_size)
    weight_files(folder)


def text_model_config(config: TextConfig, *, vocab_size: int, eos_id: int, pad_id: int) -> dict[str, Any]:
    """Returns the configuration of the text model that `build_text_tower` builds, as in transformers' config.json.

    Raises: as `build_text_tower`.
    """
    with working_imports("transformers"):
        from transformers import CLIPTextConfig

    if config.path is not None:
        read = _text_part(_read_config(Path(config.path)))
        _set_padding(read, pad_id)
        return as_json(read)
    shape = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context_length,
        hidden_act="gelu",
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    return as_json(shape)


def as_json(config: Any) -> dict[str, Any]:
    """Returns a configuration of transformers as the JSON object that its config.json would hold."""
    return json.loads(config.to_json_string(use_diff=False))


def text_tower(values: Mapping[str, Any]) -> nn.Module:
    """Builds a text tower with initial weights. Args: values: the text model's configuration, see `text_model_config`.

    Raises: CheckpointError if the model is not supported or impossible; InstallationError as `build_text_tower`.
    """
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(f"the text model is of type {kind!r}; supported are: {', '.join(sorted(FAMILIES))}")
    with working_imports("transformers"):
        from transformers import CLIPTextConfig, Siglip2TextConfig, SiglipTextConfig
    configuration = {"clip": CLIPTextConfig, "siglip": SiglipTextConfig, "siglip2": Siglip2TextConfig}[FAMILIES[kind]]
    model, tower = _classes(kind)
    try:
        with quiet():
            return tower(model._from_config(configuration.from_dict(dict(values)), attn_implementation="sdpa"))
    except Exception as error:  # impossible values make the library raise anything
        raise CheckpointError(f"the text model's configuration is impossible: {first_line(error)}") from error


def text_shapes(values: Mapping[str, Any]) -> dict[str, TensorInfo] | None:
    """Returns the tensors of a text tower without transformers, whose import takes longer than a conversion.

    Args: values: as of `text_tower`. Returns: the tensors by their names in the tower; None if `values` are unusual, so
        that only `text_tower` can check them.
    """
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    numbers = [values.get(name) for name in (*names, "num_attention_heads")]
    if values.get("hidden_act") not in _ACTIVATIONS or not all(
        type(number) is int and number > 0 for number in numbers
    ):
        return None
    width, hidden, layers, vocabulary, positions, heads = numbers
    head = values.get("projection_size")
    family = FAMILIES.get(str(values.get("model_type")))
    if width % heads or family is None or (family != "clip" and (type(head) is not int or head < 1)):
        return None
    shapes = {"embeddings.token_embedding.weight": (vocabulary, width)}
    shapes["embeddings.position_embedding.weight"] = (positions, width)
    square = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    linears = {**dict.fromkeys(square, (width, width)), "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    vectors = dict.fromkeys(("layer_norm1", "layer_norm2"), (width,))
    parts = {
        f"encoder.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in (linears | vectors).items()
    }
    parts["final_layer_norm"] = (width,)
    if family != "clip":
        parts["head"] = (head, width)
    for name, shape in parts.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {f"model.{name}": TensorInfo(shape, torch.float32) for name, shape in shapes.items()}


def check_text_library() -> None:
    """Checks that transformers can build text towers in this environment. Raises: InstallationError."""
    with working_imports("transformers"):
        from transformers import AutoModel, CLIPTextModel, Siglip2TextModel, SiglipTextModel  # noqa: F401


def _read_config(folder: Path) -> Any:
    """Returns the configuration of a folder of transformers. Raises: CheckpointError if it is not supported."""
    with working_imports("transformers"):
        from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"model.text.path {folder} has no config.json; name a local folder of a text model")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"model.text.path {folder} has no readable config.json: {first_line(error)}; fetch it again"
        ) from error
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"model.text.path {folder} holds a {config.model_type} model; supported are: {', '.join(sorted(FAMILIES))}"
        )
    return config


def _classes(kind: str) -> tuple[Any, type[nn.Module]]:
    """Returns the class of transformers and the tower for a `model_type`."""
    with working_imports("transformers"):
        from transformers import CLIPTextModel, Siglip2TextModel, SiglipTextModel

    return {
        "clip": (CLIPTextModel, CausalTextTower),
        "siglip": (SiglipTextModel, PaddedTextTower),
        "siglip2": (Siglip2TextModel, PaddedTextTower),
    }[FAMILIES[kind]]


def _set_padding(config: Any, pad_id: int) -> None:
    """Sets the padding of SigLIP 2 to that of its tokenizer: the released configurations have the one of SigLIP."""
    if FAMILIES[config.model_type] == "siglip2":
        config.pad_token_id = pad_id


def _text_part(config: Any) -> Any:
    return getattr(config, "text_config", config)


def _from_folder(folder: Path) -> nn.Module:
    loader, tower = _classes(_read_config(folder).model_type)
    try:
        with quiet():
            model, info = loader.from_pretrained(
                folder,
                local_files_only=True,
                attn_implementation="sdpa",
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the text model in {folder} cannot be loaded: {first_line(error)}; fetch it again, or name another in "
            "model.text.path"
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:8])
        raise CheckpointError(f"the text model in {folder} lacks weights: {missing}; fetch it again")
    return tower(model)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' warnings and progress bars for the body."""
    # transformers lists every weight of CLIP's image tower as unexpected for the text tower.
    with working_imports("transformers"):
        from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_fit(config: TextConfig, built: object, vocab_size: int) -> None:
    if vocab_size > built.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocab_size} tokens but the text model in {config.path} has {built.vocab_size}; "
            f"set model.text.tokenizer to the tokenizer.json of that model"
        )
    if config.context_length > built.max_position_embeddings:
        raise ConfigError(
            f"model.text.context_length {config.context_length} exceeds the {built.max_position_embeddings} positions "
            f"of the text model in {config.path}; lower it"
        )


def _never_empty(token_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    # transformers cannot run an empty batch: for a pack without items, one row of one token is run and then dropped.
    if len(token_ids):
        return token_ids, lengths
    return token_ids.new_zeros(1, 1), lengths.new_ones(1)
