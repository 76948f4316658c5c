"""The teacher and its weights in the run file."""

import pytest

from univitar_ds.config.load import check_config, config_fingerprint
from univitar_ds.errors import ConfigError

STAGE = {"name": "a", "samples": 10, "lr": 1e-3}


def run(teacher=None, **stage):
    content = {"name": "r", "data": {"sources": [{"path": "nowhere"}]}, "stages": [{**STAGE, **stage}]}
    return check_config({**content, "objective": {"teacher": teacher}}, "the test")


def test_a_stage_that_distills_needs_a_teacher():
    with pytest.raises(ConfigError, match=r"stages \['a'\] distill without a teacher; set objective.teacher.path"):
        run(distill={"start": 0.5})
    assert run({"path": "t"}, distill={"start": 0.5}).objective.teacher.dtype == "bf16"
    assert run().objective.teacher is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"partitioned": True, "cache": "c"}, "but partitioned needs all of them; choose one"),
        ({"patch_weight": 0, "pooled_weight": 0}, "are both 0; raise one or remove the teacher"),
        ({"patch_loss": "l2"}, "patch_loss"),
    ],
)
def test_a_teacher_that_contradicts_itself_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        run({"path": "t", **settings})


def test_only_the_cache_and_the_partitioning_of_a_teacher_may_change_on_resume():
    start = config_fingerprint(run({"path": "t"}))
    assert config_fingerprint(run({"path": "t", "cache": "c"})) == start
    assert config_fingerprint(run({"path": "t", "partitioned": True})) == start
    for other in (None, {"path": "u"}, {"path": "t", "dtype": "fp32"}, {"path": "t", "patch_loss": "smooth_l1"}):
        assert config_fingerprint(run(other)) != start


def test_a_teacher_does_not_see_mixed_items():
    content = {"name": "r", "data": {"sources": [{"path": "nowhere"}]}, "stages": [STAGE]}
    objective = {"kind": "classification", "classification": {"mixup": 0.8}, "teacher": {"path": "t"}}
    with pytest.raises(ConfigError, match=r"mixup 0\.8 and cutmix 0 change what the student sees"):
        check_config({**content, "objective": objective}, "the test")
    objective["classification"]["mixup"] = 0
    assert check_config({**content, "objective": objective}, "the test").objective.classifies
