"""Parts of a video and crops of an item are embedded each, and their unit vectors averaged: a worked example."""

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
from univitar_ds import UniViTARModel
from univitar_ds.cli.main import main
from univitar_ds.data.media.types import DecodeLimits, MediaSize
from univitar_ds.data.media.video_decode import decode_video
from univitar_ds.data.shards.listing import Shard
from univitar_ds.data.shards.samples import Sample
from univitar_ds.data.storage.local import LocalStorage
from univitar_ds.errors import ConfigError
from univitar_ds.geometry import Modality
from univitar_ds.inference.embed_files import ModelOptions
from univitar_ds.inference.reading import LeftOut
from univitar_ds.peers.model import PeerModel
from univitar_ds.tasks.cached.averaged import ItemViews, mean_of
from univitar_ds.tasks.cached.feature_cache import Vectors, features
from univitar_ds.tasks.items import Items
from univitar_ds.tasks.models import open_model
from univitar_ds.tasks.sources import DataOptions
from univitar_ds.tasks.sources import test_source as source_of

SIZE = (28, 56)
COUNT = 8


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video and an image of whole patches, which no resizing changes."""
    clip = video([np.asarray(noise(*SIZE, seed=seed)) for seed in range(COUNT)])
    members = [("a.mp4", clip), ("a.cls", "cat"), ("b.png", encoded(noise(*SIZE, seed=50), "PNG")), ("b.cls", "cat")]
    members += [("c.png", encoded(noise(*SIZE, seed=51), "PNG")), ("c.cls", "dog")]
    return datasets.write_tar(tmp_path_factory.mktemp("data") / "0.tar", members)


def frames_of(tar: Path) -> np.ndarray:
    import tarfile

    with tarfile.open(tar) as archive:
        data = archive.extractfile("a.mp4").read()
    return decode_video(data, frames=COUNT, limits=DecodeLimits(10**8, 30.0, 100.0))


def averaged(model: Path, tar: Path, cache: Path, modality: Modality, views: ItemViews) -> torch.Tensor:
    opened = open_model(str(model), ModelOptions(nproc=1, workers=1, frames=2))
    source = source_of(DataOptions(str(tar)))
    setups = views.of(opened.setup(texts=True), modality)
    found = mean_of([features(opened, setup, source, cache, progress=False) for setup in setups])
    assert [key.rpartition("/")[2] for key in found.keys] == (["a"] if modality == "video" else ["b", "c"])
    return found.values


@pytest.mark.numeric
def test_a_video_is_the_mean_of_clips_and_crops(run, items, tmp_path):
    frames = frames_of(items)
    found = averaged(run, items, tmp_path, "video", ItemViews(2, 3))
    views = [
        [Image.fromarray(frames[index][:, left : left + 28]) for index in indices]
        for indices in ((1, 3), (5, 7))  # the middles of two halves of each clip
        for left in (0, 14, 28)
    ]
    each = UniViTARModel.from_pretrained(run).encode_image(views)
    assert (found[0] - each.mean(0)).abs().max() < 1e-5  # sums of unit vectors in float32
    assert (each[0] - each[-1]).abs().max() > 1e-3


@pytest.mark.numeric
def test_an_image_of_a_peer_is_the_mean_of_its_crops(items, tmp_path):
    clip = save_peer("clip", tmp_path / "clip")
    found = averaged(clip, items, tmp_path / "cache", "image", ItemViews(5, 2))
    model = PeerModel(clip, "clip", None, torch.device("cpu"))
    for row, seed in enumerate((50, 51)):
        image = np.asarray(noise(*SIZE, seed=seed))
        each = F.normalize(model.images([image[:, :28], image[:, 28:]], 1000), dim=-1)
        assert (found[row] - each.mean(0)).abs().max() < 1e-5


def test_the_command_names_the_views_and_one_view_is_the_whole_item(run, items, tmp_path, capsys):
    given = ["eval", "zero-shot", str(run), "--data", str(items), "--cache", str(tmp_path), "--json"]
    assert main([*given, "--crops", "2"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert "Embeddings of images are the mean over 2 crops." in notes
    assert ItemViews().of("any settings", "video") == ["any settings"]
    with pytest.raises(ConfigError, match="--clips 20 and --crops 6 are 120 passes over the data; give at most 100"):
        ItemViews(20, 6)


def test_an_item_that_lacks_a_view_is_left_out():
    grids = torch.ones(3, 3)
    first = Vectors(torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]]), ["a", "a", "b"], [], grids)
    second = Vectors(torch.tensor([[0.0, 5.0], [0.0, 1.0]]), ["a", "a"], [LeftOut("b", "corrupt", "why")], grids[:2])
    found = mean_of([first, second])
    assert found.keys == ["a", "a"]
    assert torch.equal(found.values, torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    assert [one.key for one in found.left_out] == ["b"]


def test_items_that_share_a_key_are_left_out_if_one_of_them_lacks_a_view():
    """The second "a" of the first view would else be averaged with the first "a" of the other."""
    grids = torch.ones(3, 3)
    why = LeftOut("a", "corrupt", "why")
    first = Vectors(torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]]), ["a", "a", "b"], [], grids)
    second = Vectors(torch.tensor([[0.0, 5.0], [1.0, 0.0]]), ["a", "b"], [why], grids[:2])
    for views in ([first, second], [second, first]):
        found = mean_of(views)
        assert found.keys == ["b"]
        assert found.left_out == [why, why]
        assert torch.equal(found.values, torch.tensor([[1.0, 0.0]]))


def test_samples_that_share_a_key_get_no_features_if_one_of_them_has_none():
    """The row of the second "0/a", a dog, would else be that of a cat."""
    shard, size = Shard("0", "0.tar", LocalStorage(), 1), MediaSize("image", 1, 1, 1)
    described = [
        Sample(shard, key, 0, 1, "png", (), label, None, None, size, False, (1, 1, 1), 1)
        for key, label in (("a", "cat"), ("a", "dog"), ("b", "cat"))
    ]
    both = Items("image", described)
    samples, rows, bad = both.with_rows(["0/a", "0/b"], [LeftOut("0/a", "corrupt", "why")])
    assert ([sample.key for sample in samples], rows) == (["b"], [1])
    assert bad == {"corrupt": 1, "repeated_key": 1}
    samples, rows, bad = both.with_rows(["0/a", "0/a", "0/b"], [])
    assert ([sample.label for sample in samples], rows, bad) == (["cat", "dog", "cat"], [0, 1, 2], {})
