"""A folder of images and videos to shards: `writer.pack_folder`."""

__all__ = ["writer"]
