"""UniViTAR: native-resolution vision transformers for images and videos, trained with DeepSpeed.

The public face is `UniViTAR` (the encoder) and `Preprocessor` (images and videos to its input). Both are
imported when first asked for, so that importing the package costs nothing.
"""

TYPE_CHECKING = False  # as type checkers understand it: `typing` would be one import before `__main__` is on its feet
if TYPE_CHECKING:
    from univitar_ds.model.encoder import UniViTAR
    from univitar_ds.preprocessing import Preprocessor

__all__ = ["Preprocessor", "UniViTAR", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "UniViTAR":
        from univitar_ds.model.encoder import UniViTAR

        return UniViTAR
    if name == "Preprocessor":
        from univitar_ds.preprocessing import Preprocessor

        return Preprocessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
