"""`python -m univitar_ds.training.prebuild`: compiles DeepSpeed's CPU operation ahead of the first run."""

from __future__ import annotations

from univitar_ds.training.engine import prebuild

if __name__ == "__main__":
    prebuild()
