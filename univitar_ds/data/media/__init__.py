"""Images and videos as bytes: what their headers say, and their pixels.

What only reads images never imports FFmpeg.
"""

__all__ = [
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
