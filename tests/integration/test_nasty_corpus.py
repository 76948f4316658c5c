"""Odd, broken and hostile files from other projects' test suites: each is read well or refused with a reason."""

import json
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from univitar_ds.data.clips import decode_clip
from univitar_ds.data.decode import decode_image
from univitar_ds.data.probe import probe
from univitar_ds.errors import SampleError

CORPUS = Path(__file__).parents[2].parent / "shared/data/nasty"
INDEX = CORPUS / "index.jsonl"
ROWS = [json.loads(line) for line in INDEX.read_text().splitlines()] if INDEX.is_file() else []
LIMITS = {"max_px": 100_000_000}

pytestmark = [
    pytest.mark.skipif(not ROWS, reason=f"the corpus is not there: {CORPUS}"),
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
]


def read(row):
    data = (CORPUS / row["file"]).read_bytes()
    size = probe(data, Path(row["file"]).suffix)
    assert size.kind == row["kind"]
    if size.kind == "image":
        return size, decode_image(data, **LIMITS)
    return size, decode_clip(data, frames=4, timeout_s=30.0, **LIMITS)


def outcome(row):
    """(size, pixels), or the error that refused the file."""
    try:
        return read(row)
    except SampleError as error:
        return error


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["file"])
@pytest.mark.timeout(60)
def test_a_file_is_read_or_refused_as_expected(row):
    result = outcome(row)
    if isinstance(result, SampleError):
        assert row["expect"] != "decode", f"refused: {result.kind}: {result}"
        assert result.kind
        assert "\n" not in str(result)
        assert "0x" not in str(result), "an address differs from run to run"
        return
    size, pixels = result
    assert row["expect"] != "reject", f"decoded to {pixels.shape}"
    assert pixels.dtype == np.uint8
    assert pixels.shape[-3:] == (size.height, size.width, 3)
    seen = next((value for name, value in row.items() if name.startswith("observed_pillow")), {})
    if seen.get("ok"):
        assert [size.width, size.height] == seen["display_size"]


@pytest.mark.parametrize("kind", ["Landscape", "Portrait"])
def test_a_photo_looks_the_same_in_every_exif_orientation(kind):
    rows = [row for row in ROWS if Path(row["file"]).name.startswith(f"{kind}_")]
    pictures = [read(row)[1].astype(np.float32) for row in rows]
    assert len(pictures) >= 3
    for picture in pictures[1:]:
        assert picture.shape == pictures[0].shape
        # Every file was encoded anew and has its number printed in it.
        assert np.corrcoef(picture[::8, ::8].ravel(), pictures[0][::8, ::8].ravel())[0, 1] > 0.9


def test_the_same_clip_comes_out_upright_with_and_without_a_rotation():
    straight, turned = (read({"file": f"videos/decord_video_{angle}.mov", "kind": "video"})[1] for angle in (0, 90))
    assert straight.shape[1:3] == turned.shape[1:3][::-1]


def test_the_corpus_costs_neither_much_time_nor_memory():
    began = time.process_time()
    for row in ROWS:
        outcome(row)
    assert time.process_time() - began < 120
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6 * 2**20  # KiB
