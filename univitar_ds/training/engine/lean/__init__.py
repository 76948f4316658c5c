"""What DeepSpeed's ZeRO-3 does between messages, in few Python calls for each parameter."""

__all__ = ["gradient_buckets", "hooks", "weight_fetching"]
