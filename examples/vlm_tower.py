"""UniViTAR as the vision tower of a vision-language model, as in Qwen2-VL: images and videos of any size in one pack.

    python examples/vlm_tower.py

If `spatial_merge_size` is 2, the encoder returns the tokens of an item in blocks of 2x2 neighbours, so a merger is a
reshape and an MLP. A trained encoder works too: set `spatial_merge_size` 2 and `resize_factor` 1 in its config.json,
which changes the order of the tokens but neither weights nor sizes, and open it by `UniViTAR.from_pretrained(folder)`.
"""

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from univitar_ds import Preprocessor, UniViTAR
from univitar_ds.config.encoder import EncoderConfig

VISION = 1  # id of the token whose embeddings are replaced by those of images and videos


class Merger(nn.Module):
    """Maps each 2x2 block of tokens to one embedding of the language model: (T, D) -> (T / 4, E)."""

    def __init__(self, width: int, language_width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)  # the encoder has no final norm
        self.mlp = nn.Sequential(nn.Linear(4 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, language_width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(self.norm(tokens).reshape(-1, 4 * tokens.shape[1]))


class VisionLanguageModel(nn.Module):
    """Language model whose VISION tokens are the merged tokens of a pack, in order."""

    def __init__(self, vision: UniViTAR, language: Qwen2ForCausalLM) -> None:
        super().__init__()
        self.vision, self.language = vision, language
        self.merger = Merger(vision.config.hidden_size, language.config.hidden_size)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, ids: Tensor) -> Tensor:
        """Returns the loss of the text. Args: (T, 1176) and (N, 3) of a `Preprocessor`; ids: (1, S)."""
        embeddings, seen = self.language.get_input_embeddings()(ids), ids == VISION
        merged = self.merger(self.vision(pixel_values, grid_thw))
        embeddings = embeddings.masked_scatter(seen[..., None], merged.to(embeddings.dtype))
        return self.language(inputs_embeds=embeddings, labels=ids.masked_fill(seen, -100)).loss


def main() -> VisionLanguageModel:
    """Runs forward and backward on one image and one video of four frames, and returns the model."""
    torch.manual_seed(0)
    config = EncoderConfig(192, 2, 3, 768, spatial_merge_size=2, resize_factor=1, min_tokens=16, max_tokens=512)
    language = Qwen2Config(
        vocab_size=100, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = VisionLanguageModel(UniViTAR(config), Qwen2ForCausalLM(language))

    image, frames = Image.new("RGB", (120, 60), "red"), [Image.new("RGB", (60, 90), (50 * i, 0, 0)) for i in range(4)]
    pixel_values, grid_thw = Preprocessor(config)([image, frames])
    first, second = (grid_thw.prod(dim=1) // 4).tolist()  # merged tokens of the image and of the video
    ids = torch.tensor([[2, *[VISION] * first, 10, 11, 12, 2, *[VISION] * second, 20, 21, 22, 3]])

    loss = model(pixel_values, grid_thw, ids)
    loss.backward()
    print(f"grids {grid_thw.tolist()}: {len(pixel_values)} tokens, {first} + {second} merged, loss {loss:.3f}")
    return model


if __name__ == "__main__":
    main()
