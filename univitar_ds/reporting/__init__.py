"""A page of runs: `univitar-ds report RUN... --out report.html` writes one file that needs no network."""

__all__ = ["page"]
