"""Reads run files: YAML, dotted overrides, and one report of all errors."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.keys.faults import Fault, faults_of
from univitar_ds.config.keys.places import unite_paths
from univitar_ds.config.keys.renamed import present_key, rename_keys
from univitar_ds.config.paths import expand
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import ConfigError, shortened
from univitar_ds.strict_yaml import parse_yaml

RESULT_FREE = (
    "output",
    "deterministic",
    "deepspeed",
    "plugins",
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
    "model.tensor_parallel",
    "model.sequence_parallel",
    "objective.grad_cache_keep",
    "objective.teacher.partitioned",
    "objective.teacher.cache",
    "guard",
    "checkpoint",
    "evaluation",
    "logging",
    "watchdog",
)
"""Keys that a resumed run may change, because they change neither the samples nor the arithmetic of the run."""

FIXED = ("checkpoint.folder",)
"""Keys below RESULT_FREE that a resumed run must not change, because it would not find its checkpoints."""


def recipe_path(name: str) -> Path:
    """Returns the path of a run file: `name` if that file exists, else the shipped recipe of that name.

    Raises: ConfigError if there is neither.
    """
    path = Path(expand(name))
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    names = ", ".join(sorted(shipped))
    raise ConfigError(f"no run file '{path}'; give the path of a YAML file or one of the shipped recipes ({names})")


def shipped_recipes() -> dict[str, Path]:
    """Returns the files of the shipped recipes by name."""
    return {file.stem: file for file in Path(str(resources.files("univitar_ds")), "recipes").glob("*.yaml")}


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file. Raises: ConfigError if the file cannot be read or has no mapping."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; check the file, the disk and your permissions") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else "a list" if isinstance(content, list) else "a single value"
        raise ConfigError(f"{path} holds {found}, expected keys such as name, data and stages")
    return content


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of `content` with `a.b.0.c=value` entries set. Values are read as YAML.

    Raises: ConfigError if an entry has no `=`, a value that is not YAML, a path through a value, or a wrong index.
    """
    content = json.loads(json.dumps(content, default=str))  # dates and sets of YAML become text
    for entry in overrides:
        dotted, separator, text = entry.partition("=")
        if not separator or not dotted:
            raise ConfigError(f"override {shortened(entry)!r} is not of the form section.key=value")
        try:
            value = parse_yaml(text)
        except ConfigError as error:
            raise ConfigError(f"override {shortened(entry)!r}: {error}") from None
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise ConfigError(f"override {shortened(entry)!r}: {shortened(text)!r} is not valid YAML") from error
        node: Any = content
        *sections, last = present_key(dotted).split(".")
        for section in sections:
            node = _child(node, section, entry)
        if isinstance(node, list):
            node[_index(node, last, entry)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise ConfigError(f"override {shortened(entry)!r}: {'.'.join(sections)} is a value, not a section")
    return content


def _child(node: Any, section: str, entry: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, section, entry)]
    if not isinstance(node, dict):
        raise ConfigError(f"override {shortened(entry)!r}: the part before {section!r} is a value and has no keys")
    if node.get(section) is None:
        node[section] = {}
    return node[section]


def _index(items: list, text: str, entry: str) -> int:
    """Returns the index in `items` that `text` gives. The index after the last one appends an empty section.

    Raises: ConfigError for any other text.
    """
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) > len(items):
        raise ConfigError(
            f"override {shortened(entry)!r}: {shortened(text)!r} is not an index of a list of {len(items)}; "
            + (f"use {_range(len(items))}, or {len(items)} for one more" if items else "use 0 for its first entry")
        )
    if int(text) == len(items):
        items.append({})
    return int(text)


