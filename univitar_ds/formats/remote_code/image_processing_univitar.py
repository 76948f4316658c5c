"""Converts images and videos to packed patches, with Pillow and numpy only."""

import math
import struct

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes an image upright, by EXIF number."""
WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")


def load(image):
    """Decodes an image. Ignores Pillow's error for a text after the pixels of a PNG, when all pixels are decoded."""
    try:
        image.load()
    except ValueError as error:
        if "MAX_TEXT_" not in str(error) or getattr(image, "tile", True):
            raise


def to_rgb(image):
    """Returns the upright RGB image: transparency blended with white, greys of more than 8 bit scaled to 8 bit."""
    load(image)  # some formats rotate the image while loading and then remove the tag
    try:
        turn = ORIENTATIONS.get(image.getexif().get(ORIENTATION_TAG, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        turn = None  # the pixels may be intact although the metadata is broken
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = Image.fromarray(grey_to_8_bit(np.asarray(image))).convert("RGB")
    elif image.mode in WITH_ALPHA or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):  # Pillow converts premultiplied modes only to their plain form
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def grey_to_8_bit(values):
    """Scales greys (H, W) to 8 bit: by the range of their format if known, else by the range of the image."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    integral = values.dtype.kind != "f" or (values == np.rint(values)).all()
    values = values.astype(np.float64)
    if low < 0 or high > 65535:
        values = (values - low) * (255 / max(high - low, 1e-12))
    elif high > 255:
        values = values / 257
    elif not integral and high <= 1:
        values = values * 255
    return np.rint(values).astype(np.uint8)


def smart_resize(height, width, factor, min_pixels, max_pixels):
    """Returns the size nearest to (height, width) with sides divisible by `factor` and an area within the limits.

    Raises: ValueError if `max_pixels` is below factor * factor.
    """
    if factor * factor > max_pixels:
        raise ValueError(f"max_pixels {max_pixels} holds no {factor} x {factor} square; raise it or lower factor")
    if height < factor:
        height, width = factor, int(factor / height * width) + 1
    if width < factor:
        height, width = int(factor / width * height) + 1, factor
    rows, columns = round(height / factor), round(width / factor)
    area = rows * columns * factor * factor
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = math.floor(height / shrink / factor), math.floor(width / shrink / factor)
        cells = max_pixels // (factor * factor)
        rows = min(max(rows, 1), cells)
        columns = min(max(columns, 1), cells // rows)
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


class UniViTARImageProcessor(BaseImageProcessor):
    """Converts images, and videos as lists of frames, to the model's input.

    Options have the names and meanings of the encoder's config.json: `resolution_mode` is "native" (the aspect ratio is
    kept, sides are divisible by patch_size * spatial_merge_size * resize_factor, an item has min_tokens to max_tokens
    tokens) or the side of a square in pixels; `relarge_ratio` multiplies the sides before resizing.
    """

    model_input_names = ["pixel_values", "grid_thw"]

    def __init__(
        self,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=1,
        resize_factor=2,
        min_tokens=576,
        max_tokens=16384,
        relarge_ratio=1.0,
        resolution_mode="native",
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        **kwargs,
    ):
        """Many arguments because transformers passes each field of preprocessor_config.json by its name."""
        super().__init__(**kwargs)
        self.patch_size, self.temporal_patch_size = patch_size, temporal_patch_size
        self.spatial_merge_size, self.resize_factor = spatial_merge_size, resize_factor
        self.min_tokens, self.max_tokens, self.relarge_ratio = min_tokens, max_tokens, relarge_ratio
        self.resolution_mode, self.image_mean, self.image_std = resolution_mode, list(image_mean), list(image_std)

    def preprocess(self, images, return_tensors="pt"):
        """Prepares a pack.

        Args: images: a PIL image, or a list of images and videos; a video is a list of frames, one or an even number of
            equal size.
        Returns: BatchFeature with pixel_values (T, 1176) float32 and grid_thw (N, 3) int64.
        Raises: ValueError if there is no item, an item is something else, or a video has too many frames.
        """
        items = list(images) if isinstance(images, (list, tuple)) else [images]
        if not items:
            raise ValueError("the image processor takes at least one image or video")
        packed = [self._patches(self._upright(item, index)) for index, item in enumerate(items)]
        patches, grids = zip(*packed, strict=True)
        data = {"pixel_values": np.concatenate(patches), "grid_thw": np.array(grids, dtype=np.int64)}
        return BatchFeature(data, tensor_type=return_tensors)

    def _upright(self, item, index):
        frames = list(item) if isinstance(item, (list, tuple)) else [item]
        step = self.temporal_patch_size
        strange = [type(frame).__name__ for frame in frames if not isinstance(frame, Image.Image)]
        if strange:
            raise ValueError(f"item {index} has an object of type {strange[0]}; images and frames must be PIL images")
        if not frames:
            raise ValueError(f"item {index} is a video without frames; give one frame or a multiple of {step}")
        if len(frames) > 1 and len(frames) % step:
            raise ValueError(f"item {index} has {len(frames)} frames; give one frame or a multiple of {step}")
        frames = [to_rgb(frame) for frame in frames]
        sizes = sorted({frame.size for frame in frames})
        if len(sizes) > 1:
            raise ValueError(f"item {index} has frames of different sizes {sizes}; bring all frames to one size")
        return frames

    def _grid(self, frames):
        """Returns the numbers of tokens along time, height and width."""
        steps, patch = math.ceil(len(frames) / self.temporal_patch_size), self.patch_size
        if self.resolution_mode != "native":
            side = int(self.resolution_mode) // patch
            return steps, side, side
        width, height = (max(1, int(side * self.relarge_ratio)) for side in frames[0].size)
        factor = patch * self.spatial_merge_size * self.resize_factor
        least, most = self.min_tokens * patch * patch // steps, self.max_tokens * patch * patch // steps
        try:
            height, width = smart_resize(height, width, factor, least, most)
        except ValueError as error:
            raise ValueError(
                f"a video of {len(frames)} frames does not fit max_tokens {self.max_tokens} ({error}); "
                "give fewer frames"
            ) from error
        return steps, height // patch, width // patch

    def _patches(self, frames):
        """Returns the patches (t * h * w, 1176) of one item, each ordered (channel, frame, row, column), and its grid.

        Tokens are in blocks of merge x merge neighbours. An image is used as both frames of its tokens.
        """
        t, h, w = grid = self._grid(frames)
        patch, merge, step = self.patch_size, self.spatial_merge_size, self.temporal_patch_size
        resized = [frame.resize((w * patch, h * patch), Image.Resampling.BICUBIC) for frame in frames]
        pixels = np.stack([np.asarray(frame) for frame in resized] * (step if len(frames) == 1 else 1))
        mean, std = np.float32(self.image_mean), np.float32(self.image_std)
        values = (pixels / np.float32(255) - mean) / std
        values = values.reshape(t, step, h // merge, merge, patch, w // merge, merge, patch, 3)
        return values.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1), grid
