"""Elastic checkpoints beyond one folder: on S3, and in files that several ranks share."""

__all__ = ["shared_file", "store"]
