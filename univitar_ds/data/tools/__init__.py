"""The commands `univitar-ds data inspect`, `probe` and `verify`, and the look at a source of `univitar-ds init`."""

__all__ = ["inspect", "inspect_plot", "media_report", "survey", "verify"]
