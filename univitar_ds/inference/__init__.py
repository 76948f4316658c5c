"""The trained model for users: embeddings of images, videos and texts, and zero-shot classification."""

__all__ = ["model"]
