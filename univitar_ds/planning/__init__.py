"""What a run will do: checks before it starts, sizes of its packs, model and checkpoints, and a report of all that."""

__all__ = ["batch", "checks", "deepspeed_auto", "gpus", "memory", "report", "samples", "sizes", "step_time"]
