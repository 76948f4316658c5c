"""The training of a run: `loop.train` joins engine, step, checkpoints and logs."""

__all__ = ["callbacks", "fp8", "loop"]
