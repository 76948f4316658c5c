"""The commands `univitar-ds data inspect`, `probe` and `verify`, and the survey of a source for `univitar-ds init`."""

__all__ = ["inspect", "inspect_plot", "media_report", "survey", "verify"]
