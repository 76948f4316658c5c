"""The features of files and shards are the model's own for any number of processes, and a killed call continues."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.closeness import assert_sums_close, encoder_terms
from tests.support.finished import run_config, write_run
from tests.support.golden import CASES, golden
from tests.support.media import grey_frames, video
from tests.support.s3 import s3_server
from tests.support.shards import image, write_demo_shards, write_tar
from tests.unit.inference.folders import BAD, IMAGES, VIDEOS, files_of, index_of, left_out, vectors_of
from univitar_ds import UniViTARModel
from univitar_ds.config.data import S3Config
from univitar_ds.data.media.frame_sampling import Sampling
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.data.media.video_decode import decode_video
from univitar_ds.errors import ConfigError, UserError
from univitar_ds.inference import embed_files as module
from univitar_ds.inference.embed_files import EmbedOptions, ModelOptions, embed_files
from univitar_ds.inference.sources import Position
from univitar_ds.inference.writing.destination import Destination, FinishedPart
from univitar_ds.inference.writing.parts import SafetensorsPart

KINDS = {"cut.jpg": "corrupt", "empty.png": "unreadable", "tile.tif": "too_large", "words.jpg": "unreadable"}


def embed(run, sources, out: Path, *, how: dict | None = None, **options) -> str:
    given = ModelOptions(**{"nproc": 1, "workers": 1, **(how or {})})
    return embed_files(str(run), list(map(str, sources)), out, EmbedOptions(progress=False, **options), given)[1]


def terms(model: UniViTARModel) -> int:
    """Numbers on the longest path to an embedding; items have at most 64 tokens."""
    config = model.encoder.config
    return encoder_terms(config, 64) + 4 * config.hidden_size + 64


def opened(path: str) -> Image.Image | list[Image.Image]:
    if not path.endswith(".mp4"):
        return Image.open(path)
    frames = decode_video(Path(path).read_bytes(), frames=4, limits=DecodeLimits(10**6, 30.0))
    return [Image.fromarray(frame) for frame in frames]


@pytest.fixture(scope="module")
def written(run, folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("written") / "f.safetensors"
    said = embed(run, [folder], out, how={"token_budget": 30})
    assert f"{IMAGES + VIDEOS} rows in f-00000.safetensors" in said
    assert f"{len(BAD)} left out" in said
    return out


@pytest.mark.numeric
def test_the_embeddings_are_those_of_encode_image(run, folder, written):
    model = UniViTARModel.from_pretrained(run)
    found = vectors_of(written)
    names = sorted(name for name in os.listdir(folder) if name.endswith(("png", "mp4")) and name not in BAD)
    assert list(found) == [str(folder / name) for name in names]
    wanted = model.encode_image([opened(path) for path in found])
    assert_sums_close(torch.stack(list(found.values())), wanted, terms(model))


def test_bad_files_are_listed_with_the_reason(folder, written):
    assert left_out(written) == {str(folder / name): kind for name, kind in KINDS.items()}
    names = ["f-00000.safetensors", "f.safetensors.bad.jsonl", "f.safetensors.index.json"]
    assert sorted(files_of(written.parent)) == names
    assert not any(path.is_dir() for path in written.parent.iterdir())


@pytest.mark.numeric
def test_tokens_are_those_of_features(run, folder, tmp_path):
    out = tmp_path / "t.safetensors"
    embed(run, [folder], out, tokens=True, part_rows=6)
    model = UniViTARModel.from_pretrained(run)
    index = index_of(out)
    wanted = model.features([opened(key) for key in index["key"]])
    parts = [load_file(out.with_name(part["file"])) for part in index["parts"]]
    assert len(parts) == 3
    for place, (part, row) in enumerate(zip(index["part"], index["row"], strict=True)):
        begin, end = parts[part]["offsets"][row : row + 2].tolist()
        assert parts[part]["grid_thw"][row].tolist() == wanted.grid_thw[place].tolist()
        assert_sums_close(parts[part]["tokens"][begin:end], wanted.tokens[place], terms(model))
    assert sum(len(part["tokens"]) for part in parts) == sum(map(len, wanted.tokens))


@pytest.mark.numeric
def test_an_encoder_alone_gives_the_mean_of_its_tokens(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(image(56, 84, index, "PNG"))
    out = tmp_path / "m.safetensors"
    embed(golden(CASES[0]).folder, [tmp_path], out, how={"dtype": torch.float32})
    model = UniViTARModel.from_pretrained(golden(CASES[0]).folder, dtype=torch.float32)
    found = vectors_of(out, "mean")
    wanted = model.features([Image.open(path) for path in found])
    longest = max(map(len, wanted.tokens))
    assert_sums_close(torch.stack(list(found.values())), wanted.pooled, encoder_terms(model.encoder.config, longest))


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_give_the_same_bytes(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_UNIT_ITEMS", {"embedding": 3})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    write_demo_shards(tmp_path / "shards", images=10, videos=4, shards=2)
    results = []
    for nproc in (1, 2):
        out = tmp_path / f"{nproc}" / "f.safetensors"
        out.parent.mkdir()
        embed(run, [folder, tmp_path / "shards"], out, how={"nproc": nproc, "token_budget": 100}, part_rows=8)
        results.append(files_of(out.parent))
    torch.set_num_threads(before)
    assert len(results[0]) == 7
    assert results[0] == results[1]


def test_samples_need_no_captions_and_bad_ones_are_listed(run, tmp_path):
    samples = [("a", {"png": image(28, 42, 1, "PNG")}), ("b", {"txt": b"no image"}), ("c", {"png": b"nothing"})]
    samples.append(("d", {"png": image(42, 28, 2, "PNG"), "json": b"{", "cls": b"4"}))
    write_tar(tmp_path / "x.tar", samples)
    embed(run, [tmp_path / "x.tar"], tmp_path / "f.safetensors")
    assert list(vectors_of(tmp_path / "f.safetensors")) == ["x/a", "x/d"]
    assert left_out(tmp_path / "f.safetensors") == {"x/b": "no_media", "x/c": "unreadable"}


def test_shards_and_files_on_s3_give_the_same_as_on_a_disk(run, tmp_path):
    write_demo_shards(tmp_path / "s", images=6, videos=2, shards=1)
    (tmp_path / "s" / "x.png").write_bytes(image(28, 42, 1, "PNG"))
    (tmp_path / "x.png").write_bytes(image(28, 42, 1, "PNG"))
    embed(run, [tmp_path / "s", tmp_path / "x.png"], tmp_path / "local.safetensors")
    with s3_server() as server:
        place = server.upload(tmp_path / "s", "p")
        how = {"s3": S3Config(endpoint_url=server.url)}
        embed(run, [place, f"{place}/x.png", f"{place}/y.png"], tmp_path / "s3.safetensors", how=how)
    local, remote = (list(vectors_of(tmp_path / f"{name}.safetensors").items()) for name in ("local", "s3"))
    assert len(local) == len(remote) == 12
    for (_, one), (_, other) in zip(local, remote, strict=True):
        assert torch.equal(one, other)
    assert [key for key, _ in local[:-1]] == [key for key, _ in remote[:-1]]
    assert left_out(tmp_path / "s3.safetensors") == {f"{place}/y.png": "unreadable"}


def test_a_folder_on_s3_gives_the_same_as_on_a_disk(run, folder, written, tmp_path):
    with s3_server() as server:
        place = server.upload(folder, "photos/holiday")
        server.put("photos/.hidden/x.png", image(28, 28, 1, "PNG"))
        how = {"token_budget": 30, "s3": S3Config(endpoint_url=server.url)}
        said = embed(run, [place.removesuffix("/holiday")], tmp_path / "f.safetensors", how=how)
        assert f"{IMAGES + VIDEOS} rows in f-00000.safetensors" in said
        again = embed(run, [place.removesuffix("/holiday")], tmp_path / "f.safetensors", how=how)
        assert "is already complete" in again
    local, remote = vectors_of(written), vectors_of(tmp_path / "f.safetensors")
    assert list(remote) == [key.replace(str(folder), place) for key in local]
    for one, other in zip(local.values(), remote.values(), strict=True):
        assert torch.equal(one, other)
    assert left_out(tmp_path / "f.safetensors") == {f"{place}/{name}": kind for name, kind in KINDS.items()}


def test_damage_in_a_shard_loses_only_the_samples_that_it_hits(run, tmp_path):
    write_tar(tmp_path / "x.tar", [(f"k{index}", {"png": image(28, 28, index, "PNG")}) for index in range(6)])
    data = bytearray((tmp_path / "x.tar").read_bytes())
    at = data.index(b"k2.png")
    data[at : at + 512] = bytes([7]) * 512
    (tmp_path / "x.tar").write_bytes(data)
    embed(run, [tmp_path / "x.tar"], tmp_path / "f.safetensors")
    assert list(vectors_of(tmp_path / "f.safetensors")) == ["x/k0", "x/k1", "x/k3", "x/k4", "x/k5"]
    assert list(left_out(tmp_path / "f.safetensors").values()) == ["damaged"]


def test_a_missing_file_and_a_special_file_are_left_out(run, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(image(28, 28, 1, "PNG"))
    os.mkfifo(tmp_path / "b.png")
    os.symlink(tmp_path / "nothing", tmp_path / "c.png")
    embed(run, [tmp_path], tmp_path / "f.safetensors")
    assert left_out(tmp_path / "f.safetensors") == {str(tmp_path / f"{name}.png"): "unreadable" for name in "bc"}


def test_the_configuration_of_a_run_determines_the_sampling_of_frames(folder, tmp_path):
    stages = run_config().model_dump(mode="json")["stages"]
    stages[0] |= {"video_frames": 6, "video_sampling": {"kind": "fps", "fps": 2.0, "jitter": True}}
    write_run(tmp_path / "run", run_config(stages=stages))
    reading = module.open_for_files(str(tmp_path / "run"), ModelOptions(nproc=1)).setup.reading
    assert (reading.frames, reading.sampling) == (6, Sampling("fps", 2.0, jitter=False))
    (tmp_path / "v.mp4").write_bytes(video(grey_frames(20), rate=10))
    embed(tmp_path / "run", [tmp_path / "v.mp4"], tmp_path / "f.safetensors", tokens=True)
    assert load_file(tmp_path / "f-00000.safetensors")["grid_thw"][0, 0] == 2  # 2 s: 4 frames
    embed(tmp_path / "run", [tmp_path / "v.mp4"], tmp_path / "g.safetensors", tokens=True, how={"frames": 10})
    assert load_file(tmp_path / "g-00000.safetensors")["grid_thw"][0, 0] == 5


def test_a_video_that_cannot_fit_is_left_out(run, folder, tmp_path):
    embed(run, [folder], tmp_path / "f.safetensors", how={"frames": 1000})
    faults = {os.path.basename(key): kind for key, kind in left_out(tmp_path / "f.safetensors").items()}
    assert faults == KINDS | {f"i{index:02d}-moving.mp4": "too_large" for index in range(VIDEOS)}
    with pytest.raises(ConfigError, match="even number"):
        embed(run, [folder], tmp_path / "g.safetensors", how={"frames": 3})


class Interrupted(Exception):
    """Ends a call in the middle."""


def test_an_interrupted_call_continues_with_the_first_unfinished_part(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_UNIT_ITEMS", {"embedding": 2})
    whole, out = tmp_path / "whole" / "f.safetensors", tmp_path / "again" / "f.safetensors"
    for path in (whole, out):
        path.parent.mkdir()
    embed(run, [folder], whole, part_rows=4)
    begun = []
    begin, add = Destination.begin, SafetensorsPart.add

    def note(self, number, *rest):
        begun.append(number)
        return begin(self, number, *rest)

    def interrupt(self, rows):
        add(self, rows)
        if rows.unit.part == 2:
            raise Interrupted

    monkeypatch.setattr(Destination, "begin", note)
    monkeypatch.setattr(SafetensorsPart, "add", interrupt)
    with pytest.raises(Interrupted):
        embed(run, [folder], out, part_rows=4)
    assert sorted(files_of(out.parent)) == ["f-00000.safetensors", "f-00001.safetensors"]
    (out.parent / ".f-00002.safetensors.partial").write_bytes(b"of a process that was killed")
    monkeypatch.setattr(SafetensorsPart, "add", add)
    embed(run, [folder], out, part_rows=4)
    assert begun == [0, 1, 2, 2, 3, 4]
    assert files_of(out.parent) == files_of(whole.parent)
    assert "already complete" in embed(run, [folder], out, part_rows=4)
    assert len(begun) == 6


@pytest.mark.parametrize(
    ("after", "is_forged"), [([0, 7], False), ([0, 4], True), ([1, 1], True), ([0, 9], True), ([2, 0], True)]
)
def test_a_changed_position_of_a_finished_part_is_an_error(tmp_path, after, is_forged):
    """It would leave items out. A checksum shows damage, and places and order show most of what was forged."""
    out = Destination(tmp_path / "f.safetensors")
    record = tmp_path / ".f.safetensors.progress" / "part-00001.json"
    with out.opened({}):
        for number, position in enumerate((Position(0, 4), Position(0, 8))):
            part = out.begin(number, "embedding", 2)
            out.finish(number, part, FinishedPart(out.name_of(number), position, ["key"]))
        assert out.after(2, [9]) == Position(0, 8)
        content = json.loads(record.read_text(encoding="utf-8"))
        content["after"] = after
        if is_forged:
            del content["crc32"]
        record.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ConfigError, match=r"part-00001\.json is damaged.*remove .*progress and the parts"):
            out.after(2, [9])


@pytest.mark.parametrize(("changes", "said"), [
    ({"part_rows": 3}, "part_rows"), ({"tokens": True}, "features and part_rows and width"),
    ({"how": {"token_budget": 9}}, "token_budget"), ({"how": {"dtype": torch.bfloat16}}, "dtype and model"),
])  # fmt: skip
def test_another_result_is_not_continued_or_replaced(run, folder, written, changes, said):
    given = {"how": {"token_budget": 30}, **changes}
    before = files_of(written.parent)
    with pytest.raises(ConfigError, match=said):
        embed(run, [folder], written, **given)
    assert files_of(written.parent) == before


def test_changed_sources_are_noticed(run, folder, written):
    with pytest.raises(ConfigError, match="sources"):
        embed(run, [folder / "i00.png"], written, how={"token_budget": 30})


def test_files_of_others_are_not_replaced(run, folder, tmp_path):
    (tmp_path / "f-00000.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="of another result"):
        embed(run, [folder], tmp_path / "f.safetensors")
    assert (tmp_path / "f-00000.safetensors").read_bytes() == b"mine"
    (tmp_path / "g.safetensors.index.json").write_text(json.dumps([]))
    with pytest.raises(ConfigError, match="not an index of this command"):
        embed(run, [folder], tmp_path / "g.safetensors")


def test_one_process_at_a_time_writes_a_result(run, folder, tmp_path):
    one, other = Destination(tmp_path / "f.safetensors"), Destination(tmp_path / "f.safetensors")
    with one.opened({"a": 1}), pytest.raises(ConfigError, match="another process is writing"), other.opened({"a": 1}):
        pass


@pytest.mark.parametrize(
    ("name", "content"),
    [("part-00000.json", "{}"), ("part-00000.json", '{"file": "f", "after": [0, 1], "keys": [3], "left_out": []}'),
     ("part-00000.json", "[" * 100_000), ("settings.json", "3")],
)  # fmt: skip
def test_a_damaged_record_of_an_interrupted_call_is_an_error_with_the_remedy(tmp_path, name, content):
    begun = Destination(tmp_path / "f.safetensors")
    with begun.opened({"a": 1}):
        pass
    (tmp_path / ".f.safetensors.progress" / name).write_text(content)
    with pytest.raises(ConfigError, match=f"{name} is damaged; remove .* start again"), begun.opened({"a": 1}):
        begun.part(0)


@pytest.mark.parametrize(("out", "said"), [("f.npy", "must end in"), ("no/f.safetensors", "there is no folder")])
def test_names_that_cannot_be_written_are_an_error_before_the_work(run, tmp_path, out, said):
    with pytest.raises(ConfigError, match=said):
        embed("no model", ["nothing"], tmp_path / out)


@pytest.mark.distributed
def test_an_error_in_a_process_is_reported(run, folder, tmp_path, monkeypatch):
    opened = module.open_for_files

    def broken(*arguments, **given):
        found = opened(*arguments, **given)
        return module.replace(found, setup=module.replace(found.setup, folder=str(tmp_path / "gone")))

    monkeypatch.setattr(module, "open_for_files", broken)
    with pytest.raises(UserError, match="gone is neither a folder"):
        embed(run, [folder], tmp_path / "f.safetensors", how={"nproc": 2})
