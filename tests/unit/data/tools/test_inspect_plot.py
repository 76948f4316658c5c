"""The plot of `data inspect`: every item once, at the same scale, on the page; and a PNG for every input."""

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from tests.support.drawn import write_font
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.tools.inspect import Inspection, Stream
from univitar_ds.data.tools.inspect_plot import draw, gallery, strips

grids = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=60)


def batch(grids, modality="image", captions=None):
    """Pixels of item i are all i, those of every other frame of a video i + 100."""
    frames = [2 * t if modality == "video" else 1 for t, _, _ in grids]
    pixels = [
        np.full((h * 14, w * 14, 3), index % 100 + 100 * (frame % 2), np.uint8)
        for index, ((_, h, w), count) in enumerate(zip(grids, frames, strict=True))
        for frame in range(count)
    ]
    n = len(grids)
    return PackedBatch(
        pixels=torch.from_numpy(np.concatenate([frame.reshape(-1) for frame in pixels])),
        frames=torch.tensor(frames),
        grid_thw=torch.tensor(grids).reshape(n, 3),
        token_ids=torch.zeros(n, 0, dtype=torch.int64),
        text_lengths=torch.zeros(n, dtype=torch.int64),
        caption_ids=torch.zeros(n, dtype=torch.int64),
        captions=captions or [f"caption {index}" for index in range(n)],
        labels=[None] * n,
        sets=[None] * n,
        keys=[str(index) for index in range(n)],
        modality=modality,
        lane=0,
        index=0,
    )


def inspection(packs, shown, modality="image"):
    stage = StageConfig(name="native", samples=1, lr=1.0, token_budget=16384)
    stream = Stream(stage, modality, packs=packs, shown=shown)
    return Inspection("a run", 1, 1000, "f" * 32, 0, [stream])


@given(grids)
def test_items_do_not_overlap_and_have_the_same_scale(grids):
    page = gallery(batch([(1, h, w) for _, h, w in grids]))
    for box, (_, h, w) in zip(page.boxes, grids, strict=True):
        assert box.height == pytest.approx(h * 14 * page.scale)
        assert box.width == pytest.approx(w * 14 * page.scale)
        assert min(box.left, box.top) >= 0
        assert box.left + box.width <= 13.61
        assert box.top + box.height < page.height
    for number, one in enumerate(page.boxes):
        for other in page.boxes[number + 1 :]:
            apart_x = one.left + one.width < other.left + 1e-9 or other.left + other.width < one.left + 1e-9
            apart_y = one.top + one.height < other.top + 1e-9 or other.top + other.height < one.top + 1e-9
            assert apart_x or apart_y


def test_a_pack_of_2000_items_fits_on_the_page():
    assert gallery(batch([(1, 6, 6)] * 2000)).height <= 14


def test_a_video_is_drawn_as_the_first_frames_of_its_tubelets():
    first, second = strips(batch([(2, 3, 1), (1, 1, 2)], "video"))
    assert first.shape == (42, 28, 3)
    assert second.shape == (14, 28, 3)
    assert (first == 0).all(), "no second frame of a tubelet"
    assert (second == 1).all()


