"""The page of runs: its content, that it is one file, and errors."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from univitar_ds.cli.main import main
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.reporting import curves
from univitar_ds.reporting import page as page_module
from univitar_ds.reporting.page import data_url, read_runs


class Page(HTMLParser):
    """The page's elements with their attributes, and its text outside of style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if not self.elements or self.elements[-1][0] != "style":
            self.text.append(data.strip())


def report(*arguments) -> int:
    return main(["report", *map(str, arguments)])


def page_of(tmp_path, *arguments) -> Page:
    assert report(*arguments, "--out", tmp_path / "page.html") == 0
    return Page((tmp_path / "page.html").read_text())


def test_the_page_is_one_file_with_curves_results_events_and_examples(run_folder, tmp_path, capsys):
    page = page_of(tmp_path, run_folder("photos"))
    assert "25.0 %" in capsys.readouterr().out  # the table is still printed
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), f"{tag} {name}={attributes[name]}"
        assert tag not in ("script", "link", "iframe")
    text = " ".join(page.text)
    for shown in ("25.0 %", "20.0 to 30.0", "10.0 %", "loss is nan", "a <b>note</b>", "finished", "Loss", "native"):
        assert shown in text, shown
    labels = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert "Loss: photos" in labels
    assert "Parts of the loss: photos" not in labels, "the losses of images and videos have a drawing of their own"
    assert not any(label.startswith("Samples that were left out") for label in labels)  # all are 0
    (image,) = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).width <= 1400
    svg = (tmp_path / "page.html").read_text()
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers)), "an element would be drawn in place of another"
    assert used <= set(identifiers)


def test_what_is_found_for_captions_is_shown_too(run_folder, tmp_path):
    run = run_folder("photos")
    Image.new("RGB", (200, 100)).save(run / "examples-text-to-image.png")
    images = [attributes for tag, attributes in page_of(tmp_path, run).elements if tag == "img"]
    assert [image["alt"].split(",")[0] for image in images] == ["Held-out images", "Captions of held-out images"]


