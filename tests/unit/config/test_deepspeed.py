"""Ownership of keys by the run file or the DeepSpeed JSON."""

import json

import pytest

from univitar_ds.config.deepspeed import (
    NODE,
    SHARDING,
    deepspeed_path,
    divisors,
    on_disk,
    packs_per_rank,
    read_deepspeed,
    resolve_deepspeed,
    sharing_ranks,
)
from univitar_ds.config.load import check_config
from univitar_ds.errors import ConfigError

NAMES = ("run.yaml", "zero.json")


@pytest.fixture
def config():
    stage = {"name": "s", "samples": 10, "lr": 1e-3}
    return check_config({"name": "r", "data": {"sources": [{"path": "x"}], "lanes": 4}, "stages": [stage]}, "run.yaml")


def test_every_shipped_json_resolves(config):
    files = sorted(deepspeed_path("zero3_cpu").parent.glob("*.json"))
    assert len(files) >= 5
    for file in files:
        resolved = resolve_deepspeed(config, 2, read_deepspeed(file.stem), NAMES)
        assert resolved["gradient_accumulation_steps"] == 2
        assert resolved["train_batch_size"] == 4
        assert resolved["gradient_clipping"] == 1.0


def test_a_key_with_two_values_names_both_files(config):
    with pytest.raises(ConfigError, match=r"gradient_clipping is 0\.5 in zero\.json but 1\.0 follows from run\.yaml"):
        resolve_deepspeed(config, 2, {"gradient_clipping": 0.5}, NAMES)


def test_the_same_value_in_both_files_is_no_error(config):
    assert resolve_deepspeed(config, 2, {"gradient_clipping": 1.0}, NAMES)["gradient_clipping"] == 1.0


def test_all_ownership_errors_are_reported_at_once(config):
    content = {"optimizer": {}, "scheduler": {}, "train_batch_size": 99, "fp16": {"enabled": True}}
    with pytest.raises(ConfigError) as error:
        resolve_deepspeed(config, 2, content, NAMES)
    for word in ("optimizer", "scheduler", "train_batch_size is 99", "fp16"):
        assert word in str(error.value)


def test_ranks_that_do_not_share_the_lanes_are_refused_with_the_sizes_that_do(config):
    with pytest.raises(ConfigError, match=r"data\.lanes is 4 .* 3 ranks; run 1, 2, 4 ranks"):
        resolve_deepspeed(config, 3, {}, NAMES)


def sharing(config, tensor, sequence):
    model = {"tensor_parallel": tensor, "sequence_parallel": sequence}
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


@pytest.mark.parametrize(
    ("tensor", "sequence", "ranks", "packs"), [(2, 1, 2, 4), (2, 1, 8, 1), (1, 2, 4, 2), (2, 2, 4, 4)]
)
def test_ranks_that_share_packs_or_weights_read_the_lanes_of_one(config, tensor, sequence, ranks, packs):
    config = sharing(config, tensor, sequence)
    assert packs_per_rank(config, ranks) == packs
    resolved = resolve_deepspeed(config, ranks, {}, NAMES)
    assert resolved["gradient_accumulation_steps"] == packs
    assert resolved["train_batch_size"] == packs * ranks // tensor  # DeepSpeed checks it


@pytest.mark.parametrize(
    ("tensor", "sequence", "ranks", "words"),
    [
        (2, 1, 3, "tensor_parallel 2 .* multiple of 2 ranks, there are 3; run 2, 4, 8 ranks"),
        (2, 2, 6, "sequence_parallel 2 need a multiple of 4 ranks, there are 6; run 4, 8, 16 ranks"),
        (1, 2, 6, r"data\.lanes is 4 .* 3 groups of 2 ranks .*; run 2, 4, 8 ranks"),
    ],
)
def test_ranks_that_cannot_share_so_are_refused_with_the_numbers_that_can(config, tensor, sequence, ranks, words):
    with pytest.raises(ConfigError, match=words):
        packs_per_rank(sharing(config, tensor, sequence), ranks)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {SHARDING: 2, "zero_optimization": {"stage": 3}},
            "sharding_ranks is set .*tensor_parallel 2 in run.yaml",
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer is set"),
    ],
)
def test_settings_that_tensor_parallelism_cannot_have_are_refused(config, content, words):
    assert resolve_deepspeed(config, 4, content, NAMES)
    with pytest.raises(ConfigError, match=f"{words}.*remove one of them"):
        resolve_deepspeed(sharing(config, 2, 1), 4, content, NAMES)


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("optimizer", {"kind": "muon"}, "optimizer.kind is muon with model.tensor_parallel 2 .*set it to adamw"),
        ("model", {"fp8": True}, "model.fp8 is true with model.tensor_parallel 2 .*remove one of them"),
    ],
)
def test_keys_that_tensor_parallelism_cannot_have_are_refused(config, section, changes, words):
    config = config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})
    assert resolve_deepspeed(config, 4, {}, NAMES)
    with pytest.raises(ConfigError, match=words):
        resolve_deepspeed(sharing(config, 2, 1), 4, {}, NAMES)