def test_the_image_shows_the_pixels_of_the_items(tmp_path):
    shown = batch([(1, 20, 20), (1, 10, 30)])
    shown.pixels[:] = torch.tensor([255, 0, 255], dtype=torch.uint8).repeat(len(shown.pixels) // 3)
    draw(inspection([[400, 300]], shown), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    magenta = (pixels == [255, 0, 255]).all(axis=2).sum()
    assert magenta == pytest.approx(700 * 14 * 14, rel=0.1)


@pytest.mark.parametrize(
    ("packs", "shown", "modality"),
    [
        ([[]], None, "image"),
        ([[16384]], batch([(1, 64, 64)], captions=["$x^{$ \n日本語 👩‍🚀 " + "long " * 99]), "image"),
        ([[1] * 500, [8192, 8192], []], batch([(1, 1, 1)] * 300), "image"),
        ([[64, 64]], batch([(4, 4, 4), (4, 2, 8)], "video"), "video"),
    ],
    ids=["nothing decoded", "odd caption", "many items", "videos"],
)
def test_every_kind_of_pack_is_drawn_without_warnings(tmp_path, recwarn, packs, shown, modality):
    draw(inspection(packs, shown, modality), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert image.width == 1650
        assert 400 < image.height < 2500
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 3
    # matplotlib warns of glyphs and layouts with UserWarning; other warnings may be of files left open by other tests.
    assert not [warning.message for warning in recwarn.list if issubclass(warning.category, UserWarning)]


@pytest.fixture
def texts(monkeypatch):
    """The texts of the figure, in the order in which they are drawn, with their font."""
    found = []
    draw_text = Text.draw

    def record(self, renderer):
        if self.get_visible() and self.get_text():
            found.append(self)
        return draw_text(self, renderer)

    monkeypatch.setattr(Text, "draw", record)
    return found


def words(texts):
    return " ".join(text.get_text().replace("\n", " ") for text in texts)


def test_axes_have_units_and_the_colours_a_scale(tmp_path, texts):
    draw(inspection([[400, 300]], batch([(1, 20, 20), (1, 10, 30)])), tmp_path / "a.png")
    shown = [text.get_text() for text in texts]
    assert shown.count("tokens of an item") == 2, "of the histogram and of the colours"
    for label in ("number of items", "% of the token budget", "number of the pack", "unused tokens"):
        assert label in shown
    assert "mean, 350.0 tokens" in shown
    assert not any("." in text for text in shown if text.replace(".", "").isdigit()), "ticks at parts of a token"
    assert "Run a run:" in words(texts)
    assert "20 x 20 = 400 tokens" in shown
    assert "caption 1" in shown


def test_texts_stay_on_the_page_and_within_their_item(tmp_path, texts):
    shown = batch([(1, 20, 12), (1, 16, 30)], captions=["long words of a caption " * 20, "x" * 500])
    made = inspection([[240, 480]], shown)
    made.streams[0].bad.update({f"kind_{number}": number for number in range(1, 60)})
    draw(replace(made, run="r" * 300), tmp_path / "a.png")
    boxes = {text.get_text(): text.get_window_extent() for text in texts}
    assert {text: (box.x0, box.x1) for text, box in boxes.items() if box.x0 < 0 or box.x1 > 1650} == {}
    ends = sorted(
        boxes[text].width for text in boxes if text.endswith("...") and text.startswith(("xx", "of a", "words"))
    )
    assert ends
    assert ends[-1] <= 30 * 14 + 4


def test_an_unused_budget_is_hatched(tmp_path):
    for name, pack in (("empty", []), ("full", [16384])):
        draw(inspection([pack] * 5, batch([(1, 4, 4)])), tmp_path / f"{name}.png")
    dark = {}
    for name in ("empty", "full"):
        with Image.open(tmp_path / f"{name}.png") as image:
            dark[name] = (np.asarray(image.convert("RGB")) == 0x55).all(axis=2).sum()
    assert dark["empty"] > dark["full"] + 1000


def test_captions_use_the_fonts_of_the_system_and_missing_ones_are_counted(tmp_path, font_folder, texts):
    write_font(font_folder / "Made-Regular.ttf", "日", family="Made for a test")
    draw(inspection([[400]], batch([(1, 20, 20)], captions=["日 本"])), tmp_path / "a.png")
    assert "1 character for which this machine has no font" in words(texts)
    (caption,) = [text for text in texts if text.get_text() == "日 本"]
    assert caption.get_fontfamily() == ["DejaVu Sans", "Made for a test"]


def test_settings_of_matplotlib_on_the_machine_have_no_effect(tmp_path):
    made = inspection([[400]], batch([(1, 20, 20)]))
    draw(made, tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "font.family": ["serif"]}):
        draw(made, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
