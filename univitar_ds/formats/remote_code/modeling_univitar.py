"""UniViTAR for transformers 5: the encoder of packed patches, and the two towers of a contrastive model.

Symbols in shapes: T tokens of a pack, N items of a pack, M texts, S tokens of a text, D hidden width, H heads, K head
width, E width of the joint space. All items of a pack are in one row of tokens, without padding.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel, PreTrainedModel, Siglip2TextModel, SiglipTextModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_univitar import UniViTARConfig, UniViTARSigmoidConfig, UniViTARVisionConfig


def eager_attention_forward(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    weights = (wide(query) @ wide(key).transpose(2, 3) * scaling).softmax(-1).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def packed_attention(module, q, k, v, q_lengths, k_lengths):
    """Attends within each item: (Tq, H, K), (T, H, K), (T, H, K) -> (Tq, H * K).

    Args: q_lengths, k_lengths: numbers of queries and of keys of each item.
    """
    name = module.config._attn_implementation
    # transformers searches the source for this call to find out whether the implementation can be chosen.
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    options = {"attention_mask": None, "scaling": module.scaling, "dropout": 0.0, "is_causal": False}
    if "flash" in name:
        for side, lengths in (("q", q_lengths), ("k", k_lengths)):
            ends = torch.tensor([0, *lengths], device=q.device).cumsum(0, dtype=torch.int32)
            options |= {f"cu_seq_lens_{side}": ends, f"max_length_{side}": max(lengths)}
        return attend(module, q, k, v, **options)[0][0].flatten(1)
    pieces = zip(q.split(q_lengths, 2), k.split(k_lengths, 2), v.split(k_lengths, 2), strict=True)
    return torch.cat([attend(module, *piece, **options)[0][0] for piece in pieces]).flatten(1)


def wide(x):
    """Returns `x` in float32, or unchanged if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def grid_lists(grid_thw):
    """Returns the grids as lists [t, h, w]. Raises: ValueError if they are not (N, 3) with at least one item."""
    grids = torch.as_tensor(grid_thw).tolist()
    if not grids or any(not isinstance(grid, list) or len(grid) != 3 for grid in grids):
        raise ValueError(f"grid_thw must be (N, 3) with at least one item, got {grids}")
    return grids


PADDED = {"siglip_text_model": SiglipTextModel, "siglip2_text_model": Siglip2TextModel}
"""Text models without a mask, which were trained on rows padded to full length, by `model_type`."""


class UniViTARRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(wide(x), self.weight.shape, self.weight.to(wide(x).dtype), self.eps).to(x.dtype)


