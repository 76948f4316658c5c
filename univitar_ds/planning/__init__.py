"""Planning of a run before it starts: checks, choice of the DeepSpeed configuration, and predicted memory and time."""

__all__ = ["checks", "deepspeed_auto", "gpus", "memory", "report", "sizes", "step_time"]
