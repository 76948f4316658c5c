"""Configuration of the model and of the training objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.paths import PathText
from univitar_ds.config.section import NAME_LIMIT, NAME_PATTERN, Checkpointing, EncoderSize, Positive, Section
from univitar_ds.errors import CheckpointError
from univitar_ds.plugins import OBJECTIVES


class TextConfig(Section):
    """Settings of the text tower: a CLIP-style causal transformer from scratch, or weights from a local folder."""

    path: PathText | None = Field(None, description="folder of a transformers text model with tokenizer.json")
    hidden_size: Positive = Field(256, description="width; divisible by heads")
    layers: Positive = Field(4, description="number of blocks")
    heads: Positive = Field(4, description="number of attention heads")
    intermediate_size: Positive = Field(1024, description="width of the feed-forward layers")
    context_length: Annotated[int, Field(ge=4)] = Field(48, description="maximum length of a caption in tokens")
    vocab_size: Annotated[int, Field(ge=260)] = Field(
        8192, description="maximum size of a trained vocabulary; at least 260: 256 bytes and 4 special tokens"
    )
    tokenizer: PathText | None = Field(
        None, description="tokenizer.json; absent: that of path, else one trained on the captions"
    )
    frozen: bool = Field(False, description="train no parameter of the text tower in any stage; for weights from path")

    @model_validator(mode="after")
    def _heads_divide(self) -> TextConfig:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by heads {self.heads}")
        return self


class EncoderShape(Section):
    """Shape of an encoder without a name here; keys and defaults are those of the public release's config.json."""

    hidden_size: Positive = Field(description="width, divisible by 4 times num_attention_heads")
    num_hidden_layers: Positive = Field(description="number of blocks")
    num_attention_heads: Positive = Field(description="number of heads; hidden_size / heads is divisible by 4")
    intermediate_size: Annotated[int, Field(ge=2)] = Field(
        description="width of an MLP with the same number of parameters; SwiGLU's matrices have two thirds of it"
    )
    qkv_bias: bool = Field(False, description="biases of the query, key and value projections")
    qk_normalization: bool = Field(True, description="RMSNorm of queries and keys, which keeps attention logits small")
    patch_embedding_bias: bool = Field(True, description="bias of the patch embedding")
    spatial_merge_size: Positive = Field(1, description="tokens are ordered in blocks of this many rows and columns")

    @model_validator(mode="after")
    def _possible(self) -> EncoderShape:
        try:
            EncoderConfig(**self.model_dump())
        except CheckpointError as error:
            raise ValueError(str(error).removesuffix(" Correct its config.json.")) from None
        return self


class ModelConfig(Section):
    """Settings of both towers and of their joint embedding."""

    encoder: EncoderSize | EncoderShape | None = Field(
        None, description="tiny, 0.3b, 0.6b, 1b, or a shape; absent: the shape of init_from, or tiny"
    )
    init_from: PathText | None = Field(
        None, description="model to start from: an export, a run, another folder with weights, s3://, or a hub name"
    )
    init_part: Literal["encoder", "model"] = Field(
        "encoder",
        description="what is taken from init_from: its encoder, or the whole model with text tower, tokenizer, pooling "
        "and projections",
    )
    layer_scale_init: Annotated[float, Field(gt=0)] = Field(
        0.1,
        description="initial LayerScale, the factor of residual branches; 0.1 as in the public release, 1 in recipes "
        "of tiny",
    )
    attention: Literal["auto", "flash", "flash2", "flash3", "flash4", "varlen", "sdpa"] = Field(
        "auto",
        description="flash: best installed flash-attn; flash2 to 4: that version; varlen: torch; sdpa: item by item",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="compile token-wise operations on a CPU; auto: for encoders that gain more than compiling costs",
    )
    fp8: bool = Field(
        False,
        description="matrix products of blocks in 8-bit floating point while training, by torchao (extra `fp8`); needs "
        "L40S, H100 or newer; emulated on a CPU",
    )
    checkpoint_every: Checkpointing = Field(
        0,
        description="activation checkpointing: 0 none, 1 every block, k every k-th block; selective: every block, but "
        "matrix products and attention are kept; auto: the least that fits on a GPU, in each stage; 0 on a CPU",
    )
    tensor_parallel: Positive = Field(
        1,
        description="ranks that share the weights of each block (extra `megatron`); divides the ranks, the encoder's "
        "heads and its feed-forward width",
    )
    sequence_parallel: Positive = Field(
        1, description="ranks that share the tokens of each pack; divides the ranks and the encoder's heads"
    )
    pool_heads: Positive = Field(4, description="heads of the attention pooling")
    embed_dim: Positive = Field(256, description="width of the joint embedding of images, videos and texts")
    logit_scale_init: Annotated[float, Field(gt=0)] = Field(
        10.0, description="initial factor of the cosine similarities, which is learned; 10 as in SigLIP"
    )
    logit_bias_init: float = Field(
        -10.0, description="initial bias of the logits, which is learned; -10 as in SigLIP: most pairs are negative"
    )
    text: TextConfig = Field(TextConfig(), description="text tower and tokenizer")

    @model_validator(mode="after")
    def _whole_model_has_a_source(self) -> ModelConfig:
        if self.init_part == "model" and self.init_from is None:
            raise ValueError("init_part is model and init_from is absent; name the model to start from")
        if self.init_part == "model" and self.text.path is not None:
            raise ValueError("init_part is model, so init_from brings the text tower; leave text.path out")
        return self


