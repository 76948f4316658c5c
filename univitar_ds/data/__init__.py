"""From shards to packs: `loader.PackLoader` reads, plans, decodes and collates; `batch.PackedBatch` is what it gives.

Rooms, from the lowest: `storage` and `media`, `shards` and `decoding`, `sampler` and `writing`, `tools`.
"""

__all__ = ["batch", "collate", "loader"]
