"""The commands `univitar-ds data inspect`, `probe` and `verify`."""

__all__ = ["inspect", "inspect_plot", "media_report", "verify"]
