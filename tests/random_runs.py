"""Runs of random numbers, which look like trained ones and take no training."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax import config as config_lib
from moejax import workdir as workdir_lib
from moejax.training import checkpoint, run, session

# Of a language model, beside its config's own: small.
SMALL = {
  "data.row_length": 16,
  "data.batch_size": 8,
  "model.width": 8,
  "model.num_samples": 16,
  "train.steps": 3,
  "train.log_every": 1,
}


def experiment_of(flags):
  name, *changes = (flag.lstrip("-").partition("=") for flag in flags)
  changes = [(field, [value]) for field, _, value in changes]
  return config_lib.parse(config_lib.load(name[2], changes))


def write(experiment, workdir):
  data = config_lib.open_corpus(experiment)
  built = session.build(experiment, len(data.vocabulary))
  rng = np.random.default_rng(0)

  def random(leaf):
    if not leaf.ndim:
      return jnp.full((), 2, leaf.dtype)
    array = 0.5 * rng.normal(size=leaf.shape)
    return jax.device_put(np.asarray(array, leaf.dtype), leaf.sharding)

  made = jax.tree.map(random, built.abstract_state)
  # Second moments are not negative.
  made = made._replace(opt_state=jax.tree.map(jnp.abs, made.opt_state))
  text = {split: data.rows(split).digest for split in data.splits}
  workdir.mkdir()
  workdir_lib.remember(experiment.values, data.vocabulary, text, workdir)
  checkpoints = checkpoint.Checkpoints(workdir / run.CHECKPOINTS)
  checkpoints.save(made, 2, {"text": text})
  checkpoints.close()
