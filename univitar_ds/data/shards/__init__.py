"""Shards: which a run reads, where each sample lies in its tar, and what its texts say."""

__all__ = [
    "captions",
    "contents",
    "index_cache",
    "line_watch",
    "listing",
    "manifest",
    "samples",
    "sources",
    "tar_index",
]
