"""A peer's features are those of transformers' own image processor, tokenizer and forward pass."""

import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.closeness import assert_sums_close
from tests.support.peers import ALONE, SIDE, WHOLE, save_peer
from univitar_ds.convert.conversion import Options, convert
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.recognise import PEERS
from univitar_ds.inference.embed_files import ModelOptions
from univitar_ds.peers.families import FAMILIES
from univitar_ds.peers.model import PeerModel
from univitar_ds.peers.processing import Dinov3Images
from univitar_ds.tasks.peers import open_peer

CPU = torch.device("cpu")
TERMS = 2 * (3 * 24 + 40) + 3 * 8 * 8 + 24
"""Of the sums on the longest path: two blocks, the patches, the projection."""
SIZES = ((40, 60), (61, 33), (SIDE, SIDE), (200, 90))
SENTENCES = ["a photo of the cat", "a small dog", "horse", "the red cat and the dog of a photo of the small horse a a"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("peers")
    return {kind: save_peer(kind, root / kind) for kind in (*WHOLE, *ALONE)}


def test_a_peer_is_not_converted_and_the_error_names_what_measures_it(folders, tmp_path):
    assert all(kind.startswith(PEERS) for kind in FAMILIES)
    for kind, folder in folders.items():
        with pytest.raises(CheckpointError) as refused:
            convert(folder, tmp_path / "out", "release", Options())
        assert str(refused.value) == (
            f"{folder} holds a model of transformers with model_type {kind!r}; only models of this project are read "
            "(run, hf, release, universal, deepspeed, megatron, dcp); to compare this one with them, measure it: "
            f"univitar-ds eval knn {folder} --data SOURCE"
        )
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit/config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(CheckpointError, match=r"with model_type 'vit'; only models of this project.*name one of them"):
        convert(tmp_path / "vit", tmp_path / "out", "release", Options())
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Smooth, so that resizing is not all noise, and of different sizes."""
    draws = np.random.default_rng(0)
    return [
        np.asarray(Image.fromarray(draws.integers(0, 256, (6, 8, 3), np.uint8)).resize(size[::-1], Image.BICUBIC))
        for size in SIZES
    ]


def opened(folders: dict[str, Path], kind: str) -> PeerModel:
    return PeerModel(folders[kind], kind, None, CPU)


def prepared(folder: Path, kind: str, image: np.ndarray) -> dict[str, torch.Tensor]:
    """What the image processor of transformers makes. DINOv3's needs torchvision: here Pillow resizes the values."""
    if kind == "dinov3_vit":
        channels = []
        for channel in range(3):
            values = Image.fromarray(image[:, :, channel].astype(np.float32) / 255)
            channels.append(np.asarray(values.resize((SIDE, SIDE), Image.BILINEAR)))
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        values = (np.stack(channels, axis=-1) - mean) / std
        return {"pixel_values": torch.from_numpy(values).float().permute(2, 0, 1)[None]}
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    return processor(images=Image.fromarray(image), return_tensors="pt")


@torch.no_grad()
def by_transformers(folder: Path, kind: str, images: list[np.ndarray]) -> torch.Tensor:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    run = model.get_image_features if kind in WHOLE else model
    return torch.cat([run(**prepared(folder, kind, image)).pooler_output for image in images])


@pytest.mark.numeric
@pytest.mark.parametrize("kind", [*WHOLE, *ALONE])
def test_features_of_images_are_those_of_transformers(folders, images, kind):
    wanted = by_transformers(folders[kind], kind, images)
    found = opened(folders, kind).images(images, tokens_at_once=40)  # two images at a time
    assert_sums_close(found, wanted, TERMS)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (wanted[0] - wanted[1]).abs().max() > 0.01 * wanted.abs().max()


@pytest.mark.numeric
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("sentences", [SENTENCES[:3], SENTENCES], ids=["short", "one above the context"])
def test_features_of_texts_are_those_of_transformers(folders, kind, sentences):
    """SigLIP's texts are padded to full length, as in its training, which changes its features."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[kind], local_files_only=True)
    padding = True if kind == "clip" else "max_length"
    inputs = tokenizer(sentences, padding=padding, truncation=True, max_length=12, return_tensors="pt")
    model = AutoModel.from_pretrained(folders[kind], local_files_only=True).eval()
    with torch.no_grad():
        wanted = model.get_text_features(**inputs).pooler_output
    found = opened(folders, kind).texts(sentences)
    assert_sums_close(found, wanted, TERMS)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_width_is_that_of_the_features(folders, images):
    for kind in (*WHOLE, *ALONE):
        model = opened(folders, kind)
        assert model.images(images[:1], 1000).shape == (1, model.width), kind


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("preprocessor_config.json", "has no preprocessor_config.json"),
        ("model.safetensors", "cannot be loaded"),
    ],
)
def test_a_folder_without_a_file_is_refused(folders, tmp_path, name, said):
    save_peer("dinov2", tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=said):
        PeerModel(tmp_path, "dinov2", None, CPU)


@pytest.mark.parametrize("kind", ["siglip", "dinov3_vit"])
def test_the_settings_of_images_may_be_in_the_file_of_a_whole_processor(kind, images, tmp_path):
    """As processors of transformers 5 save them. They take precedence, as in transformers."""
    save_peer(kind, tmp_path)
    wanted = PeerModel(tmp_path, kind, None, CPU).images(images, 1000)
    file = tmp_path / "preprocessor_config.json"
    nested = {"image_processor": json.loads(file.read_text(encoding="utf-8"))}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested), encoding="utf-8")
    file.write_text(json.dumps({**nested["image_processor"], "size": {"height": 48, "width": 48}}), encoding="utf-8")
    assert torch.equal(PeerModel(tmp_path, kind, None, CPU).images(images, 1000), wanted)
    file.unlink()
    assert torch.equal(PeerModel(tmp_path, kind, None, CPU).images(images, 1000), wanted)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/nonexistent/univitar"),))


def test_a_pickle_with_code_is_refused_and_the_code_does_not_run(folders, tmp_path, monkeypatch):
    save_peer("dinov2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    touched = []
    monkeypatch.setattr(Path, "touch", lambda *arguments: touched.append(arguments))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        PeerModel(tmp_path, "dinov2", None, CPU)
    assert touched == []


def test_code_that_a_configuration_names_does_not_run(tmp_path):
    save_peer("clip", tmp_path)
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        values = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        own = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoImageProcessor": "own.Own"}
        values["auto_map"] = own | {"AutoTokenizer": ["own.Own", "own.Own"]}
        (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "own.py").write_text("raise SystemExit('the code ran')", encoding="utf-8")
    model = PeerModel(tmp_path, "clip", None, CPU)
    assert model.texts(["a cat"]).shape == (1, 20)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    save_peer("clip", tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    values["model"]["vocab"]["zebra"] = 999
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    model = PeerModel(tmp_path, "clip", None, CPU)
    with pytest.raises(CheckpointError, match="more tokens than the model"):
        model.texts(["a zebra"])


def test_an_image_processor_of_another_size_is_refused(folders, images, tmp_path):
    save_peer("siglip", tmp_path)
    values = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    values["size"] = {"height": 48, "width": 48}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot run on the output of its preprocessor_config"):
        PeerModel(tmp_path, "siglip", None, CPU).images(images, 1000)


@pytest.mark.parametrize(
    "changed",
    [
        {"do_center_crop": True},
        {"resample": 3},
        {"size": {"width": 9}},
        {"size": 224},
        {"size": {"height": math.inf, "width": 9}},
    ],
)
def test_settings_that_no_release_of_dinov3_has_are_refused(changed):
    with pytest.raises(CheckpointError, match=r"p\.json has"):
        Dinov3Images(changed, "p.json")


def test_a_size_of_dinov3_beyond_the_limit_is_refused_with_its_value():
    with pytest.raises(CheckpointError, match="size of 5000 x 9 px; sides of 1 to 4096 are supported; use"):
        Dinov3Images({"size": {"height": 5000, "width": 9}}, "p.json")


def changed(folder: Path, name: str, **values) -> None:
    """Changes values of a JSON file; None removes one."""
    content = json.loads((folder / name).read_text(encoding="utf-8")) | values
    content = {key: value for key, value in content.items() if value is not None}
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("values", [{"model_max_length": -5}, {"pad_token": None}])
def test_a_tokenizer_with_impossible_values_is_refused(tmp_path, values):
    changed(save_peer("clip", tmp_path), "tokenizer_config.json", **values)
    with pytest.raises(CheckpointError, match=r"fetch config\.json and these files"):
        PeerModel(tmp_path, "clip", None, CPU).texts(SENTENCES)


def test_a_configuration_of_a_wrong_type_is_refused(images, tmp_path):
    changed(save_peer("dinov2", tmp_path), "config.json", patch_size=[8, 8])
    with pytest.raises(CheckpointError, match=r"fetch config\.json and these files"):
        PeerModel(tmp_path, "dinov2", None, CPU).images(images, 1000)


@pytest.mark.parametrize(
    ("kind", "name", "values", "said"),
    [
        ("dinov2", "config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers 1e+09 (limit 1024)"),
        ("siglip", "preprocessor_config.json", {"size": {"height": 10**5, "width": 8}}, "height 100000 (limit 4096)"),
        ("siglip2", "preprocessor_config.json", {"max_num_patches": 10**9}, "max_num_patches 1e+09 (limit 65536)"),
    ],
)
def test_huge_sizes_are_refused_before_anything_is_built(tmp_path, kind, name, values, said):
    changed(save_peer(kind, tmp_path), name, **values)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        open_peer("a peer", tmp_path, kind, ModelOptions())
    with pytest.raises(CheckpointError, match=re.escape(said)):
        PeerModel(tmp_path, kind, None, CPU)
