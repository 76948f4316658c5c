"""Lists the samples of data sets in common formats; see `recognise.read_source`."""

__all__ = ["from_plugins", "parquet", "recognise", "records", "rows", "table_files"]