class TeacherConfig(Section):
    """Settings of the teacher, a frozen vision model whose features the encoder learns to match."""

    path: PathText = Field(
        description="folder or hub name of a DINOv2, DINOv3, SigLIP or SigLIP 2 model, or folder of an exported encoder"
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="dtype of the teacher's weights and features")
    patch_loss: Literal["cosine", "smooth_l1"] = Field("cosine", description="loss between features of patches")
    pooled_loss: Literal["cosine", "smooth_l1"] = Field("cosine", description="loss between features of whole items")
    patch_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="weight of patch_loss, times the weight stages.N.distill of the stage"
    )
    pooled_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="weight of pooled_loss, times the weight stages.N.distill of the stage"
    )
    partitioned: bool = Field(False, description="shard the weights over the ranks; else each rank has all weights")
    cache: PathText | None = Field(
        None, description="folder for features, 2 to 4 bytes per token and feature; nothing is evicted"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TeacherConfig:
        if self.partitioned and self.cache is not None:
            raise ValueError(
                f"cache {self.cache} lets ranks skip the teacher at different steps, but partitioned needs all of "
                "them; choose one"
            )
        if not self.patch_weight and not self.pooled_weight:
            raise ValueError("patch_weight and pooled_weight are both 0; raise one or remove the teacher")
        return self


class ClassificationConfig(Section):
    """Settings of the classification loss. Items of a pack are mixed if they have the same size and data set."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of the target that is spread evenly over the classes of an item's set"
    )
    mixup: Annotated[float, Field(ge=0)] = Field(
        0.0, description="average two items: parameter of the beta distribution of their shares; 0: off"
    )
    cutmix: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="replace a rectangle of an item by that of another: parameter as for mixup; with both, one is "
        "drawn for each pair of items",
    )


class ObjectiveConfig(Section):
    """Settings of the loss and of the distillation."""

    kind: Annotated[str, Field(pattern=NAME_PATTERN, max_length=NAME_LIMIT)] = Field(
        "sigmoid",
        description="sigmoid: the recipe's loss; softmax converges faster with a few dozen items per step; "
        "classification: a linear head learns the labels, without a text tower; or the name of a plugin's objective",
        json_schema_extra={"examples": list(OBJECTIVES)},
    )
    classification: ClassificationConfig = Field(
        ClassificationConfig(), description="label smoothing and mixing, for kind classification"
    )
    chunk: Positive = Field(1024, description="texts compared at a time; limits the memory of the loss")
    grad_cache_keep: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="packs of a process that run once in a step instead of twice; the activations of these packs are "
        "in memory together. auto: as many as fit on a GPU, 1 on a CPU; 0: every pack runs twice. It changes no result",
    )
    same_caption_positive: bool = Field(False, description="identical captions in one step count as positives")
    teacher: TeacherConfig | None = Field(
        None, description="teacher of the distillation loss, whose weight is stages.N.distill"
    )

    @property
    def classifies(self) -> bool:
        """Whether the model is a classifier without a text tower."""
        return self.kind == "classification"

    @model_validator(mode="after")
    def _teacher_sees_the_same(self) -> ObjectiveConfig:
        mixing = self.classification
        if self.classifies and self.teacher is not None and (mixing.mixup or mixing.cutmix):
            raise ValueError(
                f"mixup {mixing.mixup:g} and cutmix {mixing.cutmix:g} change what the student sees, but not what the "
                "teacher sees; set both to 0 or remove teacher"
            )
        return self
