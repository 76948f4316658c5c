"""What the commands `univitar-ds data ...` show of shards and of what a run would read from them."""

__all__ = ["inspect", "inspect_plot", "media_report", "verify"]
