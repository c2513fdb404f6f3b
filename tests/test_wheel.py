"""The wheel, installed: it has all modules, and works from any folder."""

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


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


def files_in(folder):
  return {
    str(path.relative_to(folder))
    for path in folder.rglob("*")
    if path.is_file() and path.suffix != ".pyc"
  }


def test_a_wheel_has_all_modules_and_configs(tmp_path):
  source, site = tmp_path / "source", tmp_path / "site"
  # A build leaves files behind, which a later one takes up.
  for name in ("moejax", "configs"):
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, source / name, ignore=skip)
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  pip = "-m", "pip", "--disable-pip-version-check"
  flags = "--quiet", "--no-deps"
  run(tmp_path, *pip, "wheel", *flags, "--no-build-isolation", source)
  (wheel,) = tmp_path.glob("*.whl")
  run(tmp_path, *pip, "install", *flags, "--target", site, wheel)
  configs = {f"configs/{name}" for name in files_in(ROOT / "configs")}
  assert files_in(site / "moejax") == files_in(ROOT / "moejax") | configs
  # The program finds its configs by name, and what they need.
  command = "-m", "moejax", "train", "--config=sotu/moe_1_wide", "--help"
  said = run(tmp_path, *command, PYTHONPATH=str(site))
  assert "--config.model.one_expert.hidden=512" in said
