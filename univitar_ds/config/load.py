"""Reads run files: YAML, dotted overrides, and one report of all errors."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import types
from collections.abc import Sequence
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.paths import expand
from univitar_ds.config.places import unite_paths
from univitar_ds.config.renamed import present_key, rename_keys
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import ConfigError

DEEPSPEED_KEYS = ("zero_optimization", "bf16", "fp16", "data_types", "zero_allow_untested_optimizer")
"""Keys that users may expect in the run file but that belong to the DeepSpeed JSON."""

RESULT_FREE = (
    "output",
    "deterministic",
    "deepspeed",
    "data.workers",
    "data.prefetch_packs",
    "data.on_bad",
    "data.max_bad_per_thousand",
    "data.max_bad_in_a_row",
    "data.worker_restarts",
    "data.accept_changed_sources",
    "data.s3",
    "data.cache",
    "data.log_samples",
    "model.attention",
    "model.compile",
    "model.checkpoint_every",
    "objective.teacher.partitioned",
    "objective.teacher.cache",
    "guard",
    "checkpoint",
    "evaluation",
    "logging",
)
"""Keys that a resumed run may change, because they change neither the samples nor the arithmetic of the run."""


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that rejects duplicate keys. PyYAML would silently use the last of them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise ConfigError(
                    f"key {key!r} is written twice in one section (line {key_node.start_mark.line + 1}); keep one"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def recipe_path(name: str) -> Path:
    """Returns the path of a run file: `name` if that file exists, else the shipped recipe of that name.

    Raises: ConfigError if there is neither.
    """
    path = Path(expand(name))
    if path.is_file():
        return path
    shipped = Path(str(resources.files("univitar_ds"))) / "recipes"
    if (shipped / f"{name}.yaml").is_file():
        return shipped / f"{name}.yaml"
    names = ", ".join(sorted(file.stem for file in shipped.glob("*.yaml")))
    raise ConfigError(f"no run file '{path}': give the path of a YAML file or one of the shipped recipes ({names})")


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file. Raises: ConfigError if the file cannot be read or has no mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:  # too many levels
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, expected keys such as name, data and stages")
    return content


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of `content` with `a.b.0.c=value` entries set. Values are read as YAML.

    Raises: ConfigError if an entry has no `=`, a value that is not YAML, a path through a value, or a wrong index.
    """
    content = json.loads(json.dumps(content))
    for entry in overrides:
        dotted, separator, text = entry.partition("=")
        if not separator or not dotted:
            raise ConfigError(f"override {entry!r} is not of the form section.key=value")
        try:
            value = yaml.load(text, Loader=_StrictLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {entry!r}: {text!r} is not valid YAML") from error
        node: Any = content
        *sections, last = present_key(dotted).split(".")
        for section in sections:
            node = _child(node, section, entry)
        if isinstance(node, list):
            node[_index(node, last, entry)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise ConfigError(f"override {entry!r}: {'.'.join(sections)} is a value, not a section")
    return content


def _child(node: Any, section: str, entry: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, section, entry)]
    if not isinstance(node, dict):
        raise ConfigError(f"override {entry!r}: the part before {section!r} is a value and has no keys")
    if node.get(section) is None:
        node[section] = {}
    return node[section]


def _index(items: list, text: str, entry: str) -> int:
    """Returns the index in `items` that `text` gives. The index after the last one appends an empty section.

    Raises: ConfigError for any other text.
    """
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) > len(items):
        raise ConfigError(
            f"override {entry!r}: {text!r} is no index of a list of {len(items)}; "
            + (f"use 0 to {len(items) - 1}, or {len(items)} for one more" if items else "use 0 for its first entry")
        )
    if int(text) == len(items):
        items.append({})
    return int(text)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the checked run file at `path` (or the shipped recipe of that name) with overrides applied.

    Raises: ConfigError that lists every error with its key, its value and the remedy.
    """
    file = recipe_path(str(path))
    content = read_yaml(file)
    rename_keys(content, str(file))
    return check_config(apply_overrides(content, overrides), str(file))


def check_config(content: dict[str, Any], where: str) -> RunConfig:
    """Returns `content` as a RunConfig. It may use earlier names of keys.

    Raises: ConfigError that lists all errors and begins with `where`.
    """
    content = copy.deepcopy(content)
    rename_keys(content, where)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        lines = [_sentence(fault) for fault in error.errors()]
    head = f"{where} has {len(lines)} error{'s' if len(lines) > 1 else ''}:"
    raise ConfigError("\n  - ".join([head, *lines])) from None


def _sentence(fault: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return _unknown_key(fault["loc"])
    if fault["type"] == "missing":
        return f"{place} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{place}: {message}" if place else message
    value = json.dumps(fault["input"], default=str)
    return f"{place}: {message[0].lower()}{message[1:]}, got {value if len(value) < 80 else value[:77] + '...'}"


def _unknown_key(location: tuple) -> str:
    *sections, key = location
    model = _model_at(sections)
    names = list(model.model_fields) if model else []
    place = ".".join(str(part) for part in location)
    if key in DEEPSPEED_KEYS:
        return f"{place} belongs to the DeepSpeed JSON that `deepspeed` names, not to the run file"
    near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"
    return f"unknown key {place}; {hint}"


def _model_at(sections: Sequence[Any]) -> type[BaseModel] | None:
    """Returns the class of the section at a path of field names and list indices; None if there is none."""
    model: Any = RunConfig
    for section in sections:
        if isinstance(section, int):
            continue
        field = model.model_fields.get(section) if model else None
        model = _section_class(field.annotation) if field else None
    return model


def _section_class(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, Union, types.UnionType):
        return next(filter(None, map(_section_class, get_args(annotation))), None)
    return None


def dump_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved run file: every key with the value that the run uses."""
    replace_text(path, dumped(config.model_dump(mode="json")))


