"""The configuration of an encoder: the checked fields of the `config.json` of UniViTAR's public release."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from univitar_ds.config.run_folder import CONFIG, EXPORT
from univitar_ds.errors import CheckpointError
from univitar_ds.geometry import PATCH, TUBELET, Resolution
from univitar_ds.regular_files import read_utf8

CONFIG_FILE = "config.json"
REQUIRED = {
    "pe_type": "rope2d",
    "norm_type": "RMSNorm",
    "hidden_act": "SwiGLU",
    "use_pre_norm": False,
    "num_channels": 3,
    "patch_size": PATCH,
    "temporal_patch_size": TUBELET,
}
"""Fields of the public release, each with the only value that this architecture supports."""


@dataclass(frozen=True)
class EncoderConfig:
    """Architecture and preprocessing of one encoder, with the field names and defaults of the public release (0.3B).

    `initializer_factor` is the initial value of LayerScale. `min_tokens` and `max_tokens` limit a whole item.
    `spatial_merge_size` is in patches, `resize_factor` in merged patches, `relarge_ratio` multiplies the sides before
    resizing, `resolution_mode` is "native" or the side of a square in pixels.

    Raises: CheckpointError if a value has the wrong type or is impossible.
    """

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4224
    qkv_bias: bool = False
    qk_normalization: bool = True
    patch_embedding_bias: bool = True
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_factor: float = 0.1
    spatial_merge_size: int = 1
    resize_factor: int = 2
    min_tokens: int = 576
    max_tokens: int = 16384
    relarge_ratio: float = 1.0
    resolution_mode: str = "native"
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        faults = [fault for field in dataclasses.fields(self) if (fault := self._type_fault(field))]
        faults = faults or self._value_faults()
        if faults:
            raise CheckpointError("this encoder is impossible: " + "; ".join(faults) + ". Correct its config.json.")

    @property
    def head_width(self) -> int:
        """K: number of values per head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def inner_width(self) -> int:
        """F: width of the feed-forward layer, two thirds of `intermediate_size` because SwiGLU has three matrices."""
        return int(self.intermediate_size * 2 / 3)

    @property
    def resolution(self) -> Resolution:
        """The size rule of the encoder's preprocessing."""
        divisor = PATCH * self.spatial_merge_size * self.resize_factor
        fixed = None if self.resolution_mode == "native" else int(self.resolution_mode)
        return Resolution(self.min_tokens, self.max_tokens, divisor, fixed)

    def parameter_count(self) -> int:
        """Returns the number of parameters of the encoder."""
        d, f = self.hidden_size, self.inner_width
        attention = 4 * d * d + d + 3 * d * self.qkv_bias + 2 * d * self.qk_normalization
        feed_forward = 3 * d * f + 2 * f + d + f
        block = attention + feed_forward + 4 * d
        patch = d * 3 * TUBELET * PATCH * PATCH + d * self.patch_embedding_bias
        return patch + self.num_hidden_layers * block

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderConfig:
        """Returns the configuration from the content of a `config.json`. Absent fields get the defaults.

        Ignores all other fields, such as dropout, attention back end and library versions.
        Raises: CheckpointError if a field is impossible, or has a value that this architecture does not support.
        """
        values = values.get("vision_config", values)
        if not isinstance(values, Mapping):
            raise CheckpointError(f"vision_config must be an object, got {values!r}")
        for name, needed in REQUIRED.items():
            if values.get(name, needed) != needed:
                raise CheckpointError(
                    f"config.json has {name} {values[name]!r}; UniViTAR is only defined for {needed!r}"
                )
        known = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in values.items() if name in known}
        for name in ("image_mean", "image_std"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a `config.json` in the layout of the public release."""
        own = {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }
        return {**REQUIRED, **own}

    def architecture(self) -> dict[str, Any]:
        """Returns the fields that determine the weights' shapes and the arithmetic, without preprocessing."""
        names = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "qkv_bias",
            "qk_normalization",
            "patch_embedding_bias",
            "layer_norm_eps",
            "rope_theta",
            "spatial_merge_size",
        )
        return {name: getattr(self, name) for name in names}

    def _type_fault(self, field: dataclasses.Field) -> str | None:
        value = getattr(self, field.name)
        if field.type == "int":
            good, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
        elif field.type == "bool":
            good, wanted = isinstance(value, bool), "true or false"
        elif field.type == "str":
            good, wanted = isinstance(value, str), "text"
        elif field.type == "float":
            good, wanted = _is_number(value), "a finite number"
        else:
            good = isinstance(value, tuple) and len(value) == 3 and all(map(_is_number, value))
            wanted = "three finite numbers"
        return None if good else f"{field.name} must be {wanted}, got {value!r}"

    def _value_faults(self) -> list[str]:
        faults = [
            f"{name} must be above 0, got {getattr(self, name)}"
            for name in (
                "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps",
                "rope_theta", "spatial_merge_size", "resize_factor", "min_tokens", "max_tokens", "relarge_ratio",
            )
            if getattr(self, name) <= 0
        ]  # fmt: skip
        if faults:
            return faults
        if self.hidden_size % self.num_attention_heads:
            faults.append(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        elif self.head_width % 4:
            faults.append(f"head width {self.head_width} is not divisible by 4, which 2-D rotary embedding needs")
        if self.inner_width < 1:
            faults.append(f"intermediate_size {self.intermediate_size} must be at least 2 (two thirds are used)")
        if self.min_tokens > self.max_tokens:
            faults.append(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")
        if min(self.image_std) <= 0:
            faults.append(f"image_std must be above 0, got {self.image_std}")
        mode = self.resolution_mode
        divisor = PATCH * self.spatial_merge_size
        if mode != "native" and not (mode.isdecimal() and int(mode) > 0 and int(mode) % divisor == 0):
            faults.append(f"resolution_mode must be native or pixels divisible by {divisor}, got {mode!r}")
        return faults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_encoder_config(folder: str | Path) -> EncoderConfig:
    """Returns the configuration of the encoder in `folder`.

    Raises: CheckpointError if the folder's `config.json` is missing, unreadable or impossible.
    """
    if Path(folder, CONFIG).is_file() and not Path(folder, CONFIG_FILE).exists():
        raise CheckpointError(
            f"{folder} is the folder of a run, not of an encoder; name {Path(folder, EXPORT)}, which holds it once the "
            "run has ended, or open the run with UniViTARModel.from_pretrained"
        )
    return EncoderConfig.from_dict(read_object(Path(folder) / CONFIG_FILE))


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises: CheckpointError if the file is unreadable or has no JSON object."""
    try:
        values = json.loads(read_utf8(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); name a folder with an encoder") from error
    except (ValueError, RecursionError) as error:  # too many levels
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(values).__name__}; fetch it again")
    return values
