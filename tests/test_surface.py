"""What `import moejax` gives, and what it takes to import the layer."""

import pathlib
import subprocess
import sys

import jax
import numpy as np

import moejax
from moejax.data import vocab

ROOT = pathlib.Path(__file__).parents[1]

PUBLIC = """
  MoE HierarchicalMoE Router Softmax TopK NoisyTopK Balanced SoftmaxTopK Switch
  GShardTop2 ExpertChoice ExpertThreshold Hash Sigmoid FeedForward Linear
  Identity Each Mixed Routing Assignment auxiliary_loss balance_metrics routings
  Layout LAYOUTS make_mesh use_layout with_averages gating losses dispatch
  experts sharding testing load __version__
"""


def test_the_public_names():
  assert sorted(moejax.__all__) == sorted(PUBLIC.split()) == sorted(dir(moejax))
  for name in PUBLIC.split():
    assert getattr(moejax, name) is not None
  assert moejax.use_layout is moejax.sharding.use
  assert moejax.balance_metrics is moejax.losses.balance
  setup = (ROOT / "setup.py").read_text()
  assert moejax.__version__ not in setup and "__version__" in setup
  assert (ROOT / "moejax" / "py.typed").exists()


# Refuses all but what the layer may need, and what these need themselves.
ALONE = """
import sys
import moejax
assert not {"jax", "flax", "numpy"} & set(sys.modules)
import flax, flax.linen, jax, jaxtyping, numpy
there = set(sys.modules)

class Refuse:
  def find_spec(self, name, path=None, target=None):
    own = ("moejax", "jax", "jaxlib", "flax", "numpy", "jaxtyping")
    top = name.split(".")[0]
    if top not in own and top not in sys.stdlib_module_names:
      raise ModuleNotFoundError(f"the layer imports {name}")

sys.meta_path.insert(0, Refuse())
for name in set(moejax.__all__) - {"load", "with_averages"}:
  getattr(moejax, name)
layer = moejax.MoE(moejax.TopK(4, 2), moejax.FeedForward(4, 8))
y, _ = layer.init_with_output(jax.random.key(0), numpy.ones((2, 4, 3)))
assert y.shape == (2, 4, 3)
floor = "routing gating router slots dispatch ragged exchange grouped kernels"
floor += " experts moe losses sharding partition quantiles testing"
floor += " testing.grouped"
mine = {name for name in sys.modules if name.startswith("moejax.")}
print(*sorted(mine - {f"moejax.{name}" for name in floor.split()}))
"""


def test_the_layer_needs_jax_flax_jaxtyping_and_numpy_alone():
  """And of moejax its own floor: nothing of runs, files or terminals."""
  result = subprocess.run(
    [sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=ROOT
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == ""


def test_a_run_is_loaded_into_python(whole):
  """Its model, its best parameters, its vocabulary, its config."""
  found = moejax.load(whole[0])
  assert isinstance(found.tokenizer, vocab.Vocabulary)
  assert found.config["train"]["steps"] == 12
  shapes = jax.tree.map(np.shape, found.params)
  words, width = len(found.tokenizer), found.config["model"]["width"]
  assert shapes["embed"]["table"] == shapes["head"]["table"] == (words, width)
