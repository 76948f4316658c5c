"""UniViTAR: native-resolution vision transformers for images and videos, trained with DeepSpeed.

The public names are `UniViTARModel` (the whole model with tokenizer and preprocessing), `UniViTAR` (the encoder) and
`Preprocessor` (converts images and videos to its input). They are imported on first use, so that importing the package
is fast.
"""

TYPE_CHECKING = False  # `typing.TYPE_CHECKING` would import `typing` before `__main__` has cleaned `sys.path`
if TYPE_CHECKING:
    from univitar_ds.inference.model import UniViTARModel
    from univitar_ds.model.encoder import UniViTAR
    from univitar_ds.preprocessing import Preprocessor

__all__ = ["Preprocessor", "UniViTAR", "UniViTARModel", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "UniViTAR":
        from univitar_ds.model.encoder import UniViTAR

        return UniViTAR
    if name == "UniViTARModel":
        from univitar_ds.inference.model import UniViTARModel

        return UniViTARModel
    if name == "Preprocessor":
        from univitar_ds.preprocessing import Preprocessor

        return Preprocessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
