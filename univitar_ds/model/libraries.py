"""Turns the traceback of a failed import into one sentence that names the broken package."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

from univitar_ds.errors import InstallationError

_REQUIRED = {"huggingface_hub", "numpy", "PIL", "regex", "safetensors", "tokenizers", "torch", "transformers", "yaml"}
"""Packages that transformers requires."""
_BESIDE_TORCH = {"torchvision", "torchaudio", "torchcodec"}
"""Packages whose builds each fit only one version and build of torch."""
_TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers of packages that warn, while transformers imports them, about features that no run here uses."""


@contextmanager
def working_imports(library: str) -> Iterator[None]:
    """Wraps statements that only import from `library`.

    transformers imports every installed optional package, and its errors hide why an import failed.
    Raises: InstallationError that names the broken package, its version and the remedy.
    """
    try:
        with _without_warnings():
            yield
    except Exception as error:  # broken packages raise any error: RuntimeError, OSError, AttributeError
        root = _root(error)
        package = _culprit(root) or library
        raise InstallationError(
            f"{library} cannot be imported, since {package} {_version(package)} is broken or does not fit "
            f"{_fits(package)}: {type(root).__name__}: {_first_line(root)}; {_remedy(package)}"
        ) from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    before = {logger: logger.level for logger in map(logging.getLogger, _TALKATIVE)}
    for logger in before:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


def _root(error: BaseException) -> BaseException:
    while (earlier := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = earlier
    return error


def _culprit(error: BaseException) -> str | None:
    """Returns the innermost optional package in the traceback, else the missing or innermost package, if any."""
    packages = [module.partition(".")[0] for module in _modules(error.__traceback__)]
    foreign = [name for name in packages if name not in sys.stdlib_module_names | {"univitar_ds"}]
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    for name in reversed(foreign):
        if name not in _REQUIRED:
            return name
    return missing.partition(".")[0] if missing else (foreign[-1] if foreign else None)


def _modules(traceback: TracebackType | None) -> Iterator[str]:
    while traceback is not None:
        yield traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next


def _version(package: str) -> str:
    for name in (package, *importlib.metadata.packages_distributions().get(package, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "(not installed, or of no known version)"


def _fits(package: str) -> str:
    return f"torch {torch.__version__}" if package in _BESIDE_TORCH else "the other packages of this environment"


def _remedy(package: str) -> str:
    if package in _REQUIRED:
        return f"install it again with `pip install --force-reinstall {package}`"
    build = "build for this torch" if package in _BESIDE_TORCH else "version that fits"
    return f"training does not need it: `pip uninstall {package}`, or install the {build}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
