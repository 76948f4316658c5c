"""The HTML page of `univitar-ds report RUN... --out report.html`: one file that needs no network."""

__all__ = ["page", "page_file"]
