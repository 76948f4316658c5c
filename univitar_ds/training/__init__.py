"""The training of a run: `loop.train` joins engine, step, checkpoints and logs."""

__all__ = ["assembly", "callbacks", "fp8", "loop"]
