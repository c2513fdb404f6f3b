"""The wheel, installed: it works from any folder, and brings its configs."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHOWS = """
import json, pathlib, moejax
from moejax import config
where = str(pathlib.Path(moejax.__file__).parent)
print(json.dumps([where, *config.packaged()]))
"""


def run(folder, *command, **environment):
  done = subprocess.run(
    [sys.executable, *map(str, command)],
    cwd=folder,
    env=os.environ | environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """A folder that has the installed package, and nothing else."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  # A build leaves files behind, which a later one takes up.
  for name in ("moejax", "configs"):
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, source / name, ignore=skip)
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    if (ROOT / name).exists():
      shutil.copy(ROOT / name, source)
  pip = "-m", "pip", "--disable-pip-version-check"
  flags = "--quiet", "--no-deps"
  run(folder, *pip, "wheel", *flags, "--no-build-isolation", source)
  (wheel,) = folder.glob("*.whl")
  run(folder, *pip, "install", *flags, "--target", folder / "site", wheel)
  return folder / "site"


def test_it_brings_all_configs(installed, tmp_path):
  found = run(tmp_path, "-c", SHOWS, PYTHONPATH=str(installed))
  package, *configs = json.loads(found)
  assert package == str(installed / "moejax")
  here = {
    str(p.relative_to(ROOT / "configs")) for p in ROOT.glob("configs/**/*.py")
  }
  assert {f"{name}.py" for name in configs} == {
    name for name in here if not name.endswith("common.py")
  }


def test_it_trains_from_any_folder(installed, corpus, small_flags, tmp_path):
  flags = ["--config=tiny", *small_flags[1:], "--config.train.steps=2"]
  command = "-m", "moejax", "train", *flags, "--workdir=run"
  said = run(tmp_path, *command, PYTHONPATH=str(installed), XLA_FLAGS="")
  assert "by the best checkpoint (step 2 of 2)" in said
  assert (tmp_path / "run" / "config.json").exists()
