"""The data pipeline. `loader.PackLoader` reads, plans, decodes and collates; it yields `batch.PackedBatch`.

Terms:
    sample: an image or a video with its texts. A sample in a pack is an item.
    shard: a tar file of samples. A source (`data.sources`) names one shard or more.
    stage: a part of a run with its own resolution, budgets and source weights (`stages`).
    group: the shards that a stage reads with one weight: those of one source, or all if the stage has no weights.
    lane: a deterministic, endless stream of packs. Every rank owns some of the `data.lanes` lanes of a run.
    stream: the part of a lane that has one modality.
    unit: a shard, or every n-th sample of a shard, that a lane reads in one epoch.
    shuffle buffer: samples that a stream has read and not yet put into a pack, at least `data.pool_samples`.
    pack: a micro-batch of one modality without padding, within a token budget. A plan is a pack before decoding.
    cursor: the position of a lane after a pack, which checkpoints store.

Sub-packages, from the lowest layer: `storage` and `media`, `shards` and `decoding`, `sampler`, `importing` and
`writing`, `tools`.
"""

__all__ = ["batch", "caption_texts", "collate", "contents", "labels", "loader", "shared_listing", "usable_texts"]
