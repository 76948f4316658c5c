"""Unusual, broken and hostile files from the test suites of other projects: decoded correctly, or left out and counted.

Every file is read as a sample of a shard, through a lane and a decoding process.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.support.loading import only_lane
from tests.support.paths import ROOT
from tests.support.progress import run_watched
from tests.support.shards import write_tar
from univitar_ds.config.data import DataConfig
from univitar_ds.config.stage import ResolutionConfig, StageConfig
from univitar_ds.data.loader import eval_packs
from univitar_ds.data.media.image_decode import decode_image
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.data.media.video_decode import decode_video
from univitar_ds.data.sampler.bad_samples import KINDS

CORPUS = ROOT.parent / "shared/data/nasty"
INDEX = CORPUS / "index.jsonl"
ROWS = [json.loads(line) for line in INDEX.read_text().splitlines()] if INDEX.is_file() else []
GIB = 1 << 20  # ru_maxrss counts KiB

pytestmark = [
    pytest.mark.skipif(not ROWS, reason=f"the corpus is not there: {CORPUS}"),
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
]

PROBE = """
import resource, sys
from univitar_ds.cli.main import main
status = main(["data", "probe", "--json", *sys.argv[1:]])
for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
    print(resource.getrusage(who).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""


def probed(files):
    """The lines that `data probe` prints, and the peak memory of its process and of a decoding process in KiB."""
    command = [sys.executable, "-c", PROBE, *map(str, files)]
    done = run_watched(command, check=True, cwd=ROOT, errors="replace")
    memory = [int(line) for line in done.stderr.splitlines()[-2:]]
    return [json.loads(line) for line in done.stdout.splitlines()], memory


@pytest.fixture(scope="module")
def probe():
    """The line that was printed for each file, and the memory of the corpus above that of one ordinary image."""
    _, base = probed([CORPUS / "images/irs_3.jpg"])
    lines, memory = probed([CORPUS / row["file"] for row in ROWS])
    assert [line["file"] for line in lines] == [str(CORPUS / row["file"]) for row in ROWS]
    named = {row["file"]: line for row, line in zip(ROWS, lines, strict=True)}
    return named, [most - least for most, least in zip(memory, base, strict=True)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["file"])
def test_a_file_is_decoded_or_rejected_as_expected(row, probe):
    line = probe[0][row["file"]]
    if not line["ok"]:
        assert row["expect"] != "decode", f"refused: {line['error']}: {line['message']}"
        assert line["error"] in KINDS
        assert "\n" not in line["message"]
        assert "0x" not in line["message"], "an address differs from run to run"
        return
    assert row["expect"] != "reject", line
    assert line["kind"] == row["kind"]
    t, h, w = line["grid"]
    assert line["tokens"] == t * h * w > 0
    assert line["frames"] == 1 or line["kind"] == "video"
    seen = next((value for name, value in row.items() if name.startswith("observed_pillow")), {})
    if seen.get("ok"):
        assert [line["width"], line["height"]] == seen["display_size"]


def test_no_file_kills_or_stalls_its_process(probe):
    assert {line["error"] for line in probe[0].values()} & {"crash", "timeout"} == set()


def test_the_corpus_takes_less_than_a_gibibyte_above_an_ordinary_image(probe):
    reading, decoding = probe[1]
    assert reading < GIB
    assert decoding < GIB


@pytest.mark.parametrize("modality", ["image", "video"])
def test_the_loader_returns_the_good_files_and_counts_the_others(modality, probe, tmp_path):
    rows = [row for row in ROWS if row["kind"] == modality and Path(row["file"]).suffix]
    samples = []
    for number, row in enumerate(rows):
        path = CORPUS / row["file"]
        samples.append((f"{number:04d}", {path.suffix[1:].lower(): path.read_bytes(), "txt": b"an odd file"}))
    write_tar(tmp_path / "odd.tar", samples)
    expected = {f"odd/{number:04d}": probe[0][row["file"]] for number, row in enumerate(rows)}
    good = {key for key, line in expected.items() if line["ok"]}
    # A file without a known extension has no modality; in a shard of unknown content it is counted as an image.
    mine = {key: line for key, line in expected.items() if line["error"] != "no_media" or modality == "image"}
    bad = Counter(line["error"] for line in mine.values() if not line["ok"])

    data = DataConfig(
        sources=[{"path": str(tmp_path / "odd.tar")}],
        lanes=1,
        workers=1,
        max_bad_per_thousand=1000,
        max_bad_in_a_row=1000,
    )
    delivered, counted = swept(data, modality)
    assert delivered == Counter(good)
    assert counted == bad
    assert trained_on(data, modality, len(good)) == good


SMALL = {"min_tokens": 4, "max_tokens": 400, "divisor_px": 14}


def swept(data, modality):
    """(number by key, number by kind of error) of the samples in one pass over the source."""
    delivered, counted = Counter(), Counter()
    packs = eval_packs(
        data.sources,
        modality=modality,
        resolution=ResolutionConfig(**SMALL).rule(),
        video_frames=8,
        token_budget=400,
        tokenizer=None,
        context_length=8,
        data=data,
    )
    for pack in packs:
        delivered.update(pack.keys)
        counted.update(pack.bad)
    return delivered, counted


def trained_on(data, modality, different):
    """The keys that a lane returns, until there are `different` distinct ones."""
    ratio = 1.0 if modality == "video" else 0.0
    stage = StageConfig(name="odd", samples=1, lr=1e-3, image=SMALL, video=SMALL, video_ratio=ratio, token_budget=400)
    keys = set()
    with only_lane(data, stage, modality) as loader:
        while len(keys) < different:
            keys.update(next(loader)[0].keys)
    return keys


def pixels(name):
    """The decoded pixels of a file at its own size."""
    data = (CORPUS / name).read_bytes()
    if name.startswith("videos"):
        return decode_video(data, frames=4, limits=DecodeLimits(100_000_000, 30.0))
    return decode_image(data, max_px=100_000_000)


@pytest.mark.parametrize("kind", ["Landscape", "Portrait"])
def test_a_photo_looks_the_same_in_every_exif_orientation(kind):
    names = [row["file"] for row in ROWS if Path(row["file"]).name.startswith(f"{kind}_")]
    images = [pixels(name).astype(np.float32) for name in names]
    assert len(images) >= 3
    for image in images[1:]:
        assert image.shape == images[0].shape
        # Every file was encoded separately, and shows its number.
        assert np.corrcoef(image[::8, ::8].ravel(), images[0][::8, ::8].ravel())[0, 1] > 0.9


def test_the_same_video_is_decoded_upright_with_and_without_a_rotation():
    straight, turned = (np.asarray(pixels(f"videos/decord_video_{angle}.mov")) for angle in (0, 90))
    assert straight.shape[1:3] == turned.shape[1:3][::-1]
