"""The configs that come with moejax, and the shapes of what they train."""

import functools

import jax

from moejax import config as config_lib
from moejax import sharding

NAMES = tuple(config_lib.packaged())
VOCABULARY = 100


def load(name):
  return config_lib.load(name).unlock()


def experiment(name, **changes):
  """What a config describes, with some fields changed: `model__width=8`."""
  config = load(name)
  with config.ignore_type():
    for field, value in changes.items():
      *path, last = field.split("__")
      functools.reduce(getattr, path, config)[last] = value
  return config_lib.parse(config)


@functools.cache
def parameters_of(name):
  """`parameters` of a config of this name, whose layout takes eight devices."""
  built = experiment(name)
  with sharding.use(built.layout, sharding.make_mesh(built.layout)):
    return parameters(built)


def parameters(built):
  """Shapes of a model's parameters; traces training on a microbatch."""
  if not isinstance(built, config_lib.Experiment):
    built = config_lib.parse(built)
  net = built.model(VOCABULARY)
  rows, rest = divmod(built.batch_size, built.train.microbatches)
  assert rest == 0
  batch = {
    name: jax.ShapeDtypeStruct((rows, a.shape[1]), a.dtype)
    for name, a in built.shapes.items()
  }

  def init(batch):
    keys = {
      name: jax.random.key(0)
      for name in ("params", "dropout", "router", "softmax")
    }
    return net.init_with_output(keys, batch, train=True, method="loss")

  loss, tree = jax.eval_shape(init, batch)
  assert loss.shape == batch["mask"].shape
  return sharding.unbox(tree)["params"]


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
