"""The base installation, without extras: a trained model can be used and converted."""

import json
import os
import re
import subprocess
import tomllib
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.integration.test_package_names import copied_checkout
from tests.support.finished import run_config, write_run
from tests.support.paths import ROOT
from tests.support.progress import run_watched
from univitar_ds import UniViTARModel

pytestmark = pytest.mark.slow
NEAR = 1e-5

USE = """
import importlib.util, json, sys
from PIL import Image
from univitar_ds import UniViTARModel
model = UniViTARModel.from_pretrained(sys.argv[1])
image = Image.open(sys.argv[2])
probabilities = model.zero_shot([image, [image, image]], ["red image", "green image"])
features = model.features([image])
absent = ["deepspeed", "triton", "boto3", "webdataset", "matplotlib", "tensorboard"]
print(json.dumps({
    "present": [name for name in absent if importlib.util.find_spec(name)],
    "imported": sorted({name.partition(".")[0] for name in sys.modules}),
    "images": model.encode_image([image]).tolist(), "texts": model.encode_text(["a red image"]).tolist(),
    "zero-shot": probabilities.tolist(), "tokens": features.tokens[0].shape,
}))
"""


class Base:
    """A new environment with the base packages and without those of the extras.

    torch and its dependencies are large, so they are links to this environment. The other packages are installed.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", with_pip=True)
        self.python = folder / "venv" / "bin" / "python"
        packages = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
        shared = Path(torch.__file__).parents[1]
        needed = ["torch", "torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec",
                  "filelock", "typing_extensions.py"]  # fmt: skip
        info = [path.name for path in shared.glob("*.dist-info") if re.match(
            r"(torch|sympy|mpmath|networkx|[Jj]inja2|[Mm]arkup[Ss]afe|fsspec|filelock|typing_extensions)-",
            path.name)]  # fmt: skip
        for name in [*needed, *info]:
            if (shared / name).exists() and not (packages / name).exists():
                (packages / name).symlink_to(shared / name)
        base = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
        self.pip("install", "--quiet", *(line for line in base if not line.startswith("torch==")))
        checkout = copied_checkout(folder / "checkout")
        self.pip("install", "--quiet", "--no-deps", str(checkout))

    def pip(self, *arguments: str) -> None:
        done = self.run("-m", "pip", *arguments)
        assert done.returncode == 0, done.stderr[-2000:]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
        return run_watched([str(self.python), *arguments], env={**kept, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return Base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tried"
    write_run(folder, run_config())
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "drawn.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)).save(path)
    return path


def test_a_run_is_used_as_with_all_extras(base, run, image):
    done = base.run("-c", USE, str(run), str(image))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["present"] == []
    assert not {"deepspeed", "triton", "boto3"} & set(found["imported"])
    here = UniViTARModel.from_pretrained(run)
    picture = Image.open(image)
    assert (torch.tensor(found["images"]) - here.encode_image([picture])).abs().max() < NEAR
    assert (torch.tensor(found["texts"]) - here.encode_text(["a red image"])).abs().max() < NEAR
    wanted = here.zero_shot([picture, [picture, picture]], ["red image", "green image"])
    assert (torch.tensor(found["zero-shot"]) - wanted).abs().max() < NEAR


def test_a_run_is_converted(base, run, tmp_path):
    done = base.run("-m", "univitar_ds", "convert", str(run), str(tmp_path / "out"), "--to", "release", "--verify")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "verified" in done.stdout


def test_files_are_embedded_and_classified(base, run, image, tmp_path):
    done = base.run("-m", "univitar_ds", "embed", str(run), str(image), "--out", str(tmp_path / "f.safetensors"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 rows in f-00000.safetensors" in done.stdout
    done = base.run("-m", "univitar_ds", "classify", str(run), str(image), "--labels", "red,green")
    assert done.returncode == 0, done.stderr[-3000:]
    done = base.run("-m", "univitar_ds", "embed", str(run), str(image), "--out", str(tmp_path / "f.parquet"))
    assert done.returncode == 2
    assert "pip install 'univitar_ds[parquet]'" in done.stderr


def test_training_names_the_missing_extra(base, tmp_path):
    done = base.run("-m", "univitar_ds", "train", "--config", "demo", f"output={tmp_path}")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "pip install 'univitar_ds[train]'" in done.stderr
    assert "Traceback" not in done.stderr
