"""The run file: its sections, how it is read, and what its paths mean."""

__all__ = [
    "data",
    "deepspeed",
    "encoder",
    "load",
    "model",
    "paths",
    "run_folder",
    "schema",
    "section",
    "stage",
    "watch",
]
