"""Use of a trained model: embeddings of images, videos and texts, and zero-shot classification."""

__all__ = ["classify", "embed_files", "model", "reading", "sources", "workers"]