class UniViTARPatchEmbedding(nn.Module):
    """Linear map of whole patches. The weight has the shape of the release's convolution."""

    def __init__(self, config):
        super().__init__()
        sides = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.num_channels, *sides))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size)) if config.patch_embedding_bias else None

    def forward(self, patches):
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class UniViTARAttention(nn.Module):
    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.heads, self.scaling = config.num_attention_heads, (width // config.num_attention_heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        norm = partial(UniViTARRMSNorm, width, config.layer_norm_eps) if config.qk_normalization else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x, cos, sin, lengths):
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        q = self.q_norm(rotate(q, cos, sin).flatten(1)).view_as(v).to(v.dtype)
        k = self.k_norm(rotate(k, cos, sin).flatten(1)).view_as(v).to(v.dtype)
        return self.proj(packed_attention(self, q, k, v, lengths, lengths))


def rotate(x, cos, sin):
    """Rotates the planes (i, i + K / 2) of each head: (T, H, K) -> (T, H, K) in float32 or wider."""
    first, second = wide(x).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class UniViTARMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.inner_size
        self.fc1, self.fc2, self.fc3 = nn.Linear(width, inner), nn.Linear(inner, width), nn.Linear(width, inner)
        self.norm = UniViTARRMSNorm(inner, config.layer_norm_eps)

    def forward(self, x):
        gate, up = self.fc1(x), self.fc3(x)
        return self.fc2(self.norm(F.silu(wide(gate)) * wide(up)).to(gate.dtype))


class UniViTARBlock(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.factor = config.initializer_factor
        self.ls1, self.ls2 = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.norm1, self.norm2 = UniViTARRMSNorm(width, eps), UniViTARRMSNorm(width, eps)
        self.attn, self.mlp = UniViTARAttention(config), UniViTARMLP(config)

    def forward(self, x, cos, sin, lengths):
        x = torch.addcmul(x, self.attn(self.norm1(x), cos, sin, lengths), self.ls1)
        return torch.addcmul(x, self.mlp(self.norm2(x)), self.ls2)


class UniViTARPool(nn.Module):
    """Attention pooling: one learned query attends to all tokens of an item."""

    is_causal = False

    def __init__(self, config, heads):
        super().__init__()
        self.config, self.heads, width = config, heads, config.hidden_size
        self.scaling = (width // heads) ** -0.5
        self.norm, self.query = UniViTARRMSNorm(width, config.layer_norm_eps), nn.Parameter(torch.empty(width))
        self.kv = nn.Linear(width, 2 * width)

    def forward(self, tokens, lengths):
        k, v = self.kv(self.norm(tokens)).unflatten(1, (2, self.heads, -1)).unbind(1)
        q = self.query.view(1, self.heads, -1).expand(len(lengths), -1, -1).contiguous()
        return packed_attention(self, q, k, v, [1] * len(lengths), lengths)


class UniViTARPreTrainedModel(PreTrainedModel):
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True
    _no_split_modules = ["UniViTARBlock", "UniViTARPool"]

    @torch.no_grad()
    def _init_weights(self, module):
        # Functions of `init` do not change values that were loaded from a file.
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, UniViTARPatchEmbedding):
            init.normal_(module.weight, std=(2 / (module.weight[0].numel() + len(module.weight))) ** 0.5)
        elif isinstance(module, UniViTARRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, UniViTARBlock):
            init.constant_(module.ls1, module.factor)
            init.constant_(module.ls2, module.factor)
        elif isinstance(module, UniViTARPool):
            init.normal_(module.query, std=module.query.numel() ** -0.5)
        elif isinstance(module, UniViTARModel):
            init.constant_(module.logit_scale, math.log(10.0))
            init.constant_(module.logit_bias, -10.0)
        if isinstance(module, nn.Linear | UniViTARPatchEmbedding) and module.bias is not None:
            init.zeros_(module.bias)


class UniViTARVisionModel(UniViTARPreTrainedModel):
    """The encoder. It has no class token, learned positions or final norm.

    The first axis of its result counts tokens of all items, so a pipeline must run it with batch_size=1.
    """

    config_class = UniViTARVisionConfig

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.ModuleDict({"patch_embedding": UniViTARPatchEmbedding(config)})
        blocks = nn.ModuleList(UniViTARBlock(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": blocks})
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings["patch_embedding"]

    def rotations(self, grids, x):
        """Returns cosines and sines of all tokens, (T, 1, K / 2) each.

        Each call computes them: a buffer that no file holds would be lost when transformers loads a model.
        """
        merge, half = self.config.spatial_merge_size, self.config.hidden_size // self.config.num_attention_heads // 2
        places = []
        for t, h, w in grids:
            cells = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
            cells = cells.view(h // merge, merge, w // merge, merge, 2).transpose(1, 2).reshape(h * w, 2)
            places.append(cells.repeat(t, 1))
        dtype = torch.promote_types(x.dtype, torch.float32)
        frequencies = self.config.rope_theta ** -(torch.arange(0, half, 2, device=x.device, dtype=dtype) / half)
        angles = (torch.cat(places).to(x.device, dtype)[:, :, None] * frequencies).flatten(1)[:, None]
        return angles.cos(), angles.sin()

    @can_return_tuple
    def forward(self, pixel_values, grid_thw, output_hidden_states=None, **kwargs):
        """Encodes a pack.

        Args: pixel_values: (T, 1176) patches; grid_thw: (N, 3) tokens along time, height, width, both as the image
            processor returns them; output_hidden_states: whether to return the inputs of all blocks and the result.
        Returns: BaseModelOutput with last_hidden_state (T, D) and hidden_states, layers + 1 times (T, D).
        Raises: ValueError if the number of patches does not fit the grids.
        """
        grids = grid_lists(grid_thw)
        lengths = [t * h * w for t, h, w in grids]
        x = self.embeddings["patch_embedding"](pixel_values)
        if sum(lengths) != len(x):
            raise ValueError(f"{len(x)} patches, the grids take {sum(lengths)}")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cos, sin = self.rotations(grids, x)
        states = [x]
        for block in self.encoder["layers"]:
            x = block(x, cos, sin, lengths)
            states.append(x if output_hidden_states else None)
        return BaseModelOutput(x, tuple(states) if output_hidden_states else None)


@dataclass
class UniViTAROutput(ModelOutput):
    """Logits (N, M) and (M, N), and unit vectors (N, E) of images and (M, E) of texts. Results without input are
    None."""

    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None


class UniViTARModel(UniViTARPreTrainedModel):
    """Both towers, which map images, videos and texts to unit vectors of one space."""

    config_class = UniViTARConfig
    base_model_prefix = ""
    _keep_in_fp32_modules_strict = ["logit_scale", "logit_bias"]

    def __init__(self, config):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        padded = text.model_type in PADDED
        self.vision_model = UniViTARVisionModel._from_config(vision)
        self.pool = UniViTARPool(vision, config.pool_heads)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_model = PADDED.get(text.model_type, CLIPTextModel)._from_config(text)
        width = text.projection_size if padded else text.hidden_size
        self.text_projection = nn.Linear(width, config.projection_dim, bias=False)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))
        self.post_init()

    @property
    def dtype(self):
        return self.vision_model.dtype  # scale and bias, the first parameters, stay in float32

    def get_input_embeddings(self):
        return self.vision_model.get_input_embeddings()

    @can_return_tuple
    def get_image_features(self, pixel_values, grid_thw, output_hidden_states=None, **kwargs):
        """Embeds images and videos.

        Args: see `UniViTARVisionModel.forward`.
        Returns: BaseModelOutputWithPooling with pooler_output (N, E), unit vectors in float32, and last_hidden_state
            (T, D).
        """
        grids = grid_lists(grid_thw)
        encoded = self.vision_model(pixel_values, grids, output_hidden_states=output_hidden_states, return_dict=True)
        pooled = self.pool(encoded.last_hidden_state, [t * h * w for t, h, w in grids])
        embeds = F.normalize(self.visual_projection(pooled).float(), dim=-1)
        return BaseModelOutputWithPooling(encoded.last_hidden_state, embeds, encoded.hidden_states)

    @can_return_tuple
    def get_text_features(self, input_ids, attention_mask=None, output_hidden_states=None, **kwargs):
        """Embeds texts. Texts of more than `context_length` tokens are cut and end with the end-of-text token.

        Args: input_ids: (M, S) padded on the right; attention_mask: (M, S) with 1 for real tokens; None: a row ends at
            its first end-of-text token.
        Returns: BaseModelOutputWithPooling with pooler_output (M, E), unit vectors in float32, and last_hidden_state
            (M, S, width of the text model).
        """
        input_ids, lengths = self._cut(input_ids, attention_mask)
        text, padded = self.config.text_config, self.config.text_config.model_type in PADDED
        if padded:  # SigLIP has no mask: it was trained on rows padded to full length
            full = input_ids.new_full((len(input_ids), text.max_position_embeddings), text.pad_token_id)
            real = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
            full[:, : input_ids.shape[1]] = input_ids.where(real, text.pad_token_id)
            input_ids = full
        encoded = self.text_model(input_ids=input_ids, output_hidden_states=output_hidden_states, return_dict=True)
        states, rows = encoded.last_hidden_state, torch.arange(len(input_ids), device=input_ids.device)
        # CLIP is causal: its last real token has seen no padding. Its own pooling takes another token for some ids.
        pooled = encoded.pooler_output if padded else states[rows, lengths - 1]
        embeds = F.normalize(self.text_projection(pooled).float(), dim=-1)
        return BaseModelOutputWithPooling(states, embeds, encoded.hidden_states)

    def _cut(self, input_ids, attention_mask):
        """Returns ids of at most `context_length` per row, and the numbers of real tokens (M,)."""
        # The zero-shot pipeline does not cut long texts, or cuts them at 64 tokens.
        room, end = self.config.context_length, self.config.text_eos_token_id
        if attention_mask is None:
            ends = input_ids == end
            lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, input_ids.shape[1])
        else:
            lengths = attention_mask.sum(1)
        if input_ids.shape[1] > room:
            input_ids = input_ids[:, :room].clone()
            input_ids[lengths > room, -1] = end
        return input_ids, lengths.clamp(max=room)

    @can_return_tuple
    def forward(self, input_ids=None, pixel_values=None, grid_thw=None, attention_mask=None, **kwargs):
        """Compares images or videos with texts.

        Args: see `get_image_features` and `get_text_features`; either may be left out.
        Returns: UniViTAROutput. With the objective sigmoid, logits_per_image.sigmoid() are the probabilities that image
            and text belong together; with softmax, logits_per_image.softmax(-1) are those of the texts of an image.
        """
        image = text = per_image = None
        if pixel_values is not None:
            image = self.get_image_features(pixel_values, grid_thw, return_dict=True).pooler_output
        if input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output
        if image is not None and text is not None:
            per_image = image @ text.T * self.logit_scale.float().exp() + self.logit_bias.float()
        return UniViTAROutput(per_image, None if per_image is None else per_image.T, image, text, image)


class UniViTARSigmoidModel(UniViTARModel):
    """Both towers of a run with the objective sigmoid. Only the configuration differs."""

    config_class = UniViTARSigmoidConfig
