"""Decodes media into memory shared with the trainer, in separate processes, since a file may crash a decoder."""

__all__ = ["children", "decode_job", "pipeline", "shared_slots", "task_pool"]
