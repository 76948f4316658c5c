"""Reads Parquet tables: their records, and images and videos that are in the table itself."""

__all__ = ["media", "table"]
