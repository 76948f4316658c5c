"""Errors for keys of other trainers name the keys of this project."""

import re

import pytest

from univitar_ds.config.keys.foreign import ANSWERS, answer, similar_keys, unknown_key
from univitar_ds.config.keys.tree import all_keys

BROUGHT = [
    "learning_rate", "lr", "batch_size", "micro_batch_size", "epochs", "max_steps", "wandb", "num_workers",
    "precision", "accum_freq", "gradient_accumulation_steps", "warmup", "weight_decay", "train_data", "resume",
    "amp", "bf16", "fp16", "gradient_checkpointing", "grad_checkpointing", "output_dir", "seed", "image_size",
    "crop_size", "pretrained", "zero_stage", "per_device_train_batch_size", "max_grad_norm", "drop_path",
    "force_patch_dropout", "lock_text", "report_to", "train_micro_batch_size_per_gpu",
]  # fmt: skip


@pytest.mark.parametrize("name", BROUGHT)
def test_the_error_for_a_key_of_another_trainer_names_ours(name):
    for place in ((name,), ("data", name), ("stages", 0, name)):
        if name != "seed" or len(place) > 1:
            assert answer(name) in unknown_key(place)


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_names_a_key_that_exists(name):
    ours, more = ANSWERS[name]
    named = [
        word for word in re.findall(r"[a-zA-Z_]+(?:\.[a-zA-Z_0-9]+)+", more) if not word.endswith(("jsonl", "json"))
    ]
    assert all(key in all_keys() for key in ([ours] if ours else []) + named)
    assert ours or named or "univitar-ds train --" in more


@pytest.mark.parametrize("name", ANSWERS)
def test_no_answer_hides_a_key_of_ours_in_its_own_section(name):
    """A key that exists where it is written is never unknown; elsewhere the answer must not lead to itself."""
    ours, _ = ANSWERS[name]
    assert name not in all_keys() or ours.split(".")[0] == name, f"{name} is a key of the top level"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (("--Learning-Rate",), "--Learning-Rate is stages.N.lr here"),
        (("data", "Lanes"), "write lanes"),
        (("data", "lanse"), "did you mean 'lanes'?"),
        (("model", "layers"), "layers is a key of another section: model.text.layers"),
        (("data", "qqq"), "known here: sources, lanes"),
        (("optimizer", "zero_stage"), "belongs to the DeepSpeed JSON that `deepspeed` names"),
        (("stages", 0, "seed"), "seed belongs to the top level"),
    ],
)
def test_an_unknown_key_is_answered_by_what_is_nearest(place, said):
    assert said in unknown_key(place)


def test_a_long_key_is_not_echoed_whole():
    assert "x" * 80 not in unknown_key(("x" * 5000,))


def test_similar_keys_are_found_by_their_last_part():
    assert similar_keys("lr", all_keys())[0] == "stages.N.lr"
    assert "data.lanes" in similar_keys("data.lane", all_keys())
    assert similar_keys("qqqqqq", all_keys()) == []
