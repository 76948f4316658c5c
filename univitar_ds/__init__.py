"""UniViTAR: native-resolution vision transformers for images and videos, trained with DeepSpeed.

The public names are `UniViTARModel` (the whole model with tokenizer and preprocessing), `UniViTAR` (the encoder),
`Preprocessor` (converts images and videos to its input), and for training `RunConfig`, `train` and `resume`. They are
imported on first use, so that importing the package is fast.
"""

TYPE_CHECKING = False  # `typing.TYPE_CHECKING` would import `typing` before `__main__` has cleaned `sys.path`
if TYPE_CHECKING:
    from univitar_ds.config.schema import RunConfig
    from univitar_ds.inference.model import UniViTARModel
    from univitar_ds.model.encoder import UniViTAR
    from univitar_ds.preprocessing import Preprocessor
    from univitar_ds.python_api import resume, train

__all__ = ["Preprocessor", "RunConfig", "UniViTAR", "UniViTARModel", "__version__", "resume", "train"]
__version__ = "0.1.0"
_MODULES = {
    "Preprocessor": "preprocessing",
    "RunConfig": "config.schema",
    "UniViTAR": "model.encoder",
    "UniViTARModel": "inference.model",
    "resume": "python_api",
    "train": "python_api",
}
"""The module of each public name."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
