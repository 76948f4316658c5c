"""Lists the samples of data sets in the forms in which people have them: `recognise.read_source`."""

__all__ = ["from_plugins", "recognise", "rows"]
