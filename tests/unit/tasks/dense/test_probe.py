"""`univitar-ds eval dense` on images of two colours, and on random label maps."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.support import datasets
from tests.support.datasets import write
from tests.support.media import encoded
from tests.support.peers import save_peer
from univitar_ds.cli.main import main
from univitar_ds.errors import ConfigError, SampleError
from univitar_ds.inference import embed_files
from univitar_ds.tasks.dense.files import MaskOptions, Pair, SegmentedImage, read_pair, split_pairs
from univitar_ds.tasks.dense.probe import _Job, _Probe

SIZE = (56, 84)


def png(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values), "PNG")


def halves(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image with a red and a blue half, divided between patches, and the labels 1 and 7; 0 in the first row."""
    draws = np.random.default_rng(seed)
    labels = np.full(SIZE, 1, np.uint8)
    labels[:, 14 * int(draws.integers(1, 5)) :] = 7
    if draws.integers(2):
        labels = labels[:, ::-1]
    pixels = draws.integers(60, size=(*SIZE, 3), dtype=np.uint8)
    pixels[..., 0] += np.where(labels == 1, 180, 0).astype(np.uint8)
    pixels[..., 2] += np.where(labels == 7, 180, 0).astype(np.uint8)
    labels = labels.copy()
    labels[0] = 0
    return pixels, labels


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ADE20K's layout."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    for split, count in (("training", 12), ("validation", 6)):
        for index in range(count):
            pixels, labels = halves(100 * count + index)
            name = f"{split}/{index}.png"
            write(folder, {f"images/{name}": png(pixels), f"annotations/{name}": png(labels)})
    return folder


def measured(capsys, *arguments: str | Path) -> dict:
    status = main(["eval", "dense", *map(str, arguments), "--json"])
    found = capsys.readouterr()
    assert status == 0, found.err
    return json.loads(found.out)


@pytest.mark.parametrize("windows", [[], ["--window", "28", "--stride", "14"]])
def test_a_linear_head_finds_the_halves(run, scenes, tmp_path, capsys, windows):
    given = ["--data", scenes, "--cache", tmp_path, "--ignore", "0,255", "--epochs", "60"]
    result = measured(capsys, run, *given, *windows)
    by_measure = {figure["measure"]: figure for figure in result["figures"]}
    figure = by_measure["mIoU"]
    assert figure["value"] > 0.85
    assert (figure["n"], figure["candidates"]) == (6, 2)
    assert 0.2 < figure["chance"] < 0.4
    assert figure["interval"][0] <= figure["value"] <= figure["interval"][1]
    assert by_measure["accuracy of pixels"]["value"] > 0.9
    assert figure["task"].endswith("(windows of 28 px)" if windows else "(native size)")


def test_random_label_maps_are_at_chance(run, tmp_path, capsys):
    draws = np.random.default_rng(0)
    for split, count in (("training", 10), ("validation", 8)):
        for index in range(count):
            labels = draws.integers(3, size=(4, 6), dtype=np.uint8).repeat(14, 0).repeat(14, 1)
            pixels = draws.integers(256, size=(*SIZE, 3), dtype=np.uint8)
            name = f"{split}/{index}.png"
            write(tmp_path, {f"images/{name}": png(pixels), f"annotations/{name}": png(labels)})
    result = measured(capsys, run, "--data", tmp_path, "--cache", tmp_path / "cache", "--epochs", "10")
    accuracy = result["figures"][1]
    assert accuracy["interval"][0] - 0.05 < 1 / 3 < accuracy["interval"][1] + 0.05


def test_the_loss_is_cross_entropy_of_pixels_with_the_logits_of_their_patch():
    learned = _Probe(None, [0, 1, 2], _Job(torch.device("cpu"), 1024, False))
    draws = torch.Generator().manual_seed(0)
    labels, logits = torch.randint(-1, 3, (5, 196), generator=draws), torch.randn(5, 3, generator=draws)
    found = -(learned._counts(labels) * logits.log_softmax(-1)).sum()
    every = logits[:, None].expand(-1, 196, -1).reshape(-1, 3)
    wanted = F.cross_entropy(every, labels.flatten(), ignore_index=-1, reduction="sum")
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)  # sums of 980 terms in float32


