import os

import pytest
import torch

from univitar_ds.errors import ConfigError
from univitar_ds.training.engine.determinism import explained, set_deterministic


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_attention_and_matrix_products_are_set_to_be_deterministic():
    set_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()  # the setting that the attention back ends read
    # With it torch's attention ignores the setting: varlen_attn, and the text tower's scaled dot products.
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_setting_of_the_user_for_cublas_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_by_default_determinism_is_not_set():
    set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_a_nondeterministic_setting_for_cublas_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8.*set it to :4096:8 or :16:8"):
        set_deterministic(True)
    set_deterministic(False)


def unordered():
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def test_an_operation_without_a_deterministic_form_ends_the_run_with_a_remedy():
    set_deterministic(True)
    wanted = r"put_ does not have a deterministic impl.*Set deterministic: false"
    with pytest.raises(ConfigError, match=wanted), explained(True):
        unordered()


def test_other_errors_of_a_step_stay_as_they_are():
    with pytest.raises(RuntimeError, match="size of tensor"), explained(True):
        torch.zeros(3) + torch.zeros(2)
    torch.use_deterministic_algorithms(True)  # set by someone else
    with pytest.raises(RuntimeError, match="put_"), explained(False):
        unordered()
