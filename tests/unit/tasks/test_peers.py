"""`univitar-ds eval TASK` on models of transformers has the figures of their own forward pass."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.support import datasets
from tests.support.media import encoded, noise, video
from tests.support.peers import save_peer
from univitar_ds.cli.main import main
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.data.media.video_decode import decode_video
from univitar_ds.data.storage.base import LOCAL
from univitar_ds.inference.embed_files import ModelOptions
from univitar_ds.peers.model import PeerModel
from univitar_ds.tasks.cached.feature_cache import features
from univitar_ds.tasks.items import read_items
from univitar_ds.tasks.models import open_model
from univitar_ds.tasks.sources import DataOptions
from univitar_ds.tasks.sources import test_source as source_of

CPU = torch.device("cpu")
CLASSES = ("cat", "dog", "horse")
EACH = 3


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_peer("clip", tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_peer("dinov2", tmp_path_factory.mktemp("models") / "dinov2")


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars with labels and two captions an item, and a damaged image. Test items are of several sizes."""
    folder = tmp_path_factory.mktemp("data") / "wds_pets"
    for split_number, split in enumerate(("train", "test")):
        members = []
        for index, image in enumerate(pixels(split_number)):
            text = f"a photo of {index % 3}\nthe {CLASSES[index % 3]} {index // 3}\n"
            members += [(f"{index}.cls", str(index % 3)), (f"{index}.png", encoded(Image.fromarray(image), "PNG"))]
            members += [(f"{index}.txt", text)]
        members += [("damaged.cls", "0"), ("damaged.png", encoded(noise(40, 40), "PNG")[:300])]
        datasets.write_tar(folder / split / "0.tar", members)
    datasets.write(folder, {"classnames.txt": "".join(f"{name}\n" for name in CLASSES)})
    return folder


def measured(capsys, *arguments: str | Path) -> dict:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def pixels(split_number: int) -> list[np.ndarray]:
    """The images of a split of `pets`; 0: train, 1: test."""
    seeds = range(EACH * len(CLASSES))
    return [np.asarray(noise(30 + 7 * index, 44, seed=50 * split_number + index)) for index in seeds]


def test_zero_shot_is_that_of_the_forward_pass(clip, pets, tmp_path, capsys):
    (tmp_path / "t").write_text("a photo of the {c}\nsmall {c}\n", encoding="utf-8")
    result = measured(capsys, "zero-shot", clip, "--data", pets, "--cache", tmp_path, "--templates", tmp_path / "t")
    model = PeerModel(clip, "clip", None, CPU)
    sentences = [model.texts([f"a photo of the {name}", f"small {name}"]) for name in CLASSES]
    classes = torch.stack([F.normalize(one, dim=-1).mean(0) for one in sentences])
    cosines = F.normalize(model.images(pixels(1), 1000), dim=-1) @ F.normalize(classes, dim=-1).T
    right = cosines.argmax(1) == torch.arange(len(cosines)) % 3
    figure = next(one for one in result["figures"] if one["measure"] == "top-1")
    assert figure["value"] == pytest.approx(right.double().mean().item())
    assert (figure["n"], figure["chance"]) == (EACH * len(CLASSES), pytest.approx(1 / 3))
    assert any("1 corrupt" in note or "1 unreadable" in note for note in result["notes"]), result["notes"]


def test_retrieval_takes_all_captions_of_an_item(clip, pets, tmp_path, capsys):
    given = ["--data", pets, "--cache", tmp_path, "--captions", "lines"]
    result = measured(capsys, "retrieval", clip, *given)
    model = PeerModel(clip, "clip", None, CPU)
    count = EACH * len(CLASSES)
    texts = [f"a photo of {index}" for index in range(3)]
    texts += [f"the {CLASSES[index % 3]} {index // 3}" for index in range(count)]
    wanted = [{index % 3, 3 + index} for index in range(count)]
    cosines = F.normalize(model.images(pixels(1), 1000), dim=-1) @ F.normalize(model.texts(texts), dim=-1).T
    best = cosines.topk(5).indices.tolist()
    hits = [bool(wanted[index] & set(best[index])) for index in range(count)]
    found = {(one["task"], one["measure"]): one for one in result["figures"]}
    assert found["image to text", "R@5"]["value"] == pytest.approx(sum(hits) / count)
    assert found["image to text", "R@5"]["candidates"] == len(texts)


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_an_encoder_without_text_tower_has_probes(dinov2, pets, tmp_path, capsys, task):
    options = ["--neighbours", "1"] if task == "knn" else []
    figure = measured(capsys, task, dinov2, "--data", pets, "--cache", tmp_path, *options)["figures"][0]
    assert figure["n"] == EACH * len(CLASSES)
    if task == "knn":
        model = PeerModel(dinov2, "dinov2", None, CPU)
        train, test = (F.normalize(model.images(pixels(split), 1000).double(), dim=-1) for split in (0, 1))
        nearest = (test @ train.T).argmax(1)
        assert figure["value"] == pytest.approx((nearest % 3 == torch.arange(len(nearest)) % 3).double().mean().item())