def dumped(content: dict[str, Any]) -> str:
    """Returns `content` as the YAML that `dump_config` writes."""
    return yaml.safe_dump(content, sort_keys=False, width=110)


def result_part(config: RunConfig) -> dict[str, Any]:
    """Returns the part of a run file that determines the result of the run.

    Leaves out the keys in RESULT_FREE, the checkpointing of stages, and paths and class names of sources.
    """
    content = config.model_dump(mode="json")
    weighted = any(stage.weights for stage in config.stages)
    for entry, source in zip(content["data"]["sources"], config.data.sources, strict=True):
        del (
            entry["path"],
            entry["class_names"],
            entry["table"],
        )  # data may move: the cursors detect whether the shards are still the same
        entry["name"] = source.label if weighted else None
    for dotted in RESULT_FREE:
        *sections, last = dotted.split(".")
        node = content
        for section in sections:
            node = None if node is None else node[section]
        if node is not None:  # None: the section is absent
            node.pop(last)
    for stage in content["stages"]:
        del stage["checkpoint_every"]
    return content


def config_fingerprint(config: RunConfig) -> str:
    """Returns a hash of `result_part`, which is stored in each checkpoint."""
    return hashlib.sha256(json.dumps(result_part(config), sort_keys=True).encode()).hexdigest()[:16]


def extended(config: RunConfig, extension: Sequence[str], where: str) -> RunConfig:
    """Returns the configuration with one more stage: a copy of the last stage with the given keys changed.

    Args: extension: entries KEY=VALUE of the new stage; its name is made from that of the last stage if absent.
    Raises: ConfigError if a key or value is wrong; it begins with `where`.
    """
    content = config.model_dump(mode="json", exclude_unset=True)
    last = content["stages"][-1]
    names = {stage.name for stage in config.stages}
    name = next(new for number in count(2) if (new := f"{last['name']}-{number}") not in names)
    content["stages"].append(apply_overrides({**last, "name": name}, extension))
    return check_config(content, where)


def before_extension(saved: RunConfig, now: RunConfig) -> RunConfig:
    """Returns `now` without the stages that were added to those of `saved`, which cannot have changed earlier steps."""
    known = len(saved.stages)
    return now if len(now.stages) <= known else now.model_copy(update={"stages": now.stages[:known]})


def changed_result(before: RunConfig, after: RunConfig) -> list[str]:
    """Returns dotted names of the keys that affect the result and differ between `before` and `after`.

    Leaves out data.sources if `after` accepts changed sources.
    """
    old, new = result_part(before), result_part(after)
    unite_paths(old, new)
    changed = changed_keys(old, new)
    return [key for key in changed if not (after.data.accept_changed_sources and key.startswith("data.sources"))]


def changed_keys(before: Any, after: Any, place: str = "") -> list[str]:
    """Returns dotted names of the leaves in which two configurations, as plain mappings, differ.

    Args: place: dotted name of both.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [
            name
            for key in keys
            for name in changed_keys(before.get(key), after.get(key), f"{place}.{key}" if place else key)
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [name for i, (old, new) in pairs for name in changed_keys(old, new, f"{place}.{i}")]
    return [] if before == after else [place]
