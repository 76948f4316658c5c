"""Planning of a run: checks before it starts, and predicted batch sizes, parameters, memory and step time."""

__all__ = ["checks", "deepspeed_auto", "gpus", "memory", "report", "sizes", "step_time"]
