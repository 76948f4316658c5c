"""The public names of the package."""

import pytest

import univitar_ds


def test_the_public_names_are_two_classes_and_a_version():
    assert {"UniViTAR", "Preprocessor", "__version__"} <= set(dir(univitar_ds))
    assert univitar_ds.UniViTAR.__module__ == "univitar_ds.model.encoder"
    assert univitar_ds.Preprocessor.__module__ == "univitar_ds.preprocessing"
    with pytest.raises(AttributeError, match="no attribute 'Univitar'"):
        _ = univitar_ds.Univitar