@pytest.mark.parametrize("content", ["[]", "{", '"x"'])
def test_a_json_that_is_no_object_is_an_error_message(tmp_path, content):
    path = tmp_path / "zero.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"zero\.json"):
        read_deepspeed(str(path))


def test_a_missing_json_names_the_shipped_ones():
    with pytest.raises(ConfigError, match="zero3_cpu"):
        read_deepspeed("nothing")


def test_shipped_jsons_hold_no_key_of_the_run_file():
    for file in deepspeed_path("zero3_cpu").parent.glob("*.json"):
        assert set(json.loads(file.read_text())) <= {"aio", "bf16", "data_types", "zero_optimization", SHARDING}


@pytest.mark.parametrize(("value", "ranks"), [(None, 16), (NODE, 8), (4, 4), (16, 16)])
def test_a_number_of_ranks_or_those_of_a_machine_share_a_state(value, ranks):
    content = {} if value is None else {SHARDING: value}
    assert sharing_ranks(content, 16, 8) == ranks
    assert sharing_ranks({SHARDING: NODE}, 2, 8) == 2


@pytest.mark.parametrize(
    ("value", "zero", "said"),
    [
        (3, {}, r"sharding_ranks is 3 in zero\.json, which does not divide 4 ranks; give a divisor or 'node'"),
        (0, {}, "sharding_ranks is 0 .*give 'node' or a number"),
        (True, {}, "sharding_ranks is True .*give 'node' or a number"),
        ("nodes", {}, "sharding_ranks is 'nodes' .*give 'node' or a number"),
        ([2], {}, r"sharding_ranks is \[2\] .*give 'node' or a number"),
        (2, {"stage": 2}, "with ZeRO stage 2; it needs stage 3"),
        (2, {"offload_optimizer": {"device": "cpu"}}, "with offload_optimizer, which reads gradients"),
        (2, {"offload_param": {"device": "cpu"}}, "with offload_param"),
        (2, {"zero_hpz_partition_size": 2}, "with zero_hpz_partition_size"),
    ],
)
def test_a_sharding_that_cannot_be_used_is_an_error_message(config, value, zero, said):
    content = {SHARDING: value, "zero_optimization": {"stage": 3, **zero}}
    with pytest.raises(ConfigError, match=said):
        resolve_deepspeed(config, 4, content, NAMES)


DISK = {"device": "nvme", "nvme_path": "/disk"}


@pytest.mark.parametrize(
    ("stage", "sections", "said"),
    [
        (3, {"offload_param": DISK}, "offload_param.device is nvme in zero.json; only the optimizer can .* to cpu"),
        (2, {"offload_optimizer": DISK}, "offload_optimizer.device is nvme in zero.json with ZeRO stage 2; it needs"),
        (3, {"offload_optimizer": {"device": "nvme"}}, "without nvme_path; name a folder on a local disk"),
        (3, {"offload_optimizer": {**DISK, "nvme_path": 3}}, "without nvme_path; name a folder on a local disk"),
        (3, {"offload_optimizer": {**DISK, "pipeline_write": True}}, "with pipeline_write, .*; remove pipeline_write"),
    ],
)
def test_a_state_on_a_disk_that_cannot_be_used_is_refused_with_the_remedy(config, stage, sections, said):
    with pytest.raises(ConfigError, match=said):
        resolve_deepspeed(config, 2, {"zero_optimization": {"stage": stage, **sections}}, NAMES)


def test_an_optimizer_on_a_disk_is_accepted(config):
    resolved = resolve_deepspeed(config, 2, {"zero_optimization": {"stage": 3, "offload_optimizer": DISK}}, NAMES)
    assert on_disk(resolved)
    assert not on_disk(resolve_deepspeed(config, 2, read_deepspeed("zero3_offload"), NAMES))


def test_divisors_of_absurd_numbers_of_lanes_are_found_at_once():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(10**12)[-2:] == [5 * 10**11, 10**12]
    assert divisors(1) == [1]
