"""What a run will do: checks before it starts, sizes of its packs, model and checkpoints, and a report of all that."""

__all__ = ["checks", "deepspeed_auto", "gpus", "memory", "report", "sizes", "step_time"]
