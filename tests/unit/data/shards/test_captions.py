"""Texts of other producers: a sample with a caption is used, and unusable content is counted by kind."""

import json
import logging
import zlib

import pytest

from tests.support import media
from tests.support.loading import STAGE, only_lane
from tests.support.packing import image_row, pack
from tests.support.shards import image, sidecar, write_tar
from univitar_ds.cli.main import main
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.config.load import changed_result, check_config
from univitar_ds.data.caption_texts import iterate_captions
from univitar_ds.data.loader import eval_packs
from univitar_ds.data.shards.captions import BYTES_LIMIT, IGNORED, MAX_CAPTIONS, Texts, parsed, read_texts
from univitar_ds.data.tools.inspect import Stream
from univitar_ds.data.tools.verify import verify
from univitar_ds.errors import SampleError
from univitar_ds.training.logging.metrics import IGNORED_OF_KIND

RED = b"a red square"
PNG = image(28, 28, form="PNG")
DEEP = b'{"exif": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
# (content of a .json next to a .txt with "a red square", kinds of ignored content)
BESIDE_TXT = [
    (b'{"captions": []}', {}),
    (b'{"captions": null, "caption": null, "status": "success", "exif": "{}", "sha256": "ab"}', {}),
    (b'{"caption": ""}', {"bad_caption"}),
    (b'{"caption": " \\n\\u200b\\u0000"}', {"bad_caption"}),
    (b'{"captions": ["", "  "]}', {"bad_caption"}),
    (b'{"caption": NaN}', {"bad_caption"}),
    (b'{"caption": Infinity}', {"bad_caption"}),
    (b'{"caption": 3}', {"bad_caption"}),
    (b'{"captions": {"0": "a"}}', {"bad_caption"}),
    (b'{"captions": [["a", "b"]]}', {"bad_caption"}),
    (b'{"captions": true, "caption": {}}', {"bad_caption"}),
    (b'["a", "list"]', {"bad_json"}),
    (b"17", {"bad_json"}),
    (b"null", {"bad_json"}),
    (b"", {"bad_json"}),
    (b'{"caption": "cut', {"bad_json"}),
    (b'{"caption": "caf\xe9"}', {"bad_json"}),
    (DEEP, {"bad_json"}),
    (b'{"caption": "' + b"x" * BYTES_LIMIT + b'"}', {"too_large"}),
    (b'{"label": [1, 2]}', {"bad_label"}),
    (b'{"label": true}', {"bad_label"}),
    (b'{"label": NaN}', {"bad_label"}),
    (b'{"label": {"name": "cat"}}', {"bad_label"}),
    (b'{"label": null, "set": null, "crc32": null}', {}),
    (b'{"set": 3}', {"bad_set"}),
    (b'{"crc32": "1a2b3c4d"}', {"bad_checksum"}),
    (b'{"crc32": 7}', {"bad_checksum"}),
    (
        b'{"crc32": -1, "set": [], "label": [], "captions": [0]}',
        {"bad_checksum", "bad_set", "bad_label", "bad_caption"},
    ),
    (b'{"phash": ' + b"9" * 5000 + b"}", {}),
]


@pytest.mark.parametrize(("content", "ignored"), BESIDE_TXT, ids=[str(content)[:40] for content, _ in BESIDE_TXT])
def test_the_caption_of_the_txt_is_used_with_any_unusable_json(content, ignored):
    found = read_texts({"json": content, "txt": RED})
    assert (found.captions, found.label, found.set, found.crc32) == (("a red square",), None, None, None)
    assert {one.kind for one in found.ignored} == set(ignored) <= set(IGNORED)
    assert all("\n" not in one.message and len(one.message) < 200 for one in found.ignored)


@pytest.mark.parametrize(
    ("content", "captions", "ignored"),
    [
        (b'{"caption": ["a red square", "two"]}', ("a red square", "two"), 0),
        (b'{"captions": ["ok", ""]}', ("ok",), 1),
        (b'{"captions": [null, " ok ", 3, "also"]}', ("ok", "also"), 1),
        (b'{"captions": [{"caption": "a red square", "id": 7}]}', ("a red square",), 0),
        (b'{"captions": [], "caption": "one"}', ("one",), 0),
        (b'{"captions": NaN, "caption": "one"}', ("one",), 1),
        (b'{"caption": "first", "caption": "last"}', ("last",), 0),
        ('\ufeff{"caption": "grün"}'.encode(), ("grün",), 0),
        ('{"caption": "grün"}'.encode("utf-16"), ("grün",), 0),
        (b'{"caption": "a\tb\nc"}', ("a\tb\nc",), 0),
        (b'{"caption": "half \\ud83d"}', ("half ?",), 0),
        (b'{"TEXT": "of a table", "label": "cat"}', ("of a table",), 0),
        (b'{"text": "of a table", "caption": ""}', ("of a table",), 1),
        (b'{"text": "no caption", "caption": "one"}', ("one",), 0),
    ],
)
def test_usable_captions_of_a_json_are_used(content, captions, ignored):
    found = read_texts({"json": content})
    assert found.captions == captions
    assert len(found.ignored) == ignored
    for caption in found.captions:
        caption.encode()


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        (RED, ("a red square",)),
        (b"\xef\xbb\xbfa red square\r\n", ("a red square",)),
        ("\ufeffgrün\n".encode("utf-16-le"), ("grün",)),
        ("\ufeffgrün\n".encode("utf-32-be"), ("grün",)),
        (b"one\ntwo", ("one\ntwo",)),
    ],
)
def test_a_txt_is_utf_8_or_has_the_encoding_of_its_byte_order_mark(content, captions):
    assert read_texts({"txt": content}).captions == captions