def _range(count: int) -> str:
    return "0" if count == 1 else f"0 to {count - 1}"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the checked run file at `path` (or the shipped recipe of that name) with overrides applied.

    An override of `model.init_from` also removes the file's `model.encoder` and `model.layer_scale_init` if the file
    has no `model.init_from`, because they then describe a model with random weights.

    Raises: ConfigError that lists every error with its key, its value and the remedy.
    """
    file = recipe_path(str(path))
    content = read_yaml(file)
    rename_keys(content, str(file))
    _drop_initial(content, overrides)
    changed = apply_overrides(content, overrides)
    try:
        return check_config(changed, str(file))
    except ConfigError as error:
        raise (_blamed(error, content, overrides, str(file)) if overrides else error) from None


def _drop_initial(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Removes the keys of a run file that an override of `model.init_from` replaces, see `load_config`."""
    given = {present_key(key): value for key, _, value in (entry.partition("=") for entry in overrides)}
    model = content.get("model")
    if given.get("model.init_from", "null") not in ("", "~", "null") and isinstance(model, dict):
        for key in ("encoder", "layer_scale_init") if "init_from" not in model else ():
            model.pop(key, None)


def check_config(content: dict[str, Any], where: str) -> RunConfig:
    """Returns `content` as a RunConfig. `content` may use earlier names of keys.

    Raises: ConfigError that lists all errors and begins with `where`.
    """
    content = copy.deepcopy(content)
    rename_keys(content, where)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise _error(where, [fault.sentence for fault in faults_of(error)]) from None


def _blamed(error: ConfigError, content: dict[str, Any], overrides: Sequence[str], where: str) -> ConfigError:
    """Returns the error of a run file with overrides, in which each error names the override that causes it.

    An override is the cause of an error if the error disappears without it. If no override is, the file is the cause.
    """
    found = _faults(content, overrides)
    if found is None:  # a key is given under two names
        return error
    without = [_faults(content, [*overrides[:at], *overrides[at + 1 :]]) for at in range(len(overrides))]
    in_file = _faults(content, ())
    lines, from_file = [], 0
    for fault in found:
        causes = [
            entry for entry, left in zip(overrides, without, strict=True) if left is not None and fault not in left
        ]
        if not causes and (in_file is None or fault not in in_file):  # each of several overrides causes it
            causes = [entry for entry in overrides if fault.place[:1] in ((), (present_key(entry).split(".")[0],))]
        from_file += not causes
        lines.append(": ".join([*([" and ".join(map(shortened, causes))] if causes else []), fault.sentence]))
    if from_file == len(lines):
        return _error(where, lines)
    return _error("the command line" if not from_file else f"the command line or {where}", lines)


def _faults(content: dict[str, Any], overrides: Sequence[str]) -> list[Fault] | None:
    """Returns the faults of a run file with overrides; None if the overrides cannot be applied."""
    try:
        content = apply_overrides(content, overrides)
        rename_keys(content, "", report=False)
        RunConfig.model_validate(content)
    except ValidationError as error:
        return faults_of(error)
    except ConfigError:
        return None
    return []


def _error(where: str, lines: Sequence[str]) -> ConfigError:
    head = f"{where} has {len(lines)} error{'s' if len(lines) > 1 else ''}:"
    return ConfigError("\n  - ".join([head, *lines]))


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
    Raises: ConfigError if there is no entry, or a key or value is wrong; it begins with `where`.
    """
    content = config.model_dump(mode="json", exclude_unset=True)
    last = content["stages"][-1]
    if not extension:
        samples = config.stages[-1].samples
        raise ConfigError(
            f"{where} has no keys; give at least one, such as --extend samples={samples}, which trains as many samples "
            f"again as the last stage {last['name']}, or leave --extend out"
        )
    names = {stage.name for stage in config.stages}
    numbered = re.fullmatch(r"(.+)-\d+", last["name"])
    stem = numbered[1] if numbered and numbered[1] in names else last["name"]
    name = next(new for number in count(2) if (new := f"{stem}-{number}") not in names)
    content["stages"].append(apply_overrides({**last, "name": name}, extension))
    return check_config(content, where)


def before_extension(saved: RunConfig, now: RunConfig) -> RunConfig:
    """Returns `now` without the stages that follow those of `saved`, because they do not affect earlier steps."""
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
