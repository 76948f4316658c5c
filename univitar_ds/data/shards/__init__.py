"""Shards: listing the shards of a run, finding the samples in each tar, and reading captions and labels."""

__all__ = [
    "captions",
    "class_names",
    "hold_out",
    "index_cache",
    "line_watch",
    "listing",
    "manifest",
    "samples",
    "sources",
    "tar_index",
]
