"""Which samples come in which pack of which lane: a pure function of seed, lane and the shards."""

__all__ = ["bad_samples", "cursor", "lanes", "packing", "reader", "stream_config"]
