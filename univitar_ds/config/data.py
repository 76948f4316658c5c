"""Configuration of the sources and of reading them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from univitar_ds.config.paths import PathText
from univitar_ds.config.section import Positive, Section, check_templates
from univitar_ds.expressions import Condition


class TableConfig(Section):
    """Columns of a source that is a table, a folder of tables or an imagefolder; see `univitar-ds data pack --help`."""

    image_key: str | None = Field(
        None, description="column of images or videos, or of their paths; absent: usual names are tried"
    )
    caption_keys: list[str] = Field(
        default_factory=list, description="columns of captions; empty: usual names are tried"
    )
    label_key: str | None = Field(None, description="column of labels; absent: usual names are tried")
    split_key: str | None = Field(None, description="column of splits; absent: usual names are tried")
    images: PathText | None = Field(None, description="folder of the files; absent: the folder of the table")


class SourceConfig(Section):
    """Shards to read: a folder packed by `univitar-ds data pack`, a tar, or a brace range of tars; local or s3://.

    A source may also be anything on this machine that `data pack` reads: class folders, a table, an imagefolder, COCO's
    captions and others. It is packed when the run is created, into `data.cache.folder`, or else into the folder
    `output`.
    """

    path: PathText = Field(
        description="packed folder, folder of tars, tar, or brace range such as shards/{000..127}.tar, local or s3://; "
        "or a local folder or table that `data pack` reads, which the run packs once"
    )
    split: str | None = Field("train", description="split of a packed folder; not used for bare tars")
    name: str | None = Field(
        None, description="name of the source in stages.N.weights; absent: the last part of the path"
    )
    templates: list[str] = Field(
        default_factory=list, description="captions of samples that have only a label; the label replaces {}"
    )
    captions: Literal["one", "lines"] = Field(
        "one", description="content of a .txt: one caption, or one per line; each epoch draws one of the lines"
    )
    class_names: PathText | None = Field(
        None,
        description="text file with one class name per line, the first for label 0; or numbered lines, or JSON; "
        "absent: labels are class names",
    )
    table: TableConfig | None = Field(None, description="columns of a table, which is packed when the run is created")
    hold_out: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="share of the samples that is held out for evaluation, such as 0.05, of data without splits: split "
        "test reads these samples, split train the others; the same in data.sources and evaluation.sources",
    )
    where: str | None = Field(
        None,
        description="condition that samples must meet, such as 'json.similarity > 0.3 and width >= 256'; other "
        "samples, and those that lack a field, are left out and counted. Fields: json.NAME (of its .json), width and "
        "height (px, of the file), frames, duration_s (0 for an image), caption_length (characters of its first "
        "caption), label (text). The tokenizer and the classes of a run are made from all samples",
    )

    @field_validator("where")
    @classmethod
    def _is_a_condition(cls, text: str | None) -> str | None:
        return None if text is None else Condition(text).text

    @model_validator(mode="after")
    def _templates_and_split_fit(self) -> SourceConfig:
        check_templates(self.templates)
        if self.hold_out is not None and self.split is None:
            raise ValueError("hold_out with split null would read both parts; set split to train or test")
        return self

    @property
    def label(self) -> str:
        """The name of the source in `stages.N.weights`."""
        return self.name or self.path.rstrip("/").rpartition("/")[2]


class S3Config(Section):
    """Settings of s3:// storage. boto3 finds the credentials in the environment, profiles or instance roles."""

    endpoint_url: str | None = Field(None, description="URL of a store other than AWS, e.g. http://127.0.0.1:9000")
    profile: str | None = Field(None, description="a profile of ~/.aws/config")
    region: str | None = Field(None, description="region of the bucket; absent: boto3 finds it")
    idle_timeout_s: Annotated[float, Field(gt=0)] = Field(
        20.0, description="seconds of silence, or of less than 64 KiB per second, after which a connection is replaced"
    )
    give_up_s: Annotated[float, Field(gt=0)] = Field(
        300.0, description="seconds of failures or almost no data after which a request ends the run"
    )
    prefetch_shards: Annotated[int, Field(ge=0)] = Field(1, description="shards prefetched per lane")


class CacheConfig(Section):
    """Settings of the local copies of remote shards."""

    folder: Annotated[PathText, Field(min_length=1)] | None = Field(
        None,
        description="folder of the copies, kept between runs and shared by processes; absent: a private folder, "
        "removed at the end. Shards that a run packs are also kept here, outside of limit_gb (absent: in `output`), "
        "so all nodes must see the folder then",
    )
    limit_gb: Annotated[float, Field(gt=0)] = Field(
        20.0, description="maximum size; the least recently used shards are removed first"
    )


class DataConfig(Section):
    """Settings of the sources and of reading them."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)] = Field(
        description="shards to train on; stages.N.weights sets their shares, else every sample is read once an epoch"
    )
    lanes: Positive = Field(
        4,
        description="number of independent streams of packs and of packs in a step; divisible by the number of "
        "processes; each process accumulates the gradients of lanes / processes packs (GradCache: one loss over all "
        "pairs of the step)",
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        1, description="decoding processes per rank; 0: decode in the trainer, without limits for hostile files"
    )
    prefetch_packs: Positive | None = Field(
        None, description="packs decoded ahead per rank; absent: about 3, on a GPU at least the packs of a step"
    )
    pool_samples: Positive = Field(192, description="samples from which a lane chooses to fill a pack")
    attention_cost: Annotated[float, Field(gt=0)] = Field(
        2.0,
        description="time of attention per FLOP, as a multiple of that of the encoder's other operations; predicts "
        "the time of items if stages.N.cost_budget_tflops is auto",
    )
    max_image_px: Positive = Field(
        100_000_000,
        description="maximum pixels of a frame; the memory to decode an image is limited to 10.7 bytes times this "
        "number, at least 1 GiB; a larger sample is bad",
    )
    decode_timeout_s: Annotated[float, Field(gt=0)] = Field(
        30.0, description="maximum seconds of CPU to decode one video"
    )
    max_sample_mb: Positive = Field(1024, description="a larger sample is bad")
    max_video_s: Annotated[float, Field(gt=0)] = Field(3600.0, description="a longer video is a bad sample")
    on_bad: Literal["skip", "fail"] = Field("skip", description="skip bad samples, or end the run at the first one")
    max_bad_per_thousand: Annotated[int, Field(ge=0)] = Field(
        100, description="maximum number of bad samples among a thousand of one lane; more end the run"
    )
    max_bad_in_a_row: Positive = Field(64, description="maximum number of bad samples in a row; more end the run")
    worker_restarts: Annotated[int, Field(ge=0)] = Field(
        10, description="maximum number of restarts of decoding processes"
    )
    accept_changed_sources: bool = Field(
        False, description="resume even if the shards differ from those of the checkpoint"
    )
    s3: S3Config = Field(S3Config(), description="access to s3:// sources")
    cache: CacheConfig = Field(CacheConfig(), description="local copies of s3:// shards")
    log_samples: bool = Field(False, description="write samples-rank*.jsonl: step, lane and sample keys")