def test_images_are_found_by_the_names_of_their_label_maps(tmp_path):
    content = png(np.zeros((2, 2, 3), np.uint8))
    names = ("val/a/x_left.png", "val/a/y_left.png", "val/a/x_other.png")
    write(tmp_path / "images", dict.fromkeys(names, content))
    write(tmp_path / "masks", {"val/a/x_fine_ids.png": content, "val/a/z_fine_ids.png": content})
    given = MaskOptions(suffix="_fine_ids.png", image_suffix="_left.png")
    pairs, without = split_pairs(str(tmp_path / "images"), "val", str(tmp_path / "masks"), given)
    assert pairs == [Pair(tmp_path / "images/val/a/x_left.png", tmp_path / "masks/val/a/x_fine_ids.png")]
    assert without == 1


def voc(folder: Path, lists: dict[str, str]) -> Path:
    """Pascal VOC's layout: palette label maps, in which 255 is a border without a class."""
    for index in range(4):
        pixels, labels = halves(index)
        labels[:2] = 255
        mask = Image.fromarray(labels)
        mask.putpalette([value for index in range(256) for value in (index, 255 - index, 0)])
        files = {f"JPEGImages/{index}.jpg": encoded(Image.fromarray(pixels), "JPEG")}
        write(folder, files | {f"SegmentationClass/{index}.png": encoded(mask, "PNG")})
    return write(folder, {f"ImageSets/Segmentation/{name}.txt": text for name, text in lists.items()})


def test_lists_of_pascal_voc_name_images_and_palette_label_maps(run, tmp_path, capsys):
    data = voc(tmp_path / "voc", {"train": "\ufeff0\r\n1\r\n1\n", "val": "2\n\n3\n"})
    given = [run, "--data", data, "--cache", tmp_path, "--epochs", "1", "--train-split", "train", "--split", "val"]
    figure = measured(capsys, *given)["figures"][0]
    assert (figure["n"], figure["candidates"]) == (2, 2)
    pairs, _ = split_pairs(str(data), "train", None, MaskOptions())
    assert [pair.image.name for pair in pairs] == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("../../0", "which is no image of"),
        ("9", "names 1 images that are missing"),
        ("\r\n", "names no image; choose another split"),
    ],
)
def test_a_list_of_pascal_voc_that_cannot_be_used_is_an_error(tmp_path, text, said):
    data = voc(tmp_path, {"train": text})
    with pytest.raises(ConfigError, match=said):
        split_pairs(str(data), "train", None, MaskOptions())
    with pytest.raises(ConfigError, match=r"has the lists train in .* no val\.txt"):
        split_pairs(str(data), "val", None, MaskOptions())
    with pytest.raises(ConfigError, match="reads local folders only"):
        split_pairs("s3://bucket/voc", "val", None, MaskOptions())


@pytest.mark.parametrize(
    ("content", "said"),
    [(png(np.zeros((4, 6, 3), np.uint8)), "a colour image"), (png(np.zeros((6, 4), np.uint8)), "4 x 6 px"),
     (b"nothing", "/m.png: .*not an image"), (png(np.full((4, 6), 40000, np.uint16)), "0 to 32767"),
     (png(np.zeros((400, 600), np.uint8)), "max_image_px")],
)  # fmt: skip
def test_a_label_map_that_cannot_be_used_is_an_error_of_its_image(tmp_path, content, said):
    write(tmp_path, {"a.png": png(np.zeros((4, 6, 3), np.uint8)), "m.png": content})
    with pytest.raises(SampleError, match=rf"its label map .*{said}"):
        read_pair(Pair(tmp_path / "a.png", tmp_path / "m.png"), 1000, ())


