"""Whole runs of a classifier: on one process and on two, resumed, finished with export and evaluation."""

import json
from types import SimpleNamespace

import pytest

from tests.support.closeness import assert_all_close, assert_sums_close
from tests.support.distributed import run_distributed
from tests.support.runs import (
    TERMS,
    metrics,
    reach_of,
    rewound,
    samples,
    small_config,
    train_rank,
    train_without_launcher,
)
from tests.support.shards import image, write_demo_shards, write_tar
from univitar_ds import UniViTARModel
from univitar_ds.classes import ClassList
from univitar_ds.cli.main import main
from univitar_ds.config.run_folder import CHECKPOINTS, CLASSES
from univitar_ds.config.schema import RunConfig
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.elastic import read_full
from univitar_ds.launch import finish_run
from univitar_ds.run import create_run

pytestmark = pytest.mark.distributed
TIMED = ("_s", "_pct", "tflops_per_rank", "memory_gb", "mfu_note")


def labels_config(shards, output) -> RunConfig:
    """The small run as a classifier, with items of two sizes that are mixed, dropped tokens and dropped branches."""
    config = small_config(
        shards,
        output,
        objective={"kind": "classification", "classification": {"mixup": 0.8, "cutmix": 1.0}},
        evaluation={"sources": [{"path": str(shards), "split": "test"}], "token_budget": 200},
    )
    rule = {"image": config.stages[0].image.model_copy(update={"max_tokens": 9}), "samples": 200}
    stages = [stage.model_copy(update=rule) for stage in config.stages]
    stages[1] = stages[1].model_copy(update={"patch_dropout": 0.5, "stochastic_depth": 0.3})
    return config.model_copy(update={"stages": stages})


def mixing_rank(run):
    """Trains as `train_rank`, and returns the number of mixed items of this rank."""
    from univitar_ds.training.step import classification

    mixed, plan = [], classification.plan_mixing

    def counted(*arguments, **options):
        found = plan(*arguments, **options)
        mixed.append(sum(one is not None for one in found))
        return found

    classification.plan_mixing = counted
    return train_rank(run), sum(mixed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_demo_shards(folder / "shards")
    run = create_run(labels_config(folder / "shards", folder), "test", 2)
    answers = run_distributed(mixing_rank, 2, run)
    assert [completed for completed, _ in answers] == [True, True]
    last = checkpoint_dir.complete(run / CHECKPOINTS)[-1]
    return SimpleNamespace(run=run, shards=folder / "shards", last=last, mixed=sum(count for _, count in answers))


def untimed(line):
    return {name: value for name, value in line.items() if not name.endswith(TIMED)}


def test_the_run_has_its_classes_and_no_text_tower(whole):
    assert ClassList.read(whole.run / CLASSES).names == {None: ("blue", "green", "grey", "left", "red", "right")}
    assert not (whole.run / "tokenizer.json").exists()
    names = read_full(whole.last).keys()
    assert {name.split(".")[0] for name in names} == {"vision", "pool", "head"}
    assert tuple(read_full(whole.last)["head.weight"].shape) == (6, 192)
    assert whole.mixed > 20


def test_the_metrics_have_the_loss_and_no_logits(whole):
    for line in metrics(whole.run):
        assert line["loss"] == line["loss_classification"] == line[f"loss_{line['modality']}"]
        assert line["classification_weight"] == 1.0
        assert not {"logit_scale", "logit_bias", "loss_contrastive", "contrastive_weight"} & line.keys()
        assert min(line[f"grad_norm_{part}"] for part in ("patch_embedding", "blocks", "heads")) > 0


def test_one_process_gives_the_losses_and_weights_of_two(whole, tmp_path):
    run = create_run(labels_config(whole.shards, tmp_path), "test", 1)
    assert run_distributed(train_without_launcher, 1, run) == [True]
    assert samples(run) == samples(whole.run)
    for one, two in zip(metrics(run), metrics(whole.run), strict=True):
        for name in ("loss", "grad_norm"):
            assert_sums_close(one[name], two[name], TERMS * one["step"], name)
    assert_all_close(read_full(run / CHECKPOINTS / whole.last.name), read_full(whole.last), TERMS, reach=reach_of(run))


def test_samples_with_a_label_and_no_caption_are_verified_and_trained(tmp_path, capsys):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    content = [(f"s{n:03d}", {"jpg": image(30, 40, n), "cls": str(n % 2).encode()}) for n in range(24)]
    shard = str(write_tar(tmp_path / "train.tar", content))
    config = small_config(
        tmp_path,
        tmp_path,
        objective={"kind": "classification"},
        data={
            "sources": [{"path": shard, "class_names": str(tmp_path / "names.txt")}],
            "lanes": 2, "workers": 0, "pool_samples": 8,
        },
        evaluation={},
    )  # fmt: skip
    stage = config.stages[0].model_copy(update={"samples": 30})
    config = config.model_copy(update={"stages": [stage]})
    run = create_run(config, "test", 1)
    assert ClassList.read(run / CLASSES).names == {None: ("cat", "dog")}
    assert run_distributed(train_without_launcher, 1, run) == [True]
    assert metrics(run)[-1]["bad_samples"] == 0
    assert metrics(run)[-1]["loss"] > 0
    assert (
        main(["data", "verify", "--config", str(run / "config.yaml"), "--report", str(tmp_path / "report.json")]) == 0
    )
    capsys.readouterr()


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, tmp_path):
    run = rewound(whole.run, 2, tmp_path / "again")
    assert [line["modality"] for line in metrics(whole.run)[2:4]] == ["image", "image"]  # whose items are mixed
    assert [completed for completed, _ in run_distributed(mixing_rank, 2, run)] == [True, True]
    assert [untimed(line) for line in metrics(run)] == [untimed(line) for line in metrics(whole.run)]
    found, wanted = read_full(run / CHECKPOINTS / whole.last.name), read_full(whole.last)
    assert found.keys() == wanted.keys()
    assert all(bool((found[name] == wanted[name]).all()) for name in wanted)


def test_a_finished_run_has_its_encoder_exported_and_its_head_evaluated(whole):
    finish_run(whole.run)
    assert not (whole.run / "export" / "model").exists()
    assert UniViTARModel.from_pretrained(whole.run / "export").joint is None
    assert UniViTARModel.from_pretrained(whole.run).joint is None
    assert "- objective: classification\n" in (whole.run / "export" / "README.md").read_text()
    result = json.loads((whole.run / "evaluation.json").read_text())
    rows = [(one["task"], one["modality"], one["measure"], one["n"], one["candidates"]) for one in result["figures"]]
    measures = ("top-1", "top-5", "top-1, mean of classes")
    assert rows == [("classification", "image", measure, 16, 6) for measure in measures] + [
        ("classification", "video", measure, 4, 6) for measure in measures
    ]
    assert [round(one["chance"] * 6) for one in result["figures"]] == [1, 5, 1] * 2
