"""Features that are computed once, by several processes, and kept on disk: vectors of items, or all of their tokens."""

__all__ = ["averaged", "feature_cache", "token_cache"]