@pytest.mark.parametrize(("dtype", "high", "none"), [(np.uint8, 254, 255), (np.uint16, 300, 65535)])
def test_values_are_read_as_they_are_and_ignored_ones_have_no_label(tmp_path, dtype, high, none):
    labels = np.array([[0, high, none], [7, none, 0]], dtype)
    write(tmp_path, {"a.png": png(np.zeros((2, 3, 3), np.uint8)), "m.png": png(labels)})
    found = read_pair(Pair(tmp_path / "a.png", tmp_path / "m.png"), 1000, (0, none))
    assert isinstance(found, SegmentedImage)
    assert found.labels.tolist() == [[-1, high, -1], [7, -1, -1]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--split", "test"], "its images are of training, validation"), (["--split", "training"], "--train-split"),
     (["--window", "30"], "multiples of 14 pixels; give 28"), (["--masks", "/nowhere"], "is not a folder"),
     (["--ignore", "0,1,7"], "see --ignore")],
)  # fmt: skip
def test_data_that_cannot_be_measured_is_an_error_with_a_remedy(run, scenes, tmp_path, capsys, arguments, said):
    assert main(["eval", "dense", str(run), "--data", str(scenes), "--cache", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_damaged_image_is_left_out_and_named(run, scenes, tmp_path, capsys):
    folder = tmp_path / "data"
    for path in scenes.rglob("*.png"):
        write(folder, {str(path.relative_to(scenes)): path.read_bytes()})
    (folder / "images/validation/3.png").write_bytes(b"damaged")
    result = measured(capsys, run, "--data", folder, "--cache", tmp_path, "--epochs", "1")
    assert result["figures"][0]["n"] == 5
    assert any("1 images cannot be used" in note and "validation/3.png" in note for note in result["notes"])


def test_a_narrow_image_that_windows_would_enlarge_beyond_the_limit_is_left_out(run, scenes, tmp_path, capsys):
    folder = tmp_path / "data"
    for path in scenes.rglob("*.png"):
        write(folder, {str(path.relative_to(scenes)): path.read_bytes()})
    for name, values in (("images", np.zeros((1, 20000, 3), np.uint8)), ("annotations", np.ones((1, 20000), np.uint8))):
        write(folder, {f"{name}/validation/9.png": png(values)})
    given = ["--data", folder, "--cache", tmp_path, "--epochs", "1", "--window", "84"]
    result = measured(capsys, run, *given)
    assert result["figures"][0]["n"] == 6
    assert any("9.png: 1680000 x 84 has a side of more than" in note for note in result["notes"])


def test_an_ignored_value_that_no_label_map_can_have_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "dense", "run", "--data", "data", "--ignore", "0,70000"])
    assert "70000 is not a value of a label map; give values from 0 to 65535" in capsys.readouterr().err


def test_labels_that_no_training_image_has_are_named_as_the_reason(run, scenes, tmp_path, capsys):
    write(
        tmp_path, {"images/validation/0.png": png(halves(0)[0]), "annotations/validation/0.png": png(halves(0)[1] + 9)}
    )
    given = [run, "--train-data", scenes, "--data", tmp_path, "--cache", tmp_path / "cache", "--epochs", "1"]
    assert main(["eval", "dense", *map(str, given)]) == 2
    assert f"{SIZE[0] * SIZE[1]} pixels have a label that no training image has" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_peers_are_measured_in_windows_of_their_size_or_at_native_size(scenes, tmp_path, capsys, kind):
    model = save_peer(kind, tmp_path / kind)
    given = [model, "--data", scenes, "--cache", tmp_path, "--ignore", "0,255", "--epochs", "20"]
    figure = measured(capsys, *given)["figures"][0]
    assert figure["task"] == f"dense probe ({'windows of 32 px' if kind == 'clip' else 'native size'})"
    assert figure["value"] > figure["chance"] + 0.1
    if kind == "clip":
        assert main(["eval", "dense", *map(str, given), "--window", "64"]) == 2
        assert "--window 64: the model reads squares of 32 px only; leave it out" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("task", ["dense", "attentive", "tokens"])
def test_two_processes_give_the_figures_of_one(run, scenes, tmp_path, capsys, monkeypatch, task):
    """And the same bits: images are divided into units of work. One thread each, since its number changes sums."""
    monkeypatch.setattr(embed_files, "_UNIT_ITEMS", {"tokens": 3})
    monkeypatch.setattr(embed_files, "_UNIT_ITEMS_OF_VECTORS", 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data, options = scenes, ["--ignore", "0,255"]
    if task != "dense":
        data, options = datasets.class_folders(tmp_path / "folders"), ["--split", "val"]
    options += ["--counts", "4", "--by", "knn"] if task == "tokens" else ["--epochs", "2"]
    results, files = [], []
    for nproc in ("1", "2"):
        given = ["--data", data, "--cache", tmp_path / nproc, "--nproc", nproc, "--workers", "1", "--json", *options]
        assert main(["eval", task, str(run), *map(str, given)]) == 0
        results.append(json.loads(capsys.readouterr().out)["figures"])
        files.append(sorted(part.read_bytes() for part in (tmp_path / nproc).glob("*/*/features-*.safetensors")))
    torch.set_num_threads(threads)
    assert results[0] == results[1]
    assert len(files[0]) >= 2
    assert files[0] == files[1]
