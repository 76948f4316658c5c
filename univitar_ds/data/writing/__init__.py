"""Packs a folder of images and videos into shards: `writer.pack_folder`."""

__all__ = ["writer"]
