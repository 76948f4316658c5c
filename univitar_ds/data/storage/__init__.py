"""Reads files from local paths and S3, with a local cache of remote shards, and uploads files to S3."""

__all__ = ["address", "base", "cache_dir", "local", "parallel", "s3", "s3_upload", "session", "streams"]
