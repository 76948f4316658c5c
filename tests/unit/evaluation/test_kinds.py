"""Evaluation data with labels only, captions only, both, or neither. Data that cannot be measured is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.finished import run_config, write_run
from tests.support.shards import image, video, write_tar
from univitar_ds import launch
from univitar_ds.cli.main import main
from univitar_ds.config.run_folder import SUMMARY
from univitar_ds.convert import export
from univitar_ds.errors import ConfigError, DataError
from univitar_ds.evaluation.run import evaluate_run

NAMES = ["cat", "dog", "bird", "fish"]
TEMPLATES = {"image_templates": ["a photo of a {}", "the {}"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tried"
    write_run(folder, run_config("nowhere"))
    return folder


def labelled(index: int) -> dict[str, bytes]:
    """As CLIP_benchmark exports them."""
    return {"cls": str(index % 4).encode(), "webp": image(40, 40, index, "WEBP")}


def captioned(index: int) -> dict[str, bytes]:
    return {"jpg": image(40, 40, index), "txt": f"image number {index}".encode()}


def moving(index: int) -> dict[str, bytes]:
    return {"mp4": video(48, 48, 6, index), "txt": f"clip number {index}".encode()}


def tar(folder: Path, *kinds, of_each: int = 8) -> str:
    samples = [(f"s{make.__name__}{index}", make(index)) for make in kinds for index in range(of_each)]
    return str(write_tar(folder / "data" / "0.tar", samples))


def measured(run: Path, *sources: dict, **evaluation) -> dict:
    """The results of an evaluation of `run` on other data."""
    out = run.parent / "results.json"
    out.unlink(missing_ok=True)
    overrides = [f"evaluation.sources={json.dumps(sources)}"]
    overrides += [f"evaluation.{name}={json.dumps(value)}" for name, value in evaluation.items()]
    evaluate_run(run, overrides=overrides, out=out, progress=False)
    return json.loads(out.read_text())


def tasks(result: dict) -> set[str]:
    return {figure["task"] for figure in result["figures"]}


def test_labels_alone_are_enough_for_zero_shot_and_make_no_captions(run: Path, tmp_path: Path):
    path = tar(tmp_path, labelled)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    source = {"path": path, "class_names": str(tmp_path / "names.txt")}
    result = measured(run, source, **TEMPLATES)
    assert tasks(result) == {"zero-shot"}
    (top,) = [figure for figure in result["figures"] if figure["measure"] == "top-1"]
    assert (top["n"], top["candidates"], top["chance"]) == (8, 4, 0.25)
    assert result["notes"] == ["Retrieval of images: no item has a caption."]
    with_templates = measured(run, {**source, "templates": ["one {}"]}, **TEMPLATES)
    assert with_templates["figures"] == result["figures"], "captions made up for training were measured"


@pytest.mark.parametrize("names", [[], NAMES[:2]])
def test_numbers_without_names_are_measured_with_a_word_and_those_beyond_the_names_are_counted(
    run: Path, tmp_path: Path, names
):
    source = {"path": tar(tmp_path, labelled)}
    if names:
        (tmp_path / "names.txt").write_text("\n".join(names))
        source["class_names"] = str(tmp_path / "names.txt")
    result = measured(run, source)
    assert tasks(result) == {"zero-shot"}
    said = "\n".join(result["notes"])
    assert ("4 bad_label" in said) == bool(names)
    assert ("labels are numbers, such as '0'" in said) == (not names)


def test_captions_alone_are_enough_for_retrieval(run: Path, tmp_path: Path):
    result = measured(run, {"path": tar(tmp_path, captioned)})
    assert tasks(result) == {"image to text", "text to image"}
    assert result["notes"] == ["Zero-shot of images: no item has a label."]


def test_of_a_mix_each_task_takes_the_items_that_it_can_use(run: Path, tmp_path: Path):
    result = measured(run, {"path": tar(tmp_path, labelled, captioned, moving)})
    n = {(figure["task"], figure["measure"]): figure["n"] for figure in result["figures"]}
    assert n[("zero-shot", "top-1")] == n[("image to text", "R@1")] == n[("text to image", "R@1")] == 8
    assert n[("video to text", "R@1")] == 8
    assert [figure["candidates"] for figure in result["figures"] if figure["measure"] == "R@1"] == [8, 8, 8, 8]


def test_a_run_without_videos_does_not_report_missing_videos(run: Path, tmp_path: Path):
    assert not [note for note in measured(run, {"path": tar(tmp_path, captioned)})["notes"] if "video" in note]
    assert not [note for note in measured(run, {"path": tar(tmp_path / "2", moving)})["notes"] if "image" in note]


def test_videos_that_are_there_and_broken_are_missed_and_counted(run: Path, tmp_path: Path):
    def broken(index: int) -> dict[str, bytes]:
        return {**moving(index), "mp4": b"no video at all"}

    notes = measured(run, {"path": tar(tmp_path, captioned, broken, of_each=3)})["notes"]
    (note,) = [note for note in notes if "video" in note]
    assert note.startswith("No video that can be read in the evaluation data (left out: 3 unreadable;")


def nothing(index: int) -> dict[str, bytes]:
    return {"jpg": image(40, 40, index)}


def alike(index: int) -> dict[str, bytes]:
    return {"cls": b"0", "jpg": image(40, 40, index)}


def texts(index: int) -> dict[str, bytes]:
    return {"txt": b"a caption"}


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ((nothing,), r"found 0 images that can be read, 0 of them with a caption, 0 with a label .* 8 no_caption"),
        ((alike,), r"found 8 images that can be read, 0 of them with a caption, 8 with a label \(1 different\)"),
        ((texts,), r"found 0 images .* left out: 8 no_media"),
        ((), r"found 0 images .*; found 0 videos"),
    ],
)
def test_an_evaluation_that_measures_nothing_is_an_error_with_what_was_found(run: Path, tmp_path: Path, kinds, found):
    with pytest.raises(DataError, match=rf"measured nothing: it is for retrieval and zero-shot .*{found}"):
        measured(run, {"path": tar(tmp_path, *kinds)})
    assert not (run.parent / "results.json").exists()


def test_videos_alone_are_named_to_a_run_that_never_met_any(tmp_path: Path):
    stages = [{**run_config().stages[0].model_dump(), "video_ratio": 0.0}]
    write_run(tmp_path / "run", run_config("nowhere", stages=stages))
    with pytest.raises(DataError, match="found 8 videos, which no stage of the run reads"):
        measured(tmp_path / "run", {"path": tar(tmp_path, moving)})


@pytest.mark.parametrize("kinds", [(captioned,), (nothing,)])
def test_a_run_that_could_not_be_evaluated_fails_after_everything_else_is_written(
    monkeypatch, capsys, tmp_path: Path, kinds
):
    path = tar(tmp_path, *kinds)
    write_run(tmp_path / "run", run_config(path, evaluation={"sources": [{"path": path}]}))
    (tmp_path / "run" / SUMMARY).write_text('{"steps": 7, "seconds": {"training": 1.0}}')
    exported = []
    monkeypatch.setattr(export, "export_run", lambda *given: exported.append(given))
    if kinds == (nothing,):
        with pytest.raises(DataError, match="measured nothing"):
            launch.finish_run(tmp_path / "run")
    else:
        launch.finish_run(tmp_path / "run")
    assert exported
    summary = json.loads((tmp_path / "run" / SUMMARY).read_text())
    assert summary["seconds"].keys() == {"training", "export", "evaluation"}
    assert main(["eval", str(tmp_path / "run")]) == (2 if kinds == (nothing,) else 0)
    assert ("error: the evaluation measured nothing" in capsys.readouterr().err) == (kinds == (nothing,))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_results_on_other_data_are_printed_and_leave_the_run_as_it_is(capsys, run: Path, tmp_path: Path):
    before = files_of(run)
    path = tar(tmp_path, captioned)
    assert main(["eval", str(run), "evaluation.sources.0.path=" + path]) == 0
    printed = capsys.readouterr().out
    assert "image to text" in printed
    assert "evaluation.json is not written; --out FILE" in printed
    out = tmp_path / "other.json"
    for _ in range(2):  # a result may replace a result
        assert main(["eval", "--out", str(out), str(run), f"evaluation.sources=[{{path: {path}}}]"]) == 0
    assert json.loads(out.read_text())["sources"] == [{"path": path, "split": "train"}]
    assert files_of(run) == before


def test_how_the_data_are_read_can_be_overridden_and_results_are_the_runs_own(capsys, tmp_path: Path):
    path = tar(tmp_path, captioned)
    write_run(tmp_path / "run", run_config(path, evaluation={"sources": [{"path": path}]}))
    config = (tmp_path / "run" / "config.yaml").read_bytes()
    assert main(["eval", str(tmp_path / "run"), "data.max_image_px=1000", "evaluation.token_budget=64"]) == 2
    assert "8 too_large" in capsys.readouterr().err
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert main(["eval", str(tmp_path / "run"), "evaluation.token_budget=64", "logging.every_steps=3"]) == 0
    assert (tmp_path / "run" / "evaluation.json").is_file()
    assert (tmp_path / "run" / "config.yaml").read_bytes() == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.0.lr=1", "stages.0.lr is a key of the training"),
        ("model.attention=sdpa", "model.attention is a key of the training"),
        ("seed=3", "seed is a key of the training"),
        ("data.sources.0.path=x", "read only by training and has no effect"),
        ("data.lanes=2", "read only by training"),
        ("evaluation.surces=[]", "did you mean 'sources'"),
        ("evaluation.sources.3.path=x", "is not an index of a list of 1; use 0, or 1 for one more"),
        ("evaluation", "not of the form"),
    ],
)
def test_an_override_that_an_evaluation_cannot_follow_is_refused_with_a_message(run: Path, override, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        evaluate_run(run, overrides=[override], progress=False)


def test_data_can_be_named_for_a_run_without_any(capsys, tmp_path: Path):
    write_run(tmp_path / "run", run_config("nowhere", evaluation={"sources": []}))
    path = tar(tmp_path, captioned)
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "univitar-ds eval RUN evaluation.sources.0=" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run"), f"evaluation.sources.0={{path: {path}}}"]) == 0


def test_a_file_that_no_evaluation_wrote_is_not_replaced(run: Path, tmp_path: Path):
    precious = tmp_path / "thesis.json"
    precious.write_text('{"title": "mine"}')
    with pytest.raises(ConfigError, match="is a file that this command has not written"):
        evaluate_run(run, out=precious, progress=False)
    assert precious.read_text() == '{"title": "mine"}'
    with pytest.raises(ConfigError, match="there is no folder"):
        evaluate_run(run, out=tmp_path / "no" / "x.json", progress=False)
