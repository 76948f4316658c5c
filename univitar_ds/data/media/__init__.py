"""Reads the headers of images and videos, and decodes them. Code that reads only images never imports FFmpeg."""

__all__ = [
    "augment",
    "containers",
    "frame_sampling",
    "image_decode",
    "jpeg_header",
    "memory_limits",
    "probe",
    "prober",
    "resize",
    "types",
    "video_decode",
]
