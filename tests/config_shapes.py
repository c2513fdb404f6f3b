"""The configs of configs/, and the shapes of what they train."""

import functools
import pathlib
import runpy

import jax

from moejax import config as config_lib
from moejax import sharding
from moejax.data import packing

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
NAMES = sorted(
  str(path.relative_to(CONFIGS))
  for path in CONFIGS.rglob("*.py")
  if path.name != "common.py"
)
VOCABULARY = 100


def load(name):
  return runpy.run_path(str(CONFIGS / name))["get_config"]()


@functools.cache
def parameters_of(name):
  """`parameters` of a config of this name, whose layout takes eight devices."""
  config = load(name)
  layout = config_lib.layout(config)
  with sharding.use(layout, sharding.make_mesh(layout)):
    return parameters(config)


def parameters(config):
  """Shapes of a model's parameters; traces training on a microbatch."""
  net = config_lib.model(config, VOCABULARY)
  rows, rest = divmod(config.data.batch_size, config.train.microbatches)
  assert rest == 0
  batch = packing.batch_shapes(
    rows, config.data.row_length, config.data.get("source_length", 0)
  )

  def init(batch):
    keys = {
      name: jax.random.key(0)
      for name in ("params", "dropout", "router", "softmax")
    }
    return net.init_with_output(keys, batch, train=True, method="loss")

  loss, tree = jax.eval_shape(init, batch)
  assert loss.shape == (rows, config.data.row_length)
  return sharding.unbox(tree)["params"]


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
