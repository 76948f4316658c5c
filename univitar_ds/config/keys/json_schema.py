"""The JSON Schema of run files, with which editors complete and check them."""

from __future__ import annotations

import json
from typing import Any

from univitar_ds.config.schema import RunConfig

FILE = "run.schema.json"
"""Name of the schema's file beside the shipped recipes, which name it in their first line."""
_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_NUMBERS = {"integer": r"^[+-]?[0-9][0-9_]*$", "number": r"^[+-]?[0-9][0-9_]*\.?[0-9_]*([eE][+-]?[0-9]+)?$"}
"""Patterns of numbers that are written as text: YAML 1.2 reads 12_000 as text, and YAML 1.1 reads 5e-4 as text."""


def run_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a run file, with descriptions, limits and defaults."""
    schema = _with_number_texts(RunConfig.model_json_schema())
    return {"$schema": _DRAFT, **schema, "title": "Run file of univitar_ds"}


def schema_text() -> str:
    """Returns the JSON Schema as the text of a file."""
    return json.dumps(run_schema(), indent=2) + "\n"


def _with_number_texts(node: Any) -> Any:
    """Returns a copy of a part of the schema in which every number may also be written as text."""
    if isinstance(node, list):
        return [_with_number_texts(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    changed = {key: value if key == "default" else _with_number_texts(value) for key, value in node.items()}
    kind = node.get("type")
    if isinstance(kind, str) and kind in _NUMBERS:
        changed |= {"type": [kind, "string"], "pattern": _NUMBERS[kind]}
    return changed
