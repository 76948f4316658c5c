"""Files by address, local or on S3, with local copies of remote shards."""

__all__ = ["address", "base", "local", "parallel", "s3", "s3_upload", "streams"]
