"""Layers: who may import whom, and that a breach is noticed."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONTRACTS = pathlib.Path(__file__).with_name("importlinter.ini")

LINT = """
import sys
from importlinter import cli
sys.exit(cli.lint_imports(config_filename=sys.argv[1], no_cache=True))
"""


def lint(root):
  """Checks the contracts of the package below root, in its own process."""
  return subprocess.run(
    [sys.executable, "-c", LINT, CONTRACTS],
    cwd=root,
    env={"PATH": "", "PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    check=False,
  )


def modules():
  """All modules of moejax by name, packages by their __init__ excepted."""
  return {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "moejax").rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
  }


def test_contracts_are_kept():
  result = lint(ROOT)
  assert result.returncode == 0, result.stdout + result.stderr


def layers():
  """The modules that the layers contract names."""
  text = CONTRACTS.read_text().split("layers =")[1].split("[")[0]
  return text.translate(str.maketrans("():|", "    ")).split()


def skeleton(root, **lines):
  """Writes a moejax of all modules, empty but for the given lines."""
  for name in [*layers(), "moejax.models.one", "moejax.data.two"]:
    path = root / f"{name.replace('.', '/')}.py"
    if name in ("moejax.models", "moejax.data"):
      path = path.with_suffix("") / "__init__.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "__init__.py").touch()
    path.write_text(lines.get(name.removeprefix("moejax."), ""))


@pytest.mark.parametrize(
  "module, line, contract",
  [
    ("routing", "from moejax import gating", "Layers"),
    ("routing", "from moejax import sharding", "Layers"),
    ("gating", "from moejax import losses", "Layers"),
    ("losses", "from moejax.router import TopK", "Layers"),
    ("dispatch", "from moejax import experts", "Layers"),
    ("experts", "def f():\n  from moejax import moe", "Layers"),
    ("models.one", "from moejax.data import two", "Layers"),
    ("data.two", "import moejax.models.one", "Layers"),
    ("moe", "import moejax.config", "Layers"),
    ("training.step", "from moejax import config", "Layers"),
    ("training.loop", "from moejax import main", "Layers"),
    ("training.step", "import ml_collections", "ml_collections only"),
    ("moe", "from ml_collections import config_dict", "ml_collections only"),
    ("training.loop", "import grain.python", "Data libraries"),
    ("models.one", "import tensorflow_datasets as tfds", "Data libraries"),
    ("training.state", "import orbax.checkpoint as ocp", "orbax only"),
    ("config", "import optax", "optax only"),
    ("gating", "import flax.linen as nn", "No flax"),
    ("main", "from configs import tiny", "Nothing of the project's outside"),
    ("data.two", "import tests.reference", "Nothing of the project's outside"),
  ],
)
def test_a_breach_is_noticed(tmp_path, module, line, contract):
  skeleton(tmp_path, **{module: line})
  result = lint(tmp_path)
  assert result.returncode != 0
  rows = [row for row in result.stdout.split("\n") if " BROKEN" in row]
  assert len(rows) == 1 and rows[0].startswith(contract), result.stdout


def test_what_is_allowed_passes(tmp_path):
  """The same imports where they belong break nothing."""
  allowed = {
    "main": "import moejax.config",
    "config": "import ml_collections\nimport moejax.training.step",
    "training.loop": "from moejax import config",
    "training.checkpoint": "import orbax.checkpoint",
    "training.step": "from moejax.training import state",
    "training.state": "import optax",
    "data.two": "import grain, array_record, tensorflow_datasets",
    "models.one": "from moejax import moe",
    "router": "import flax.linen\nfrom moejax import gating",
    "gating": "from moejax import routing, sharding",
    "sharding": "import flax.linen",
  }
  skeleton(tmp_path, **allowed)
  result = lint(tmp_path)
  assert result.returncode == 0, result.stdout + result.stderr


def test_every_module_has_a_layer():
  """A new module must be given its place in importlinter.ini."""
  for module in modules():
    assert any(f"{module}.".startswith(f"{layer}.") for layer in layers()), (
      f"{module} has no layer in {CONTRACTS.name}"
    )


def test_mesh_axes_are_known_to_sharding_only():
  for module, path in modules().items():
    if module in ("moejax.sharding", "moejax.partition"):
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      name = getattr(node, "attr", getattr(node, "id", None))
      assert name not in ("PartitionSpec", "shard_map", "axis_index"), (
        f"{module} speaks of the mesh: {name}"
      )


def test_only_the_terminal_prints():
  """Text of users must not reach a terminal as it is, nor stop a run."""
  programs = {p.stem: p for p in (ROOT / "experiments").glob("*.py")}
  for module, path in (modules() | programs).items():
    if module == "moejax.terminal":
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      name = ast.unparse(node) if isinstance(node, ast.expr) else ""
      assert name not in ("print", "sys.stdout", "sys.stderr", "tqdm.write"), (
        f"{module} prints by itself; use moejax.terminal"
      )
      if isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm.tqdm":
        assert "file" in {keyword.arg for keyword in node.keywords}, (
          f"{module} draws a bar by itself; give it a terminal.Live"
        )
