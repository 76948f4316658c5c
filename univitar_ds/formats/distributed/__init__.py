"""Checkpoints of distributed programs: DeepSpeed's own and universal ones, Megatron-Core's, and PyTorch's."""

__all__ = ["dcp", "deepspeed", "megatron", "universal"]
