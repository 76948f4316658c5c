"""A trained model as one class, which maps images, videos and texts to embeddings and probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor, nn

from univitar_ds.classes import ClassList, Span
from univitar_ds.errors import UserError
from univitar_ds.evaluation.embed import embed_texts
from univitar_ds.evaluation.zero_shot import class_vectors
from univitar_ds.formats.recognise import open_stored
from univitar_ds.formats.run import Weights
from univitar_ds.formats.stored_model import JointConfig, StoredModel
from univitar_ds.geometry import token_count
from univitar_ds.inference.trained_head import classifies, trained_head
from univitar_ds.model.classification import ClassificationModel, class_logits
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.model.from_stored import build_encoder, build_model
from univitar_ds.preprocessing import Preprocessor
from univitar_ds.tokenization import tokenizer_of

Item = Image.Image | Sequence[Image.Image]
"""An image, or a video as a list of frames (an even number, of equal size)."""
TEMPLATES = ("a photo of a {}.",)
"""Default sentences for class names."""
TOKENS_AT_ONCE = 16384
"""Default maximum number of tokens in a pack, unless one item has more."""


class Features(NamedTuple):
    """Features of N items.

    `tokens`: a list of (t_i, D) with the t_i = t*h*w tokens of an item in the order of its grid; `pooled`: (N, D), by
    the attention pooling of the model, or the mean of the tokens of an encoder alone; `grid_thw`: (N, 3) int64 on the
    host.
    """

    tokens: list[Tensor]
    pooled: Tensor
    grid_thw: Tensor


class UniViTARModel(nn.Module):
    """A trained model with its preprocessing: with two towers and a tokenizer, a classifier with its `classes`, or an
    encoder alone (`joint` and `classes` are None).

    Items of any size and number are packed into batches by number of tokens. Methods compute no gradients.

        model = UniViTARModel.from_pretrained("runs/photos")
        model.zero_shot([image], ["cat", "dog"])          # (1, 2) probabilities
        model = UniViTARModel.from_pretrained("runs/labels")  # objective.kind: classification
        model.classify([image]), model.class_names()      # (1, C) probabilities, C names
    """

    def __init__(
        self,
        module: ContrastiveModel | ClassificationModel | UniViTAR,
        preprocessor: Preprocessor,
        joint: JointConfig | None = None,
        classes: ClassList | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.preprocessor = preprocessor
        self.joint = joint
        self.classes = classes
        self._tokenizer = None if joint is None else tokenizer_of(joint.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        weights: Weights | None = None,
        dtype: torch.dtype | None = None,
        attention: str = "auto",
    ) -> Self:
        """Opens a model in evaluation mode, on the CPU.

        Args:
            source: a folder in any format of `univitar-ds convert`, the folder of a run or of one of its checkpoints,
                an s3:// address, or a name on the Hugging Face hub (owner/name).
            weights: "trained" or "averaged", for a run; None: the average if the run keeps one.
            dtype: None: as stored.
            attention: back end, see `config.model`.
        Raises: CheckpointError if the source cannot be found, or is incomplete or damaged.
        """
        stored = open_stored(source, weights)
        if classifies(stored):
            head = trained_head(stored, weights, dtype, attention)
            return cls(head.module, Preprocessor(stored.encoder), classes=head.classes).eval()
        return cls.of(stored if dtype is None else stored.converted(dtype), attention=attention)

    @classmethod
    def of(cls, stored: StoredModel, *, attention: str = "auto") -> Self:
        """Builds the model from a stored one. Raises: CheckpointError as `from_pretrained`."""
        if stored.joint is None:
            return cls(build_encoder(stored, attention=attention), Preprocessor(stored.encoder)).eval()
        return cls(build_model(stored, attention=attention), Preprocessor(stored.encoder), stored.joint).eval()

    @property
    def encoder(self) -> UniViTAR:
        """The encoder, which maps packed patches to packed tokens."""
        return self.module if isinstance(self.module, UniViTAR) else self.module.vision

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @torch.no_grad()
    def features(self, items: Sequence[Item], *, tokens_at_once: int = TOKENS_AT_ONCE) -> Features:
        """Returns token and pooled features of images and videos, on the model's device.

        Args: tokens_at_once: maximum number of tokens of a pack, unless one item has more.
        Raises: UserError if an item is not an image or video.
        """
        tokens: list[Tensor] = []
        pooled, grids = [], []
        for pixels, frames, part in self._packs(items, tokens_at_once):
            out = self.encoder(pixels, part, frames=frames)
            lengths = [token_count(grid) for grid in part]
            tokens += out.split(lengths)
            pooled.append(self.pool(out, lengths))
            grids += part
        return Features(tokens, torch.cat(pooled), torch.tensor(grids))

    def pool(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Returns pooled features of items, (N, D), as in `Features`. Args: tokens: (T, D); lengths: of each item."""
        if not isinstance(self.module, UniViTAR):
            return self.module.pool(tokens, lengths)
        return torch.stack([one.mean(dim=0) for one in tokens.split(lengths)])

    @torch.no_grad()
    def intermediates(
        self,
        items: Sequence[Item],
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        tokens_at_once: int = TOKENS_AT_ONCE,
    ) -> list[list[Tensor]]:
        """Returns the outputs of some blocks of the encoder: a list for each index with a tensor for each item.

        A tensor is a map (t, D, h, w) with "NCHW", where an image has t = 1, or tokens (t*h*w, D) with "NLC".

        Args: indices, norm, output_fmt: see `UniViTAR.forward_intermediates`; tokens_at_once: see `features`.
        Raises: UserError if a block or format does not exist, or an item is not an image or video.
        """
        found: list[list[Tensor]] = []
        for pixels, frames, part in self._packs(items, tokens_at_once):
            outputs = self.encoder.forward_intermediates(
                pixels, part, indices, frames=frames, norm=norm, output_fmt=output_fmt, intermediates_only=True
            )
            if output_fmt == "NLC":
                outputs = [output.split([token_count(grid) for grid in part]) for output in outputs]
            found = found or [[] for _ in outputs]
            for one, output in zip(found, outputs, strict=True):
                one += output
        return found

    @torch.no_grad()
    def attention_maps(
        self, items: Sequence[Item], layer: int = -1, *, tokens_at_once: int = TOKENS_AT_ONCE
    ) -> list[Tensor]:
        """Returns the attention probabilities of a block of the encoder, (H, t_i, t_i) for each item.

        Args: layer: see `UniViTAR.attention_maps`; tokens_at_once: see `features`.
        Raises: UserError if the block does not exist, or an item is not an image or video.
        """
        packs = self._packs(items, tokens_at_once)
        return [
            one
            for pixels, frames, part in packs
            for one in self.encoder.attention_maps(pixels, part, layer, frames=frames)
        ]

    @torch.no_grad()
    def encode_image(self, items: Sequence[Item], *, tokens_at_once: int = TOKENS_AT_ONCE) -> Tensor:
        """Returns the embeddings of images and videos, (N, E) float32 unit vectors on the model's device.

        Without items, N is 0.
        Raises: UserError if the model has no text tower, or an item is not an image or video.
        """
        model = self._whole("encode_image")
        if isinstance(items, Sequence) and not items:
            return torch.empty(0, model.vision_proj.out_features, device=self.device)
        packs = self._packs(items, tokens_at_once)
        rows = [
            model.encode_vision(pixels, torch.tensor(frames), torch.tensor(grids)) for pixels, frames, grids in packs
        ]
        return torch.cat(rows)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Returns the embeddings of texts, (N, E) float32 unit vectors on the model's device.

        Long texts are truncated to the model's context length. Without texts, N is 0.
        Raises: UserError if the model has no text tower.
        """
        model = self._whole("encode_text")
        if isinstance(texts, str):
            raise UserError("encode_text takes a list of texts; put a single one in a list")
        if not texts:
            return torch.empty(0, model.text_proj.out_features, device=self.device)
        return embed_texts(model, self._tokenizer, texts, self.joint.context_length).to(self.device)

    @torch.no_grad()
    def similarity(self, image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
        """Returns the logits of all pairs, (N, M) float32: scale times cosine, plus the bias of a sigmoid objective.

        The sigmoid of a logit is the probability that the pair matches, if the model was trained with the sigmoid
        objective. With the softmax objective, a softmax over all texts gives the probabilities of an image's text.

        Args: image_embeddings: (N, E), of `encode_image`; text_embeddings: (M, E), of `encode_text`.
        Raises: UserError for other shapes, or if the model has no text tower.
        """
        model = self._whole("similarity")
        self._check_embeddings(image_embeddings=image_embeddings, text_embeddings=text_embeddings)
        logits = model.logit_scale.float().exp() * image_embeddings.float() @ text_embeddings.float().T
        return logits + model.logit_bias.float() if self.joint.objective == "sigmoid" else logits

    def zero_shot(
        self, items: Sequence[Item], class_names: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> Tensor:
        """Returns the probabilities of classes, (N, C) float32, whose rows sum to 1.

        The embedding of a class is the normalised mean of the embeddings of its sentences (CLIP's prompt ensemble). The
        probabilities are a softmax of scale times cosine over the given classes, for both objectives.

        Args: class_names: one column each; a name may be repeated, as in some data sets; templates: sentences with {}
            for the name.
        Raises: UserError if there are no classes, a template has no {}, or as `encode_image`.
        """
        classes = self.encode_classes(class_names, templates)
        return self.class_probabilities(self.encode_image(items), classes)

    def encode_classes(self, class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
        """Returns the embeddings of classes, (C, E) float32 unit vectors, see `zero_shot`.

        Raises: UserError if there are no classes, a template has no {}, or the model has no text tower."""
        if not class_names or isinstance(class_names, str):
            raise UserError("class_names is a list of at least one name; put a single one in a list")
        if isinstance(templates, str):
            raise UserError(f"templates is a list of sentences, got {templates!r}; put a single one in a list")
        lacking = [template for template in templates if "{}" not in template]
        if lacking or not templates:
            raise UserError(f"a template needs {{}} where the class name goes, got {lacking or 'no template'}")
        return class_vectors(class_names, templates, self.encode_text)

    @torch.no_grad()
    def classify(
        self, items: Sequence[Item], data_set: str | None = None, *, tokens_at_once: int = TOKENS_AT_ONCE
    ) -> Tensor:
        """Returns the probabilities of the classes of a classifier, (N, C) float32, whose rows sum to 1.

        Column i is the class `class_names(data_set)[i]`.
        Args: data_set: the data set of the classes, if the classifier was trained on several; tokens_at_once: see
            `features`.
        Raises: UserError as `class_names`, or if an item is not an image or video.
        """
        begin, end = self._span(data_set)
        packs = self._packs(items, tokens_at_once)
        logits = [
            class_logits(self.module, pixels, torch.tensor(frames), torch.tensor(grids))[:, begin:end]
            for pixels, frames, grids in packs
        ]
        return torch.cat(logits).softmax(dim=-1)

    def class_names(self, data_set: str | None = None) -> list[str]:
        """Returns the names of the classes of a classifier, in the order of the columns of `classify`.

        Raises: UserError if the model is not a classifier, `data_set` is unknown, or it is None and there are several.
        """
        self._span(data_set)
        return list(self.classes.names[self._set(data_set)])

    def _span(self, data_set: str | None) -> Span:
        if self.classes is None:
            raise UserError(
                "only a run of objective.kind classification has classes of its own; for others give names: "
                "zero_shot(items, class_names)"
            )
        return self.classes.spans[self._set(data_set)]

    def _set(self, data_set: str | None) -> str | None:
        """Returns the name of a data set of the classifier; None means its only one. Raises: UserError."""
        sets = list(self.classes.names)
        if data_set is None and len(sets) == 1:
            return sets[0]
        if data_set not in sets:
            raise UserError(f"data_set is {data_set!r}; the classifier has the classes of {', '.join(map(str, sets))}")
        return data_set

    @torch.no_grad()
    def class_probabilities(self, image_embeddings: Tensor, classes: Tensor) -> Tensor:
        """Returns the probabilities of classes, (N, C) float32, see `zero_shot`.

        Args: image_embeddings: (N, E); classes: (C, E), of `encode_classes`.
        Raises: UserError for other shapes, or if the model has no text tower.
        """
        scale = self._whole("class_probabilities").logit_scale.float().exp()
        self._check_embeddings(image_embeddings=image_embeddings, classes=classes)
        return (scale * image_embeddings @ classes.T).softmax(dim=-1)

    def _check_embeddings(self, **given: Tensor) -> None:
        for name, value in given.items():
            if value.ndim != 2 or value.shape[1] != self.joint.embed_dim:
                raise UserError(
                    f"{name} has the shape {tuple(value.shape)}; embeddings of this model are a matrix of width "
                    f"{self.joint.embed_dim}, a row each"
                )

    def _whole(self, method: str) -> ContrastiveModel:
        if not isinstance(self.module, ContrastiveModel):
            what = "an encoder alone" if self.classes is None else "a classifier"
            raise UserError(
                f"{method} needs a model with a text tower, and this is {what}; open a run with a text tower or its "
                "export/model, or use features()"
            )
        return self.module

    def _packs(
        self, items: Sequence[Item], tokens_at_once: int
    ) -> Iterator[tuple[Tensor, list[int], list[tuple[int, int, int]]]]:
        """Yields pixels on the model's device, numbers of frames, and grids of packs, in the order of the items."""
        if isinstance(items, Image.Image) or not items:
            raise UserError("a list of at least one image or video is needed; put a single one in a list")
        pixels: list[Tensor] = []
        frames: list[int] = []
        grids: list[tuple[int, int, int]] = []
        for item in items:
            one, count, grid = self.preprocessor.pixels([item])
            if grids and sum(map(token_count, grids)) + token_count(grid[0]) > tokens_at_once:
                yield torch.cat(pixels).to(self.device), frames, grids
                pixels, frames, grids = [], [], []
            pixels.append(one)
            frames += count
            grids += grid
        yield torch.cat(pixels).to(self.device), frames, grids