def test_tasks_with_texts_report_a_missing_text_tower(dinov2, pets, tmp_path, capsys):
    for task in ("zero-shot", "retrieval"):
        assert main(["eval", task, str(dinov2), "--data", str(pets), "--cache", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert "has no text tower" in said
        assert "choose knn or linear" in said
    assert not (tmp_path / "features").exists()


def test_a_model_that_is_not_supported_is_named(tmp_path, pets, capsys):
    datasets.write(tmp_path / "bert", {"config.json": json.dumps({"model_type": "bert"})})
    assert main(["eval", "knn", str(tmp_path / "bert"), "--data", str(pets)]) == 2
    said = capsys.readouterr().err
    assert "holds a bert model" in said
    assert "dinov3_vit" in said
    assert main(["eval", "knn", str(tmp_path / "bert"), "--data", str(pets), "--weights", "averaged"]) == 2


@pytest.mark.parametrize("count", [1, 2])
def test_a_video_is_the_mean_of_its_frames(clip, tmp_path, count):
    clip_file = video([np.asarray(noise(40, 48, seed=half)) for half in (1, 2) for _ in range(4)])
    datasets.write_tar(tmp_path / "0.tar", [("a.mp4", clip_file), ("a.cls", "cat")])
    opened = open_model(str(clip), ModelOptions(nproc=1, workers=1, frames=count))
    source = source_of(DataOptions(str(tmp_path / "0.tar")))
    found = features(opened, opened.setup(texts=True), source, tmp_path / "cache", progress=False)
    assert [len(items.samples) for items in read_items(source, LOCAL)] == [0, 1]
    model = PeerModel(clip, "clip", None, CPU)
    limits = DecodeLimits(10**8, 30.0, 100.0)
    frames = model.images(list(decode_video(clip_file, frames=count, limits=limits)), 1000)
    assert len(frames) == count
    assert (frames[0] - frames[-1]).abs().max() > 0.01 * frames.abs().max() or count == 1
    assert torch.equal(found.values, frames.mean(dim=0, keepdim=True))
    opened.check_texts()
    assert f"the mean of those of {count} frames" in opened.video_note


def test_an_item_that_is_very_long_is_left_out(clip, tmp_path, capsys):
    """An image processor that makes the shorter side 224 pixels would need gigabytes for it."""
    members = [("long.png", encoded(noise(1, 5000), "PNG")), ("long.cls", "0")]
    members += [(f"{index}.{end}", part) for index in range(3) for end, part in _item(index)]
    datasets.write_tar(tmp_path / "0.tar", members)
    datasets.write_tar(tmp_path / "1.tar", members[2:])
    given = ["--data", tmp_path / "0.tar", "--train-data", tmp_path / "1.tar", "--cache", tmp_path / "cache"]
    figure = measured(capsys, "knn", clip, *given, "--neighbours", "1")["figures"][0]
    assert (figure["n"], figure["value"]) == (3, 1.0)


def test_probes_on_tokens_and_sweeps_take_peers(clip, dinov2, pets, tmp_path, capsys):
    """Counts are of patches: CLIP has 4 x 4, and DINOv2 as many as are asked for."""
    given = ["--data", pets, "--cache", tmp_path]
    for model, options in ((clip, []), (dinov2, ["--max-tokens", "6"])):
        result = measured(capsys, "attentive", model, *given, "--epochs", "1", *options)
        assert result["figures"][0]["n"] == EACH * len(CLASSES)
    found = measured(capsys, "tokens", dinov2, *given, "--counts", "4,9")
    assert [one["task"] for one in found["figures"]] == [
        f"kNN ({count} tokens, {view})" for count in (4, 9) for view in ("native", "square")
    ]
    assert "and 9 tokens on average" in found["notes"][1]


@pytest.mark.parametrize(("task", "option"), [("tokens", "--counts"), ("attentive", "--max-tokens")])
def test_a_peer_of_one_size_is_named_as_such(clip, pets, tmp_path, capsys, task, option):
    assert main(["eval", task, str(clip), "--data", str(pets), "--cache", str(tmp_path), option, "9"]) == 2
    assert f"{clip} is a clip model, which reads squares of 32 px only, 16 tokens; " in capsys.readouterr().err


def _item(index: int) -> list:
    return [("png", encoded(noise(40, 40, seed=index), "PNG")), ("cls", str(index % 2))]
