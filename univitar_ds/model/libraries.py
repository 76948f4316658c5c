"""Libraries that other libraries import: a broken one is reported in a sentence instead of pages of traceback."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

from univitar_ds.errors import InstallationError

_REQUIRED = {"huggingface_hub", "numpy", "PIL", "regex", "safetensors", "tokenizers", "torch", "transformers", "yaml"}
"""Packages that transformers requires."""
_BESIDE_TORCH = {"torchvision", "torchaudio", "torchcodec"}
"""Each release and build of these fits one of torch only."""


@contextmanager
def working_imports(library: str) -> Iterator[None]:
    """Wraps imports from `library`, and nothing else.

    transformers imports every optional package that is installed, and its own errors hide why one of them failed.
    Raises: InstallationError that names the broken package, its version and the remedy.
    """
    try:
        yield
    except Exception as error:  # a broken package raises anything: RuntimeError, OSError, AttributeError
        root = _root(error)
        package = _culprit(root) or library
        raise InstallationError(
            f"{library} cannot be imported, since {package} {_version(package)} is broken or does not fit "
            f"{_fits(package)}: {type(root).__name__}: {_first_line(root)}; {_remedy(package)}"
        ) from error


def _root(error: BaseException) -> BaseException:
    while (earlier := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = earlier
    return error


def _culprit(error: BaseException) -> str | None:
    """The optional package whose import failed: the innermost one in the traceback; else a required one."""
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