def test_evaluations_during_training_have_curves(run_folder, tmp_path):
    run = run_folder("photos")
    names = [f"{kind}zero-shot_top-{k}_image" for kind in ("", "trained/") for k in (1, 5)]
    names += ["image-to-text_R@1_image", "image-to-text_R@10_image"]
    lines = [
        {"step": step, "samples_seen": 10 * step, **{f"eval/{name}": 0.01 * step for name in names}} for step in (9, 39)
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    page = page_of(tmp_path, run)
    labels = {attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"}
    for title in ("classification, top-1", "retrieval, R@1"):
        assert f"Evaluation during training: {title}: photos" in labels
    assert {name for name in names if name in page.text} == {"zero-shot_top-1_image", "trained/zero-shot_top-1_image"}


def test_several_runs_share_curves_and_a_table_and_show_what_differs(run_folder, tmp_path):
    source = SourceConfig(path="s3://key:secret@bucket/shards")
    data = DataConfig(sources=[source], workers=0).model_dump(mode="json")
    runs = [run_folder("first", value=0.25), run_folder("second", value=0.5, seed=7, data=data)]
    page = page_of(tmp_path, *runs)
    content = (tmp_path / "page.html").read_text()
    row = re.search(r"<tr><td>zero-shot.*?</tr>", content).group()
    assert re.findall(r'class="number( best)?">(\d+\.0) %', row) == [("", "25.0"), (" best", "50.0"), ("", "10.0")]
    (seed,) = re.findall(r"<code>seed</code></th>(.*?)</tr>", content)
    assert re.findall(r"<td>(.*?)</td>", seed) == ["0", "7"]
    assert "Loss: first, second" in [attributes.get("aria-label") for _, attributes in page.elements]
    assert "secret" not in content
    assert len(content) < 5_000_000


def test_a_page_of_long_logs_and_large_images_stays_below_its_limit(run_folder, tmp_path, monkeypatch):
    """Images get what texts and curves leave, and texts of events and numbers of points are limited."""
    monkeypatch.setattr(page_module, "MOST_BYTES", 400_000)
    monkeypatch.setattr(curves, "ALL_POINTS", 1000)
    runs = [run_folder("first", steps=400), run_folder("second", steps=400)]
    for run in runs:
        event = {"step": 3, "event": "skipped", "reason": "x" * 5000, "samples": []}
        (run / "events.jsonl").write_text(f"{json.dumps(event)}\n" * 100)
        Image.effect_noise((2000, 1200), 90).convert("RGB").save(run / "examples-video.png")
    page = page_of(tmp_path, *runs)
    assert (tmp_path / "page.html").stat().st_size <= 400_000
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 4


def test_runs_of_the_same_name_are_shown_with_their_folders(run_folder, tmp_path):
    first, other = run_folder("first"), run_folder("other")
    (other / "config.yaml").write_text((first / "config.yaml").read_text())
    assert [run.name for run in read_runs([first, other])] == ["first (first)", "first (other)"]


def test_runs_that_were_evaluated_on_different_data_are_not_compared(run_folder, tmp_path):
    first, second = run_folder("first"), run_folder("second", value=0.5)
    result = json.loads((second / "evaluation.json").read_text())
    result["figures"][0]["n"] = 51
    (second / "evaluation.json").write_text(json.dumps(result))
    page_of(tmp_path, first, second)
    content = (tmp_path / "page.html").read_text()
    assert 'class="number best"' not in content
    assert '<td class="number">50 / 51</td>' in content


def test_a_run_before_its_first_line_has_a_page(run_folder, tmp_path, capsys):
    run = run_folder("new", 0)
    for name in ("evaluation.json", "summary.json", "events.jsonl", "examples-image.png"):
        (run / name).unlink()
    page = page_of(tmp_path, run)
    assert "has no results yet" in capsys.readouterr().out
    assert not any(tag == "svg" for tag, _ in page.elements)


def test_data_and_notes_of_several_runs_have_their_names(run_folder, tmp_path):
    first, second = run_folder("first"), run_folder("second")
    result = json.loads((first / "evaluation.json").read_text())
    result["sources"] = [{"path": "https://me:secret@host/data", "split": "test"}, {"path": "other.tar", "split": None}]
    (first / "evaluation.json").write_text(json.dumps(result))
    page_of(tmp_path, first, second)
    content = (tmp_path / "page.html").read_text()
    assert "first: step-00000040, trained weights, on https://***@host/data (split test), other.tar" in content
    assert "first: a &lt;b&gt;note" in content
    assert "second: a &lt;b&gt;note" in content


def test_speed_is_the_median_since_some_lines_cover_few_steps(run_folder, tmp_path):
    run = run_folder("a", 3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    content = "".join(
        json.dumps({**line, "mfu_pct": mfu}) + "\n" for line, mfu in zip(lines, (31, 30, 70), strict=True)
    )
    (run / "metrics.jsonl").write_text(content)
    page_of(tmp_path, run)
    assert re.search(r"MFU, median</th><td>31.0 %<", (tmp_path / "page.html").read_text())


def test_parts_of_the_loss_are_drawn_if_there_are_two(run_folder, tmp_path):
    run = run_folder("a")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for parts in (["loss_contrastive"], ["loss_contrastive", "loss_distill"]):
        content = "".join(json.dumps({**line, **dict.fromkeys(parts, 0.5)}) + "\n" for line in lines)
        (run / "metrics.jsonl").write_text(content)
        page_of(tmp_path, run)
        assert ("Parts of the loss" in (tmp_path / "page.html").read_text()) == (len(parts) > 1)


def test_curves_are_written_as_images_too_and_written_again(run_folder, tmp_path):
    drawings = tmp_path / "drawings"
    drawings.mkdir()
    for _ in range(2):
        assert report(run_folder("a") if not (tmp_path / "a").exists() else tmp_path / "a", "--out",
                      tmp_path / "page.html", "--png", drawings) == 0  # fmt: skip
    names = {path.stem for path in drawings.iterdir()}
    assert {"loss", "rate", "use"} <= names
    assert all(Image.open(path).width > 600 for path in drawings.iterdir())


def test_files_of_others_are_kept_and_wrong_options_are_error_messages(run_folder, tmp_path, capsys):
    run = run_folder("a")
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    assert report(run, "--out", tmp_path / "notes.html") == 2
    assert "has not written; give another name" in capsys.readouterr().err
    assert (tmp_path / "notes.html").read_text() == "<p>mine</p>"
    Image.new("RGB", (4, 4)).save(tmp_path / "loss.png")
    assert report(run, "--out", tmp_path / "page.html", "--png", tmp_path) == 2
    assert "loss.png is a file that this command has not written" in capsys.readouterr().err
    for wrong, said in (
        (["--png", tmp_path], "give --out FILE too"),
        (["--caption", "a cat"], "give --out FILE too"),
        (["--out", tmp_path / "p.html", "--caption", "a cat"], "give --images too"),
        ([*[run] * 8, "--out", tmp_path / "p.html"], "9 runs are too many for one page (limit 8)"),
        ([tmp_path, "--out", tmp_path / "p.html"], "has no config.yaml"),
    ):
        assert report(run, *wrong) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def test_a_hostile_log_has_a_page(run_folder, tmp_path, recwarn):
    run = run_folder("hostile", 0)
    lines = [
        {"step": step, "samples_seen": step * 1e4, "stage": "<script>\x00\ud800</script>" * 99,
         "loss": (-1) ** step * 1e308, "lr": 1e30 * step, "mfu_pct": float("nan"),
         **{f"eval/<script>\x07{number}": 1.0 for number in range(60)}}
        for step in range(1, 4)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(f'{text}{{"step": 1{"0" * 400}, "loss": 1{"0" * 400}, "samples_seen": 9}}\n')
    events = [{"step": 1, "event": "skipped", "reason": "\ud800", "not_finite": 5}, {"step": 1, "event": ["a"]}]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    page = page_of(tmp_path, run)
    assert "script" not in {tag for tag, _ in page.elements}
    assert "\x00" not in (tmp_path / "page.html").read_text()
    assert not [one for one in recwarn if "collapsed" in str(one.message)]


@pytest.mark.parametrize("size", [(20_000, 1), (1, 60_000)])
def test_a_thin_image_is_drawn(size):
    url = data_url(Image.new("RGB", size))
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).width <= 1400
