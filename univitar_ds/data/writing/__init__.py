"""Packs images and videos into shards: `writer.pack_folder`, and for a run `packed_sources.with_packed_sources`."""

__all__ = ["examine", "packed_sources", "writer"]
