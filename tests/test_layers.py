"""Layers: who may import whom, and that a breach is noticed."""

import ast
import collections
import pathlib
import re
import subprocess
import sys

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


def layers():
  """The modules that the layers contract names."""
  text = CONTRACTS.read_text().split("layers =")[1].split("[")[0]
  return text.translate(str.maketrans("():|", "    ")).split()


def skeleton(root, imports):
  """Writes a moejax of all modules, empty but for these (module, imported)."""
  lines = collections.defaultdict(str)
  for module, imported in imports:
    lines[f"moejax.{module}"] += f"import {imported}\n"
  for name in [*layers(), "moejax.models.one", "moejax.data.two"]:
    path = root / f"{name.replace('.', '/')}.py"
    if name in ("moejax.models", "moejax.data"):
      path = path.with_suffix("") / "__init__.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "__init__.py").touch()
    path.write_text(lines[name])


BREACHES = {
  "Layers": [
    ("routing", "moejax.gating"),
    ("routing", "moejax.sharding"),
    ("gating", "moejax.losses"),
    ("losses", "moejax.router"),
    ("dispatch", "moejax.experts"),
    ("experts", "moejax.moe"),
    ("models.one", "moejax.data.two"),
    ("data.two", "moejax.models.one"),
    ("moe", "moejax.config"),
    ("training.step", "moejax.config"),
    ("training.loop", "moejax.main"),
  ],
  "ml_collections only in config": [
    ("training.step", "ml_collections"),
    ("moe", "ml_collections"),
  ],
  "Data libraries only in data": [
    ("training.loop", "grain"),
    ("models.one", "tensorflow_datasets"),
  ],
  "orbax only in training.checkpoint and .processes": [
    ("training.state", "orbax")
  ],
  "optax only in training": [("config", "optax")],
  "No flax in the pure functions": [("gating", "flax")],
  "Nothing of the project's outside": [
    ("main", "configs"),
    ("data.two", "tests"),
  ],
}


def test_contracts_are_kept_and_a_breach_is_noticed(tmp_path):
  """Of all breaches at once, each is found, and by its own contract."""
  result = lint(ROOT)
  assert result.returncode == 0, result.stdout + result.stderr
  skeleton(tmp_path, [each for rows in BREACHES.values() for each in rows])
  result = lint(tmp_path)
  assert result.returncode != 0
  _, *parts = re.split(r"\n(.+)\n-+\n", result.stdout)
  found = dict(zip(parts[::2], parts[1::2], strict=True))
  for contract, breaches in BREACHES.items():
    for module, imported in breaches:
      breach = f"moejax.{module} -> {imported} (l."
      assert breach in found[contract], (contract, breach, result.stdout)


def test_every_module_has_a_layer():
  """A new module must be given its place in importlinter.ini."""
  for module in modules():
    assert any(f"{module}.".startswith(f"{layer}.") for layer in layers()), (
      f"{module} has no layer in {CONTRACTS.name}"
    )


def test_mesh_axes_are_known_to_sharding_only():
  for module, path in modules().items():
    if module in ("moejax.sharding", "moejax.partition", "moejax.exchange"):
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
    # experiments/gpu.py runs where the terminal's libraries are missing.
    if module in ("moejax.terminal", "gpu"):
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