def test_a_sample_with_a_caption_in_its_json_is_used_despite_a_bad_txt_or_cls():
    for members in ({"txt": b""}, {"txt": b"caf\xe9"}, {"txt": b"x" * (BYTES_LIMIT + 1)}, {"cls": b"\xff\xfe\xfd"}):
        assert read_texts({"json": b'{"caption": "c"}', **members}).captions == ("c",)


PARSED = [
    '{"caption": "caf\u00e9 \u706b", "n": [1, -0, 1.5, 1e400, -1E-7, 12345678901234567890123], "t": true, "z": null}',
    '{"caption": "one", "caption": "two"}',
    '{"caption": "\\ud83d\\ude00 \\u0000 \\/ \\" \\b"}',
    '\t{ "caption" : [ "a" , { } , [ ] , "" ] }\r\n',
    '{"caption": "lone \\ud800"}',
    '{"width": 1e3, "height": 300.0, "frames": 0.1}',
]


@pytest.mark.parametrize("text", PARSED)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_json_is_parsed_as_by_the_standard_library(text, encoding):
    content = text.encode(encoding)
    found, wanted = parsed(content), json.loads(content)
    assert found == wanted
    assert repr(found) == repr(wanted), "1 and 1.0 are equal"


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ("1.0", "1"),
        ("1.5", "2"),
        ("true", "2"),
        ("[1, 2]", "2"),
        ('""', "2"),
        ("7", "7"),
        ('"cat"', "cat"),
        ("-1", "-1"),
    ],
)
def test_the_cls_is_used_if_the_label_of_the_json_is_unusable(fields, label):
    assert read_texts({"json": f'{{"label": {fields}}}'.encode(), "cls": b"2\n"}).label == label


def test_a_sample_without_usable_texts_is_left_out_with_the_kind_of_the_first_problem():
    for members, kind in (
        ({"json": b'{"captions": []}'}, "no_caption"),
        ({"json": b'{"caption": NaN}'}, "bad_caption"),
        ({"json": b"[]", "txt": b"\xff"}, "bad_json"),
        ({"json": b'{"label": [1]}'}, "bad_label"),
    ):
        with pytest.raises(SampleError) as caught:
            read_texts(members)
        assert caught.value.kind == kind


def test_a_sample_may_lack_texts_if_they_are_not_required():
    assert read_texts({}, required=False) == Texts((), None)
    found = read_texts({"json": b"{", "cls": b""}, required=False)
    assert (found.captions, found.label, [one.kind for one in found.ignored]) == ((), None, ["bad_json"])


def test_a_checksum_is_used_only_if_data_pack_wrote_it():
    own = json.loads(sidecar(["a"], None, "image", (28, 28, 1), "a.png")) | {"set": None, "crc32": 7}
    assert read_texts({"json": json.dumps(own).encode()}).crc32 == 7
    assert read_texts({"json": b'{"caption": "a", "crc32": 7}'}, packed=True).crc32 == 7
    with pytest.raises(SampleError) as caught:
        read_texts({"json": b'{"caption": "a", "crc32": "7"}'}, packed=True)
    assert caught.value.kind == "bad_json"


def tar_of_others(folder):
    """A tar of another producer: "a" has an unusable label, set and checksum; "c" has no usable caption."""
    odd = b'{"caption": ["a", ""], "label": [1, 2], "set": 3, "crc32": "00ff"}'
    samples = [
        ("a", {"png": PNG, "json": odd}),
        ("b", {"png": PNG, "txt": b"b", "json": b'{"label": 1.0}'}),
        ("c", {"png": PNG, "json": b'{"caption": NaN}'}),
        ("d", {"png": PNG, "txt": b"d", "cls": b"17"}),
    ]
    (folder / "names.txt").write_text("cat\ndog\n")
    return SourceConfig(path=str(write_tar(folder / "others.tar", samples)), class_names=str(folder / "names.txt"))


