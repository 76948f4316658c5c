"""Reads YAML with the rules of run files: keys are unique texts, and aliases cannot expand without limit."""

from __future__ import annotations

from typing import Any

import yaml

from univitar_ds.errors import ConfigError, shortened

MAX_NODES = 100_000
"""Maximum number of values in a run file. Values of an alias count at each use."""


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML document; None if it is empty.

    PyYAML would silently use the last of two equal keys, and expand aliases of aliases to any size.

    Raises: ConfigError for keys that are written twice or are not text, and for too many values or values that contain
        themselves; yaml.YAMLError, RecursionError (too many levels) or ValueError (a number that is too long).
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Returns the number of nodes below `node`, and checks them. Args: known: counts by id, 0 for nodes in progress."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    line = node.start_mark.line + 1
    if id(node) in known:
        if not known[id(node)]:
            raise ConfigError(f"the value in line {line} contains itself; write it without an alias")
        return known[id(node)]
    known[id(node)] = 0
    children = node.value
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [value for _, value in node.value]
    total = 1 + sum(_count(child, known) for child in children)
    if total > MAX_NODES:
        raise ConfigError(f"the section in line {line} has more than {MAX_NODES:,} values; use fewer aliases")
    known[id(node)] = total
    return total


def _check_keys(section: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in section.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            written = shortened(key.value) if isinstance(key, yaml.ScalarNode) else "a list or section"
            raise ConfigError(f"a key in line {line} is {written}, not text; write it in quotes")
        if key.value in seen:
            raise ConfigError(f"key {shortened(key.value)!r} is written twice in one section (line {line}); keep one")
        seen.add(key.value)
