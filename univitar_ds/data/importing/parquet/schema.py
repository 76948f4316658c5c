"""Reads what a Parquet table says about its columns: which hold media, and the names of its classes.

The `datasets` library writes its features as JSON into the metadata of a table. They are input like any other: what has
another form than expected is ignored with a warning.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from univitar_ds.data.shards.class_names import shared_names

_log = logging.getLogger(__name__)
_KEY = b"huggingface"
_MAX_BYTES = 64 << 20
MEDIA = ("Image", "Video")
"""Types of features that hold media."""


def features_of(path: Path, metadata: Mapping[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """Returns the features of `datasets` by column; {} if the metadata of a table has none that can be read."""
    content = (metadata or {}).get(_KEY)
    if content is None:
        return {}
    try:
        if len(content) > _MAX_BYTES:
            raise ValueError(f"{len(content)} bytes, limit {_MAX_BYTES}")
        features = json.loads(content)["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _log.warning("%s: its metadata of datasets cannot be read (%s) and is ignored", path, type(error).__name__)
        return {}


def class_names(path: Path, features: Mapping[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Returns the class names of each column with the feature `ClassLabel`."""
    found: dict[str, list[str]] = {}
    for column, feature in features.items():
        if feature.get("_type") != "ClassLabel":
            continue
        names = feature.get("names")
        if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
            _log.warning("%s: the class names of column %r are not a list of texts and are ignored", path, column)
            continue
        found[column] = [name.strip() for name in names]
        if shared := shared_names(found[column]):
            _log.warning("%s: column %r: %s", path, column, shared)
    return found
