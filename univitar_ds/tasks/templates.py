"""Templates of sentences with class names: a file with one per line, or CLIP's 80 for ImageNet."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from univitar_ds.data.storage.base import S3
from univitar_ds.errors import ConfigError
from univitar_ds.regular_files import read_utf8

IMAGENET = "imagenet"
"""Name of CLIP's published templates (arXiv:2103.00020), which are in the order of CLIP's notebook."""
_CLIP_BENCHMARK = "{c}"
"""Placeholder of the class name in the templates of CLIP_benchmark's data sets."""

EMPTY = "is empty; write a sentence per line, such as: a photo of a {}."


def read_templates(name: str) -> list[str]:
    """Returns the templates of a file, or CLIP's for the name `imagenet`. Empty lines and lines that begin with # are
    left out.

    Raises: ConfigError if the file cannot be read, has no template, or a template lacks {}.
    """
    if name.startswith(S3):
        raise ConfigError(f"--templates {name}: is read from a local disk only; copy it, and name the copy")
    if name == IMAGENET:
        text = (resources.files("univitar_ds.tasks") / "imagenet_templates.txt").read_text(encoding="utf-8")
    else:
        text = template_text(Path(name))
    lines = [line.strip().replace(_CLIP_BENCHMARK, "{}") for line in text.splitlines()]
    templates = [line for line in lines if line and not line.startswith("#")]
    if not templates:
        raise ConfigError(f"--templates {name} {EMPTY}")
    lacking = [template for template in templates if "{}" not in template]
    if lacking:
        raise ConfigError(f"--templates {name}: {lacking[0]!r} has no {{}} for the name of the class; add it")
    return templates


def template_text(path: Path) -> str:
    """Returns the text of a file of templates. Raises: ConfigError if it cannot be read or has no text."""
    try:
        text = read_utf8(path).removeprefix("\ufeff")  # the byte order mark of Windows' editors
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--templates {path} cannot be read as UTF-8 text ({error}); name another file") from error
    if not text.strip():
        raise ConfigError(f"--templates {path} {EMPTY}")
    return text
