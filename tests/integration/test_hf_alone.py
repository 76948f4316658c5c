"""A converted model in a new environment with transformers and without this package has the same features and classes,
of images and of a video of the demo.

The environment has torch, transformers, safetensors, Pillow and their requirements. The test is skipped if pip cannot
install them.
"""

import importlib.metadata
import json
import os
import venv
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.progress import run_watched
from tests.support.stored_models import CAPTIONS, CONTEXT, TOKENIZER, Made, make_model
from univitar_ds import Preprocessor
from univitar_ds.demo.scenes import image_scene, render, video_scene
from univitar_ds.formats import hf
from univitar_ds.tokenization import encode

pytestmark = pytest.mark.slow

LIBRARIES = ("torch", "transformers", "safetensors", "pillow")
ABSENT = ("univitar_ds", "torchvision", "flash_attn", "accelerate", "deepspeed", "kernels")
LABELS = ["red square", "blue circle", "very long label " * 20]
NEAR = 1e-5
"""Maximum error of an entry of a unit vector."""
SCRIPT = """
import importlib.util, json, sys
from PIL import Image
from safetensors.torch import save_file
import torch
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline

folder, absent, captions, labels = sys.argv[1], *map(json.loads, sys.argv[2:])
assert not [name for name in absent if importlib.util.find_spec(name)]
frames = [Image.open(f"{number}.png") for number in range(4)]
items = [frames[0], frames[1], frames[2:]]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
inputs = AutoProcessor.from_pretrained(folder, trust_remote_code=True)(images=items, text=captions)
alone = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)(items)
assert torch.equal(alone["pixel_values"], inputs["pixel_values"])
assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(captions[0])["input_ids"]
with torch.no_grad():
    images = model.get_image_features(inputs["pixel_values"], inputs["grid_thw"]).pooler_output
    texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
save_file({"pixels": inputs["pixel_values"], "images": images, "texts": texts.contiguous()}, "result.safetensors")
classify = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)
found = classify(frames[:2], candidate_labels=labels, hypothesis_template="a {}")
json.dump([{one["label"]: one["score"] for one in scores} for scores in found], open("scores.json", "w"))
encoder = AutoModel.from_pretrained(folder + "-encoder", trust_remote_code=True)
with torch.no_grad():
    tokens = encoder(alone["pixel_values"], alone["grid_thw"]).last_hidden_state
    assert torch.equal(tokens, model.vision_model(alone["pixel_values"], alone["grid_thw"]).last_hidden_state)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Python of a new environment with the same versions of the libraries as this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    found = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in LIBRARIES]
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *found]
    done = run_watched(command, env=outside())
    if done.returncode:
        pytest.skip(f"pip cannot install {', '.join(found)} here: {done.stderr.strip()[-300:]}")
    return folder / "bin" / "python"


def outside(**changes: str) -> dict[str, str]:
    """Environment variables without those that would lead to this checkout."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return {**kept, **changes}


@pytest.mark.parametrize(("family", "objective"), [("clip", "sigmoid"), ("siglip", "softmax")])
def test_a_new_environment_has_the_same_features_and_classes(python, tmp_path, family, objective):
    made = make_model(family, objective)
    hf.write(made.stored, tmp_path / "model", shard_bytes=100_000)
    hf.write(made.stored.encoder_only(), tmp_path / "model-encoder")
    scenes = [image_scene(0, "test", 0), image_scene(0, "test", 1), video_scene(0, "test", 0)]
    drawn = [render(scene) for scene in scenes]
    frames = [Image.fromarray(frame) for frame in (drawn[0][0], drawn[1][0], *drawn[2][:2])]
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"{number}.png")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    arguments = [json.dumps(one) for one in (ABSENT, CAPTIONS, LABELS)]
    environment = outside(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    done = run_watched([str(python), "script.py", str(tmp_path / "model"), *arguments], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = load_file(tmp_path / "result.safetensors")
    items = [*frames[:2], frames[2:]]
    assert torch.equal(result["pixels"], Preprocessor(made.stored.encoder)(items)[0])
    images, texts = features(made, items, CAPTIONS)
    assert (result["images"] - images).abs().max() < NEAR
    assert (result["texts"] - texts).abs().max() < NEAR
    images, texts = features(made, frames[:2], [f"a {label}" for label in LABELS])
    logits = made.net.logit_scale.exp() * images @ texts.T + made.net.logit_bias
    wanted = logits.sigmoid() if objective == "sigmoid" else logits.softmax(-1)
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    got = torch.tensor([[row[label] for label in LABELS] for row in scores])
    assert (got - wanted).abs().max() < 10 * NEAR  # the scale of the logits is 10


@torch.no_grad()
def features(made: Made, items: list, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the package's features of images and videos, and of captions."""
    pixels, counts, grids = Preprocessor(made.stored.encoder).pixels(items)
    images = made.net.encode_vision(pixels, torch.tensor(counts), torch.tensor(grids))
    return images, made.net.encode_text(*encode(TOKENIZER, captions, CONTEXT))
