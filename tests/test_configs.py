"""Every config builds a model, and the twins cost the same."""

import importlib.util
import pathlib

import flax.linen as nn
import jax
import pytest

from moejax import config as config_lib
from moejax.data import text
from moejax.training import optim

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
NAMES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.py"))
VOCABULARY = 100


def load(name):
  spec = importlib.util.spec_from_file_location("config", CONFIGS / name)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def parameters(config):
  """Shapes of the parameters of a config's model; allocates nothing."""
  net = config_lib.model(config, VOCABULARY)
  shape = (config.data.batch_size, config.data.row_length)
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype)
    for name, dtype in text.TYPES.items()
  }
  tree = jax.eval_shape(
    lambda batch: net.init(jax.random.key(0), batch, method="loss"), batch
  )
  return nn.unbox(tree)["params"]


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name):
  config = load(name)
  config_lib.check(config)
  tree = parameters(config)
  shape = (VOCABULARY, config.model.width)
  assert tree["embed"]["table"].shape == shape
  assert tree["head"]["table"].shape == shape
  assert tree["layers_1"]


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_twins_have_the_same_ops_per_timestep():
  sparse, dense = load("sotu/moe_32.py"), load("sotu/moe_1_wide.py")
  sparse_layer = parameters(sparse)["layers_1"]
  dense_layer = parameters(dense)["layers_1"]
  moe = sparse.model.moe
  active = size(sparse_layer["experts"]) * moe.router.k // moe.num_experts
  assert active == size(dense_layer) == 65_536
  assert size(sparse_layer["router"]) == 4_096
  for section in ("data", "optimizer", "train", "aux"):
    assert sparse[section].to_dict() == dense[section].to_dict()


def test_lists_of_choices_are_checked():
  config = load("tiny.py")
  config.model.layers = ("lstm", "mole", "lstm")
  with pytest.raises(ValueError, match=r"config\.model\.layers is 'mole'"):
    config_lib.model(config, VOCABULARY)


def test_unknown_field_of_a_section_names_the_nearest():
  config = load("tiny.py")
  with config.unlocked():
    config.model.moe.grop_size = 4
  with pytest.raises(
    ValueError, match=r"model\.moe\.grop_size .*nearest is .*group_size"
  ):
    config_lib.model(config, VOCABULARY)


def test_schedule_is_the_configs():
  config = load("tiny.py")
  schedule, _ = config_lib.optimizer(config)
  want = optim.warmup_rsqrt(config.optimizer.peak, 50)
  assert float(schedule(7)) == float(want(7))
