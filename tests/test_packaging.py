"""What somebody has who installs the package with pip and never sees the checkout."""

import json
import shutil
import site
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
from helpers import ROOT, TINY, run

from care_hub.config import recipes

pytestmark = pytest.mark.slow

LEFT_OUT = shutil.ignore_patterns(".*", "runs", "build", "dist", "site", "__pycache__", "*.egg-info")
OWN_PATH = {"PYTHONPATH": ""}  # without the checkout


def build(kind: str, source: Path, target: Path) -> Path:
    """An `sdist` or a `wheel` of what lies in `source`, by the setuptools at hand."""
    code = f"from setuptools.build_meta import *; print(build_{kind}({str(target)!r}))"
    return target / run("python", "-c", code, cwd=source).stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist of a copy of the checkout, and the wheel of what the sdist contains."""
    pytest.importorskip("setuptools", "77")
    root = tmp_path_factory.mktemp("packages")
    sdist = build("sdist", shutil.copytree(ROOT, root / "checkout", ignore=LEFT_OUT), root)
    with tarfile.open(sdist) as archive:
        archive.extractall(root, filter="data")
    return sdist, build("wheel", root / sdist.name.removesuffix(".tar.gz"), root)


def test_sdist_and_wheel_hold_all_that_belongs_to_them(distributions):
    sdist, wheel = distributions
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {f"care_hub/recipes/{name}.yaml" for name in recipes()} | {"care_hub/recipes/slurm.sh"}
    assert {"train.py", "eval_linear.py", "tests/helpers.py", "docs/index.md", *expected} <= names
    inside = set(ZipFile(wheel).namelist())
    assert expected | {"care_hub/report/page.html", "care_hub/hub/card.md"} <= inside
    assert {name.split("/")[0].split("-")[0] for name in inside} == {"care_hub"}


def test_an_index_would_take_them(distributions):
    pytest.importorskip("twine")
    run("python", "-m", "twine", "check", "--strict", *distributions)


def test_the_wheel_alone_is_enough(distributions, photos, tmp_path):
    """In an environment that has the dependencies of this one, but not the checkout."""
    venv, here = tmp_path / "venv", tmp_path / "empty folder"
    here.mkdir()
    run("python", "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))  # whose .pth files stay out
    pip = ("python", "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", distributions[1], env=OWN_PATH)

    def care_hub(*words, program=(venv / "bin" / "care-hub",)) -> str:
        return run(*program, *words, cwd=here, env=OWN_PATH).stdout

    where = run(python, "-c", "import care_hub; print(care_hub.__file__)", cwd=here, env=OWN_PATH).stdout
    assert Path(where).is_relative_to(packages)
    assert "cifar10_small " in care_hub("recipes") and "resnet10_w16_small.care_shapes" in care_hub("list")
    launch = (python, "-m", "accelerate.commands.launch", "-m", "care_hub")
    options = ("--config", "recipes/shapes.yaml", *TINY, "--max-steps", "4", "--run-name")
    screen = care_hub("train", *options, "a", program=launch)
    assert "\n  accelerate launch -m care_hub train --config" in screen
    care_hub("train", *options, "b")
    assert "64 embeddings" in care_hub("embed", photos, "--encoder", "runs/b", "-o", "z.parquet")
    probed = care_hub("probe", "--encoder", "runs/a", "--dataset-name", "shapes")
    assert json.loads(probed.splitlines()[-1])["top1"] > 10
    assert (here / "runs/a/export/linear_head.shapes.safetensors").is_file()
