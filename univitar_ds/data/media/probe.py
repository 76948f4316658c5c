"""Reads the size of an image or video from its header, without decoding.

The content determines the kind of a file. The extension matters in two cases: a GIF with a video extension, such as
.gifv, is a video; and any other file with a video extension must be a JPEG or a supported video.
"""

from __future__ import annotations

import io
import struct
import warnings
from contextlib import suppress

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from univitar_ds.data.media import jpeg_header
from univitar_ds.data.media.containers import video_demuxer
from univitar_ds.data.media.types import VIDEO_EXTENSIONS, MediaSize, reason
from univitar_ds.errors import SampleError
from univitar_ds.image_ops import ORIENTATION_TAG, ORIENTATIONS, display_size

_PILLOW_FORMATS = ("PNG", "GIF", "WEBP", "BMP", "TIFF", "ICO", "PSD", "JPEG2000", "AVIF", "PPM", "QOI", "JPEG")
_TIFF_TABLES = (273, 279, 324, 325)
"""Offsets and lengths of strips and tiles. Pillow reads them as numbers, even if the file gives them another type."""
_MAX_TIFF_VALUES = 1 << 20
_PRIVATE_TAGS, _TIFF_DIRECTORIES = 1 << 15, (34665, 34675, 34853)
"""Pillow keeps private tags, numbered from `_PRIVATE_TAGS`, as bytes. `_TIFF_DIRECTORIES` are the exceptions: EXIF, ICC
profile and GPS."""
_TIFF_TEXT = (1, 2, 6, 7)
"""Types of tags with one byte per value: BYTE, ASCII, SBYTE and UNDEFINED. The number of their values is not limited,
except in `_TIFF_TABLES`."""

# Pillow warns about every invalid tag. Faults that make a sample unusable raise an exception.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# Pillow's own limit of 178,956,970 pixels would override a higher data.max_image_px.
Image.MAX_IMAGE_PIXELS = None
# Pillow rejects images with a text or colour profile above 1 MiB; here, the memory of the process is limited instead.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30


def probe(data: bytes, extension: str) -> MediaSize:
    """Returns kind and size of a media file.

    Args: data: the whole file; extension: of its name, with or without dot.
    Raises: SampleError if the header is not that of a supported image or video.
    """
    if not data:
        raise SampleError("unreadable", "the file is empty")
    if jpeg_header.is_jpeg(data):
        height, width = jpeg_header.read_header(data).display_size
        return MediaSize("image", height, width, 1)
    demuxer = video_demuxer(data)
    named_video = extension.lower().lstrip(".") in VIDEO_EXTENSIONS
    if demuxer is not None and (demuxer != "gif" or named_video):
        from univitar_ds.data.media.video_probe import probe_video  # FFmpeg takes 17 MB of memory

        return probe_video(data, demuxer)
    if named_video:
        raise SampleError("unreadable", "the bytes are not a video in a supported container")
    with open_image(data) as image:
        return MediaSize("image", *_image_size(image), 1)


def open_image(data: bytes) -> Image.Image:
    """Opens an image with Pillow without decoding it. Formats that run programs or open other files are not supported.

    The size comes from the header and is not checked: call `check_area` before decoding. Opening a PNG decompresses its
    text chunks. Opening a GIF may allocate a buffer of the size of its first frame, with which Pillow clears this frame
    before it draws the second.

    Raises: SampleError, or MemoryError if opening takes too much memory.
    """
    try:
        if data.startswith((b"II", b"MM")):
            _check_tiff_tables(data)
        return Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
    except UnidentifiedImageError as error:
        raise SampleError("unreadable", "the bytes are not an image in a supported format") from error
    except (SampleError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise many types for malformed headers
        raise SampleError("unreadable", f"the image cannot be opened: {reason(error)}") from error


def _check_tiff_tables(data: bytes) -> None:
    """Checks the number of strips and tiles, for each of which Pillow creates a Python object when it opens a TIFF.

    Close to the memory limit of the process, opening does not fail but becomes slow: 2.5 million strips take 8 s, 4
    million (32 MB) more than 3 minutes (measured).

    Raises: SampleError for tables larger than any image needs.
    """
    big = data[2:3] == b"+"  # Pillow's test for BigTIFF
    order = "<" if data.startswith(b"II") else ">"
    entry = struct.Struct(order + ("HHQ8x" if big else "HHI4x"))
    with suppress(struct.error):  # not a TIFF, which Pillow reports
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        (entries,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
        start += 8 if big else 2
        for at in range(start, min(start + entries * entry.size, len(data) - entry.size + 1), entry.size):
            tag, kind, count = entry.unpack_from(data, at)
            read = tag < _PRIVATE_TAGS or tag in _TIFF_DIRECTORIES
            if read and count > _MAX_TIFF_VALUES and (kind not in _TIFF_TEXT or tag in _TIFF_TABLES):
                detail = f"the TIFF's tag {tag} has {count} values (limit {_MAX_TIFF_VALUES})"
                raise SampleError("too_large", f"{detail}; store it in larger strips or tiles")


def orientation_of(image: Image.Image) -> int | None:
    """Returns the EXIF orientation, 1 to 8, from the metadata before the pixels; None for a TIFF, which Pillow rotates
    itself.

    Planning and decoding both use this function, so that they agree.
    """
    if image.format == "TIFF":
        return None
    try:
        # The getexif of the PNG plugin would decode the image to find chunks after the pixels.
        found = Image.Image.getexif(image).get(ORIENTATION_TAG)
    except MemoryError:
        raise
    except Exception:  # the pixels are valid even if the EXIF block is not
        return 1
    return int(found) if found in ORIENTATIONS else 1


def _image_size(image: Image.Image) -> tuple[int, int]:
    """Returns (height, width) after EXIF orientation."""
    return display_size(image.height, image.width, orientation_of(image) or 1)
