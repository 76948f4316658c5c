"""Where samples come from and how they are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from univitar_ds.config.paths import PathText
from univitar_ds.config.section import Positive, Section, check_templates


class SourceConfig(Section):
    """Shards to read: a folder packed by `univitar-ds data pack`, one tar, or a brace range of tars, local or s3://."""

    path: PathText
    split: str | None = Field("train", description="split of a packed folder; not used for bare tars")
    name: str | None = Field(None, description="its name in stages.N.weights; absent: the last part of the path")
    templates: list[str] = Field(
        default_factory=list, description="captions for samples that have only a label, which replaces {}"
    )
    captions: Literal["one", "lines"] = Field(
        "one", description="content of a .txt: one caption, or one per line, of which each epoch draws one"
    )
    class_names: PathText | None = Field(
        None,
        description="a text file: its first line names label 0, the next label 1, ...; or numbered lines, or JSON; "
        "absent: labels are names",
    )

    @model_validator(mode="after")
    def _templates_hold_the_label(self) -> SourceConfig:
        check_templates(self.templates)
        return self

    @property
    def label(self) -> str:
        """The name of the source in `stages.N.weights`."""
        return self.name or self.path.rstrip("/").rpartition("/")[2]


class S3Config(Section):
    """How s3:// is reached. boto3 finds the credentials: environment, profiles, instance roles."""

    endpoint_url: str | None = Field(None, description="of a store other than AWS, e.g. http://127.0.0.1:9000")
    profile: str | None = Field(None, description="a profile of ~/.aws/config")
    region: str | None = None
    idle_timeout_s: Annotated[float, Field(gt=0)] = Field(
        20.0, description="a connection that is silent for longer, or delivers less than 64 KiB a second, is replaced"
    )
    give_up_s: Annotated[float, Field(gt=0)] = Field(
        300.0, description="a request that fails or delivers almost nothing for so long ends the run"
    )
    prefetch_shards: Annotated[int, Field(ge=0)] = Field(1, description="shards prefetched in each lane")


class CacheConfig(Section):
    """Local copies of remote shards."""

    folder: Annotated[PathText, Field(min_length=1)] | None = Field(
        None, description="kept between runs and shared by processes; absent: a private one, removed at the end"
    )
    limit_gb: Annotated[float, Field(gt=0)] = Field(
        20.0, description="the least recently used shards are removed first"
    )


class DataConfig(Section):
    """Where samples come from and how they are read."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    lanes: Positive = Field(4, description="independent streams of packs; the world size must divide it")
    workers: Annotated[int, Field(ge=0)] = Field(
        1, description="decoding processes per rank; 0 decodes in the trainer, where nothing limits a hostile file"
    )
    prefetch_packs: Positive | None = Field(
        None, description="packs decoded ahead per rank; absent: about 3, on a GPU at least those of a step"
    )
    pool_samples: Positive = Field(192, description="samples among which a lane chooses when it fills a pack")
    max_image_px: Positive = Field(
        100_000_000,
        description="a frame with more pixels is a bad sample, as is an image whose decoding may take more than "
        "10.7 bytes for each of these (1 GiB at least)",
    )
    decode_timeout_s: Annotated[float, Field(gt=0)] = Field(
        30.0, description="longest decoding of one video, in seconds of CPU"
    )
    max_sample_mb: Positive = Field(1024, description="a sample with more bytes is bad")
    max_video_s: Annotated[float, Field(gt=0)] = Field(3600.0, description="a longer video is a bad sample")
    on_bad: Literal["skip", "fail"] = Field("skip", description="what happens when a sample cannot be read")
    max_bad_per_thousand: Annotated[int, Field(ge=0)] = Field(
        100, description="more unreadable samples of a thousand in one lane end the run"
    )
    max_bad_in_a_row: Positive = Field(64, description="more unreadable samples in a row end the run")
    worker_restarts: Annotated[int, Field(ge=0)] = Field(
        10, description="how often decoding processes that died are restarted in all"
    )
    accept_changed_sources: bool = Field(
        False, description="resume although the shards differ from those of the checkpoint"
    )
    s3: S3Config = S3Config()
    cache: CacheConfig = CacheConfig()
    log_samples: bool = Field(False, description="write samples-rank*.jsonl: step, lane and sample keys")
