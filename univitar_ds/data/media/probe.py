"""The size of an image or video from its header, before anything is decoded.

The content decides what a file is; its name is only asked where the content leaves it open: an animated GIF
is an image, unless it is called .gifv (or by another name of a video), which makes it a video.
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
"""Where its strips and tiles lie and how long they are: numbers, whatever type the file gives them."""
_MOST_TIFF_VALUES = 1 << 20
_PRIVATE_TAGS, _TIFF_DIRECTORIES = 1 << 15, (34665, 34675, 34853)
"""Of tags from the first on, which anybody may define, Pillow keeps the bytes alone, but of these: EXIF, colour profile
and place."""
_TIFF_TEXT = (1, 2, 6, 7)
"""Types of a tag whose values stay bytes."""

# Pillow comments on every odd tag of a file; whatever matters about a sample is raised.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# Pillow's own limit of 178,956,970 pixels would override a higher data.max_image_px.
Image.MAX_IMAGE_PIXELS = None
# Pillow refuses an image for a text or colour profile of more than 1 MiB; here the process has a limit.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30


def probe(data: bytes, extension: str) -> MediaSize:
    """Kind and size of a media file.

    Args: the whole file; the extension of its name, with or without dot.
    Raises: SampleError if the header is no header of an image or video.
    """
    if not data:
        raise SampleError("unreadable", "the file is empty")
    if jpeg_header.is_jpeg(data):
        height, width = jpeg_header.read_header(data).display_size
        return MediaSize("image", height, width, 1)
    demuxer = video_demuxer(data)
    named_video = extension.lower().lstrip(".") in VIDEO_EXTENSIONS
    if demuxer is not None and (demuxer != "gif" or named_video):
        from univitar_ds.data.media.video_probe import probe_video  # FFmpeg's libraries take 17 MB

        return probe_video(data, demuxer)
    if named_video:
        raise SampleError("unreadable", "the bytes are no video container we read")
    with open_image(data) as image:
        return MediaSize("image", *_image_size(image), 1)


def open_image(data: bytes) -> Image.Image:
    """Pillow's lazily opened image, nothing decoded; formats that run programs or open files are left out.

    Its size is whatever the header says: who decodes it calls `check_area` before. Some is unpacked already:
    texts of a PNG, the area that the first frame of a GIF leaves to the second.

    Raises: SampleError, or MemoryError where that takes more than there is.
    """
    try:
        if data.startswith((b"II", b"MM")):
            _check_tiff_tables(data)
        return Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
    except UnidentifiedImageError as error:
        raise SampleError("unreadable", "the bytes are no image of a format we read") from error
    except (SampleError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise whatever a malformed header runs them into
        raise SampleError("unreadable", f"the image cannot be opened: {reason(error)}") from error


def _check_tiff_tables(data: bytes) -> None:
    """Pillow makes a Python object of each strip or tile when it opens a TIFF. Where so many small ones meet the limit
    of the process, it does not end but crawls: 2.5 million take 8 s, 4 million (32 MB) more than 3 minutes (measured).

    Raises: SampleError for tables that no image needs.
    """
    big = data[2:3] == b"+"  # which of them is big: as Pillow has it
    order = "<" if data.startswith(b"II") else ">"
    entry = struct.Struct(order + ("HHQ8x" if big else "HHI4x"))
    with suppress(struct.error):  # no TIFF: Pillow says so
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        (entries,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
        start += 8 if big else 2
        for at in range(start, min(start + entries * entry.size, len(data) - entry.size + 1), entry.size):
            tag, kind, count = entry.unpack_from(data, at)
            read = tag < _PRIVATE_TAGS or tag in _TIFF_DIRECTORIES
            if read and count > _MOST_TIFF_VALUES and (kind not in _TIFF_TEXT or tag in _TIFF_TABLES):
                detail = f"the TIFF's tag {tag} has {count} values, above {_MOST_TIFF_VALUES}"
                raise SampleError("too_large", f"{detail}; store it in larger strips or tiles")


def orientation_of(image: Image.Image) -> int | None:
    """EXIF orientation, 1 to 8, by what stands before the pixels; None for a TIFF, which Pillow turns by itself.

    Planning and decoding both ask here, so that they agree.
    """
    if image.format == "TIFF":
        return None
    try:
        # The PNG plugin's own getexif decodes the image to look for late chunks.
        found = Image.Image.getexif(image).get(ORIENTATION_TAG)
    except MemoryError:
        raise
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1
    return int(found) if found in ORIENTATIONS else 1


def _image_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after EXIF orientation."""
    return display_size(image.height, image.width, orientation_of(image) or 1)
