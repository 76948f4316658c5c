"""Files made to exhaust memory or time, read in a process with `memory_limits.confine` as in every command.

Such a process does not exceed its limit or hang, and the file is a bad sample with a message.
"""

import json
import sys

import pytest

from tests.support import media
from tests.support.hostile import FILES, MIB, ORDINARY, claiming
from tests.support.progress import run_watched
from tests.support.shards import write_tar

READER = """
import json, os, sys
from univitar_ds.data.media.image_decode import decode_image
from univitar_ds.data.media.memory_limits import confine
from univitar_ds.data.media.probe import probe
from univitar_ds.data.media.types import VIDEO_EXTENSIONS, DecodeLimits
from univitar_ds.data.media.video_decode import decode_video
from univitar_ds.errors import SampleError

def outcome(read):
    try:
        return "read", str(read())
    except SampleError as error:
        return error.kind, str(error)
    except MemoryError:
        return "too_large", "more memory than allowed"

def read_file(path):
    data, extension = open(path, "rb").read(), path.rpartition(".")[2]
    confine(10**8, len(data))
    yield outcome(lambda: probe(data, extension))
    if extension in VIDEO_EXTENSIONS:
        yield outcome(lambda: decode_video(data, frames=2, limits=DecodeLimits(10**8, 60.0)).shape)
    else:
        yield outcome(lambda: decode_image(data, max_px=10**8).shape)

for path in sys.argv[1:]:
    out, into = os.pipe()
    if os.fork() == 0:
        os.write(into, json.dumps(list(read_file(path))).encode())
        os._exit(0)
    os.close(into)
    answer = os.read(out, 1 << 16)
    _, status, used = os.wait4(-1, 0)
    print(json.dumps([status, json.loads(answer or "null"), used.ru_maxrss >> 10]))
print(json.dumps(int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10))
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """{name: (exit status, [(kind, message) of probing and decoding], MiB of the process, MiB of the file)}, and the
    MiB of the parent process."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, make in (ORDINARY | FILES).items():
        (folder / name).write_bytes(make())
    paths = [folder / name for name in ORDINARY | FILES]
    *lines, parent = run_watched([sys.executable, "-c", READER, *map(str, paths)], check=True).stdout.splitlines()
    rows = zip(paths, map(json.loads, lines), strict=True)
    return {path.name: (*row, path.stat().st_size / MIB) for path, row in rows}, json.loads(parent)


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_a_bad_sample_and_its_process_stays_within_the_limit(name, read):
    status, outcomes, process_mib, file_mib = read[0][name]
    assert status == 0, outcomes
    kind, message = outcomes[1]
    assert kind in ("corrupt", "unreadable", "no_video", "too_large"), outcomes
    assert message
    least = min(read[0][ordinary][2] for ordinary in ORDINARY)
    assert process_mib < least + 1024 + 2 * file_mib


def test_the_parent_process_takes_no_more_memory_than_for_ordinary_files(read):
    rows, parent_mib = read
    assert [(rows[name][0], rows[name][1][1][0]) for name in ORDINARY] == [(0, "read")] * 2
    assert parent_mib < min(rows[name][2] for name in ORDINARY) + 50


TRAINER = """
import sys
from tests.support.loading import STAGE, only_lane
from univitar_ds.config.data import DataConfig, SourceConfig

def peak_mib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10

folder, modality = sys.argv[1:]
limits = {"max_bad_per_thousand": 1000, "max_bad_in_a_row": 1000}
data = DataConfig(sources=[SourceConfig(path=folder)], workers=1, pool_samples=8, worker_restarts=100, **limits)
bad = 0
with only_lane(data, STAGE, modality) as packs:
    for _ in range(40):
        pack = next(packs)[0]
        bad += sum(pack.bad.values())
        assert all(key.rpartition("/")[2].startswith("ordinary") for key in pack.keys), pack.keys
print(bad, peak_mib())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("modality", "extension"), [("video", "mp4"), ("image", "j2k")])
def test_a_trainer_takes_no_more_memory_for_shards_with_hostile_files(tmp_path, modality, extension):
    """Reading the header of each hostile file would take half a gibibyte and a second."""
    ordinary = ORDINARY["ordinary.mp4" if modality == "video" else "ordinary.png"]()
    hostile = [make() for name, make in FILES.items() if name.endswith(extension)]
    kind = "mp4" if modality == "video" else "png"
    good = [(f"ordinary{n:02d}", {kind: ordinary, "txt": b"t"}) for n in range(30)]
    spoiled = [(f"hostile{n:02d}", {extension: content, "txt": b"t"}) for n, content in enumerate(hostile)]

    def trained_on(samples):
        folder = write_tar(tmp_path / str(len(samples)) / "a.tar", samples).parent
        result = run_watched([sys.executable, "-c", TRAINER, str(folder), modality], check=True)
        return map(int, result.stdout.split())

    none, ordinary_mib = trained_on(good)
    bad, peak_mib = trained_on([*good[:10], *spoiled, *good[10:]])
    assert (none, bad >= len(hostile)) == (0, True)
    assert peak_mib < ordinary_mib + 64


FUZZ = """
import random, sys
from univitar_ds.data.media.memory_limits import confine
from univitar_ds.data.media.probe import probe
from univitar_ds.errors import SampleError
chance, whole, outcomes = random.Random(0), [open(path, "rb").read() for path in sys.argv[1:]], set()
names = [b"stts", b"stsz", b"stsc", b"stco", b"co64", b"ctts", b"stss", b"trun", b"moov", b"trak", b"stsd", b"cmov"]
confine(10**8, 1 << 20)
for turn in range(1000):
    data = bytearray(chance.choice(whole))
    for _ in range(chance.choice((1, 3, 20))):
        at, length = chance.randrange(len(data)), chance.randrange(1, 9)
        piece = (bytes(length), b"", b"\\xff" * 4, chance.randbytes(length), chance.choice(names))
        data[at : at + length] = chance.choice(piece)
    if turn % 3 == 0:
        del data[chance.randrange(len(data)) :]
    try:
        probe(bytes(data), "mp4")
        outcomes.add("read")
    except SampleError as error:
        outcomes.add(error.kind)
    except MemoryError:
        outcomes.add("too_large")
print(*sorted(outcomes))
"""


def test_a_process_that_reads_random_changes_of_a_video_survives_and_reports_errors(tmp_path):
    whole = [claiming(1000), media.video(media.grey_frames(8), options={"movflags": "frag_keyframe+empty_moov"})]
    whole += [make() for name, make in FILES.items() if name in ("packed.mp4", "inside.mp4", "aside.mp4")]
    paths = [tmp_path / f"{number}.mp4" for number in range(len(whole))]
    for path, data in zip(paths, whole, strict=True):
        path.write_bytes(data)
    outcomes = run_watched([sys.executable, "-c", FUZZ, *map(str, paths)], check=True).stdout.split()
    assert {"read", "corrupt"} <= set(outcomes) <= {"read", "corrupt", "unreadable", "no_video", "too_large"}