COUNTED = {"bad_caption": 1, "bad_label": 2, "bad_set": 1, "bad_checksum": 1}


def swept(source, workers=0):
    return list(
        eval_packs(
            [source],
            modality="image",
            resolution=STAGE.resolution("image"),
            video_frames=2,
            token_budget=64,
            tokenizer=None,
            context_length=8,
            data=DataConfig(sources=[source], workers=workers),
        )
    )


def test_evaluation_training_and_tokenizer_use_the_same_samples_and_counts(tmp_path, caplog):
    source = tar_of_others(tmp_path)
    with caplog.at_level(logging.WARNING):
        (pack,) = swept(source)
    assert (pack.captions, pack.labels) == (["a", "b", "d"], [None, "dog", None])
    assert (pack.bad, pack.ignored) == ({"bad_caption": 1}, COUNTED)
    assert (
        "bad_set ignored (number 1; evaluation, image): others/a at byte 0: set is '3' (int), not text" in caplog.text
    )
    assert list(iterate_captions([source], limit=100)) == ["a", "b", "d"]

    data = DataConfig(sources=[source], lanes=1, workers=0, pool_samples=3)
    stage = STAGE.model_copy(update={"video_ratio": 0.0, "token_budget": 8})
    with only_lane(data, stage, "image") as loader:
        (first,) = next(loader)
        assert set(first.captions) <= {"a", "b", "d"}
        assert first.ignored.keys() == COUNTED.keys()
        assert {name for name, kind in IGNORED_OF_KIND.items() if first.ignored.get(kind)} == {
            "ignored_caption",
            "ignored_label",
            "ignored_set",
            "ignored_checksum",
        }


def test_verify_reports_ignored_content(tmp_path, capsys):
    source = tar_of_others(tmp_path)
    report = verify([source], progress=False)
    assert (report["bad"], report["ignored"], report["sound"]) == (
        {"bad_caption": 1},
        dict(sorted(COUNTED.items())),
        False,
    )
    path = write_tar(tmp_path / "good.tar", [("a", {"png": PNG, "txt": b"a", "json": b'{"label": [1, 2]}'})])
    assert main(["data", "verify", str(path), "--report", str(tmp_path / "verify.json")]) == 0
    out = capsys.readouterr().out
    assert "used anyway, bad_label: good/a at byte 0: label is '[1, 2]' (list), not text" in out
    assert "1 samples in 1 shards: sound; texts ignored: 1 bad_label; report in" in out
    assert json.loads((tmp_path / "verify.json").read_text())["shards"][0]["ignored"][0]["kind"] == "bad_label"


def test_a_packed_sample_with_a_wrong_checksum_is_left_out_without_a_manifest(tmp_path):
    own = json.loads(sidecar(["a"], None, "image", (28, 28, 1), "a.png")) | {"set": None}
    samples = [
        (key, {"png": PNG, "json": json.dumps(own | {"crc32": zlib.crc32(PNG) + wrong}).encode()})
        for key, wrong in (("good", 0), ("wrong", 1))
    ]
    report = verify([SourceConfig(path=str(write_tar(tmp_path / "a.tar", samples)))], progress=False)
    assert [(fault["kind"], fault["key"]) for fault in report["shards"][0]["faults"]] == [("checksum", "wrong")]


def test_checksums_of_a_packed_shard_are_compared_without_its_manifest(tmp_path):
    folder = media.write_folder(tmp_path / "folder", {"images/0.jpg": image(48, 64)}, [image_row(0)])
    pack(folder, tmp_path / "out")
    alone = tmp_path / "alone.tar"
    content = bytearray((tmp_path / "out/train-image-000000.tar").read_bytes())
    alone.write_bytes(content)
    assert verify([SourceConfig(path=str(alone))], progress=False)["sound"]
    content[content.index(b"\xff\xda") + 40] ^= 1
    alone.write_bytes(content)
    assert verify([SourceConfig(path=str(alone))], progress=False)["bad"] == {"checksum": 1}


def test_inspect_counts_ignored_content():
    stream = Stream(STAGE, "image")
    stream.ignored.update({"bad_label": 2})
    assert stream.to_json()["ignored"] == {"bad_label": 2}


def tar_of_lines(folder, count=6, name="lines.tar"):
    """A tar as CLIP_benchmark writes retrieval data: several captions in a .txt, one per line."""
    samples = [
        (f"k{n}", {"txt": f"first {n}\nsecond {n}\r\n\n third {n} \n".encode(), "png": PNG}) for n in range(count)
    ]
    return str(write_tar(folder / name, samples))


