"""Antialiased bicubic resizing of uint8 images by torch's own kernel, called without Python's torch.

`import torch` costs a decoding process a second of CPU and 190 MB, 130 of them its own. The kernel alone needs
torch's C++ library and a tenth of the time; it is called through torch's stable C interface (`torch/csrc/stable`)
and reads and writes the caller's memory. Where torch is imported already, the same library is used.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_double, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import numpy as np

from univitar_ds.geometry import PATCH

_OPERATOR = b"aten::_upsample_bicubic2d_aa"


Extent = tuple[float, float]
"""Height and width in pixels of an image that need not end where its last pixels do."""


def resize(source: np.ndarray, out: np.ndarray, extent: Extent | None = None) -> None:
    """An image resized into `out`, with bicubic weights that cover every source pixel (antialiased).

    Within 1 level of Pillow's bicubic, but for 2 levels in 3 values of a million on photographs (10 on black and white
    edges). Columns and rows are two passes with 8 bits between them. The weights here have 15 bits, Pillow's 22, so
    either pass differs by 1 level in 0.2 % of its values and never by more; 2 come where the second meets several such
    values of the first. No call of the kernel takes finer weights. The order of passes shows by up to 20 levels; it is
    Pillow 13's.

    Args: source (H, W, 3) and out (h, w, 3), both uint8 and C-contiguous; extent, how much of the source the image
    takes, counted from its first pixel (default: all).
    """
    (height, width, _), (rows, columns, _) = source.shape, out.shape
    tall, wide = extent or (height, width)
    if rows < height and 2 * (width - columns) < height - rows and width != columns:
        between = np.empty((rows, width, 3), np.uint8)
        _call(source, between, tall, width)
        source, tall = between, rows
    _call(source, out, tall, wide)


def _call(source: np.ndarray, out: np.ndarray, tall: float, wide: float) -> None:
    assert all(pixels.dtype == np.uint8 and pixels.flags.c_contiguous for pixels in (source, out))
    library, release = load()
    size = c_void_p()
    library.torch_new_list_reserve_size(c_size_t(2), byref(size))
    for side in out.shape[:2]:
        library.torch_list_push_back(size, c_uint64(side))
    scales = [
        _optional(library, None if whole == side else new / side)
        for new, side, whole in zip(out.shape, (tall, wide), source.shape, strict=False)
    ]
    # input, output size, align_corners, two scales (none: from the sizes), out. The call takes over what it is given.
    stack = (c_uint64 * 6)(_tensor(library, source), size.value, 0, *scales, _tensor(library, out))
    if library.torch_call_dispatcher(_OPERATOR, b"out", stack, release):
        raise RuntimeError(library.torch_exception_get_what_without_backtrace().decode(errors="replace"))
    library.aoti_torch_delete_tensor_object(c_void_p(stack[0]))


def _tensor(library: ctypes.CDLL, pixels: np.ndarray) -> int:
    """A tensor (1, 3, H, W), channels last, over the array's memory."""
    height, width, channels = pixels.shape
    sizes = (c_int64 * 4)(1, channels, height, width)
    strides = (c_int64 * 4)(height * width * channels, 1, width * channels, channels)
    handle = c_void_p()
    data = c_void_p(pixels.ctypes.data)
    uint8 = c_int32(library.aoti_torch_dtype_uint8())
    no_offset, cpu, any_device = c_int64(0), c_int32(0), c_int32(-1)
    failed = library.aoti_torch_create_tensor_from_blob(
        data, c_int64(4), sizes, strides, no_offset, uint8, cpu, any_device, byref(handle)
    )
    if failed or handle.value is None:
        raise RuntimeError(f"torch makes no tensor of shape {pixels.shape}")
    return handle.value


def _optional(library: ctypes.CDLL, value: float | None) -> int:
    """A number, or none, as the C interface wants it: a pointer to memory of C++, which the call frees."""
    if value is None:
        return 0
    address = library._Znwm(c_size_t(8))  # operator new
    c_double.from_address(address).value = value
    return address


@cache
def load() -> tuple[ctypes.CDLL, c_uint64]:
    """torch's C++ library and its release as its C interface wants it."""
    found = importlib.util.find_spec("torch")
    if found is None:
        raise ImportError("torch is not installed in this environment; install it, see requirements.txt")
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = str(Path(str(found.origin)).parent / "lib" / f"libtorch_cpu.{suffix}")
    try:
        library = ctypes.CDLL(path)
    except OSError:  # some builds find their own parts only after torch's set-up
        importlib.import_module("torch")
        library = ctypes.CDLL(path)
    library.torch_exception_get_what_without_backtrace.restype = c_char_p
    library.aoti_torch_abi_version.restype = c_uint64
    library._Znwm.restype = c_void_p
    return library, c_uint64(library.aoti_torch_abi_version())


def fit_image(
    pixels: np.ndarray, grid_thw: Sequence[int], out: np.ndarray | None = None, extent: Extent | None = None
) -> np.ndarray:
    """An image resized to its grid, bicubic and antialiased; `resize` says how near the release's it is.

    Args: pixels (H, W, 3) uint8; grid (t, h, w) in tokens; out, where to put the result instead of new memory;
        extent, see `resize`.
    Returns: (h * 14, w * 14, 3) uint8; `pixels` itself where it fits already and there is no `out`.
    """
    _, h, w = grid_thw
    shape = (h * PATCH, w * PATCH, 3)
    if out is None:
        if pixels.shape == shape:
            return pixels
        out = np.empty(shape, np.uint8)
    assert out.shape == shape, (out.shape, shape)
    if pixels.shape == shape:
        out[:] = pixels
    else:
        resize(np.ascontiguousarray(pixels), out, extent)
    return out