def test_each_line_of_a_txt_is_a_caption_if_the_source_sets_captions_lines(tmp_path, caplog):
    source = SourceConfig(path=tar_of_lines(tmp_path), captions="lines")
    packs = swept(source)
    assert [caption for pack in packs for caption in pack.captions] == [f"first {n}" for n in range(6)]
    others = [captions for pack in packs for captions in pack.other_captions]
    assert others == [(f"second {n}", f"third {n}") for n in range(6)]
    assert len(set(iterate_captions([source], limit=100))) == 18
    with only_lane(
        DataConfig(sources=[source], lanes=1, workers=0), STAGE.model_copy(update={"video_ratio": 0.0}), "image"
    ) as loader:
        drawn = {caption for _ in range(60) for caption in next(loader)[0].captions}
    assert drawn == {f"{which} {n}" for which in ("first", "second", "third") for n in range(6)}
    assert verify([source], progress=False)["sources"][0]["warning"] is None
    assert "lines" not in caplog.text
    assert read_texts({"json": b'{"caption": "a\\nb"}', "txt": b"c\nd"}, lines=True).captions == ("a\nb",)


def test_txts_of_several_lines_cause_one_warning_if_the_source_does_not_set_captions_lines(tmp_path, capsys, caplog):
    path = tar_of_lines(tmp_path, name="unsaid.tar")
    source = SourceConfig(path=path)
    with caplog.at_level(logging.WARNING):
        packs = swept(source) + swept(source)
        list(iterate_captions([source], limit=100))
    assert packs[0].captions[0].split("\r\n")[0] == "first 0\nsecond 0"
    assert not any(pack.other_captions[0] for pack in packs)
    warnings = [record.getMessage() for record in caplog.records]
    assert [f"source {path}: its .txt members have several lines" in one for one in warnings] == [True], warnings
    assert "set captions: lines in the source" in warnings[0]
    assert main(["data", "verify", path, "--report", str(tmp_path / "verify.json")]) == 0
    assert capsys.readouterr().out.count("set captions: lines in the source") == 1


def test_occasional_txts_of_several_lines_cause_no_warning(tmp_path, caplog):
    texts = [b"one\ntwo", b"one", b"one\ntwo", b"one\ntwo", b"one"]
    samples = [(f"k{n}", {"png": PNG, "txt": text}) for n, text in enumerate(texts)]
    samples += [(f"j{n}", {"png": PNG, "json": b'{"caption": "a paragraph\\n\\nand another"}'}) for n in range(9)]
    source = SourceConfig(path=str(write_tar(tmp_path / "mixed.tar", samples)))
    with caplog.at_level(logging.WARNING):
        swept(source)
    assert caplog.text == ""
    assert verify([source], progress=False)["sources"][0]["warning"] is None


def test_verify_uses_the_captions_setting_of_a_run_file(tmp_path, capsys):
    path = tar_of_lines(tmp_path)
    run = {
        "name": "r",
        "data": {"sources": [{"path": path, "captions": "lines"}]},
        "stages": [{"name": "s", "samples": 1, "lr": 1e-3}],
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    for named in ([path], []):
        command = [
            "data",
            "verify",
            *named,
            "--config",
            str(tmp_path / "run.yaml"),
            "--report",
            str(tmp_path / "v.json"),
        ]
        assert main(command) == 0
        assert "captions: lines" not in capsys.readouterr().out


def test_the_captions_setting_counts_as_a_change_of_the_result():
    one, lines = (
        check_config(
            {
                "name": "r",
                "data": {"sources": [{"path": "p", "captions": captions}]},
                "stages": [{"name": "s", "samples": 1, "lr": 1e-3}],
            },
            "the test",
        )
        for captions in ("one", "lines")
    )
    assert changed_result(one, lines) == ["data.sources.0.captions"]


def test_a_sample_has_at_most_a_thousand_captions():
    """A megabyte of short captions takes ten times as much of the trainer's memory."""
    many = read_texts({"json": json.dumps({"captions": ["ab"] * 100_000}).encode()})
    assert len(many.captions) == MAX_CAPTIONS
    assert [(one.kind, "100000" in one.message) for one in many.ignored] == [("too_large", True)]
    lines = read_texts({"txt": b"ab\n" * 5000}, lines=True)
    assert (len(lines.captions), [one.kind for one in lines.ignored]) == (MAX_CAPTIONS, ["too_large"])
    assert read_texts({"txt": b"ab\n" * 5000}).ignored == ()


@pytest.mark.parametrize("number", [2**31 + 1, 10**400])
def test_sizes_that_no_file_has_are_not_taken_from_metadata(number):
    about = {"captions": ["c"], "kind": "image", "width": 3, "height": 4, "frames": 1}
    assert read_texts({"json": json.dumps(about).encode()}, packed=True).size is not None
    assert read_texts({"json": json.dumps({**about, "width": number}).encode()}, packed=True).size is None


def test_a_nul_character_is_named_by_its_place_in_the_text():
    message = read_texts({"txt": "ab\0".encode("utf-16"), "cls": b"c"}).ignored[0].message
    assert "character 2 is NUL" in message
