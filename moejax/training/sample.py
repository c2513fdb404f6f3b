"""Text from a language model, each token drawn from the prediction of it."""

import functools
import itertools
import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moejax import losses, sharding
from moejax import routing as routing_lib
from moejax.moe import ROUTING
from moejax.routing import Assignment, Routing
from moejax.training import step


class Token(NamedTuple):
  """One token of a text.

  Attributes:
    id: of the token.
    experts: of every mixture, from the bottom, the experts that have read the
      token, and their gates. None where nobody asked, nor of the last token,
      which is not read.
  """

  id: int
  experts: list[list[tuple[int, float]]]


def choose(
  key: PRNGKeyArray,
  log_p: Float[Array, "V"],
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> Int[Array, ""]:
  """Draws a token of p^(1/temperature), among the likeliest ones.

  Args:
    key: decides the draw.
    log_p: nats.
    temperature: 0 takes the likeliest token.
    top_k: how many of the likeliest there are to draw from; 0 is all.
    top_p: of those, as few as have this chance together (1904.09751).
  """
  if temperature == 0:
    return jnp.argmax(log_p)
  order = jnp.argsort(-log_p)
  logits = log_p[order] / temperature
  rank = jnp.arange(log_p.size)
  if top_k:
    logits = jnp.where(rank < top_k, logits, -jnp.inf)
  p = jax.nn.softmax(logits)
  # The chance of all that come before; the first is always among them.
  before = jnp.cumsum(p) - p
  logits = jnp.where((before < top_p) | (rank == 0), logits, -jnp.inf)
  return order[jax.random.categorical(key, logits)]


class Sampler:
  """Continues prompts by a language model, whatever its parameters."""

  def __init__(
    self,
    model: nn.Module,
    layout: sharding.Layout,
    mesh: jax.sharding.Mesh,
    never: Collection[int] = (),
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    show_experts: bool = False,
  ):
    """Compiles nothing yet.

    Args:
      model: has the methods `begin` and `read` of `Transformer`; a text depends
        on nothing else if its mixtures drop nothing (`for_decoding`).
      layout, mesh: where arrays lie.
      never: ids that are not drawn.
      temperature, top_k, top_p: see `choose`.
      show_experts: whether tokens say who has read them.

    Raises:
      ValueError: an option is out of its range.
    """
    if not 0 <= temperature < math.inf:
      raise ValueError(
        f"temperature must be 0 or more, and finite, got {temperature}"
      )
    if top_k < 0:
      raise ValueError(f"top_k must be 0 (all tokens) or more, got {top_k}")
    if not 0 < top_p <= 1:
      raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    self._model, self._layout, self._mesh = model, layout, mesh
    self._show_experts = show_experts
    draw = functools.partial(
      choose, temperature=temperature, top_k=top_k, top_p=top_p
    )
    barred = np.isin(np.arange(model.vocab_size), list(never))

    @sharding.zero3
    def run(params, state, ids, keys, at):
      (state, log_p), sown = model.apply(
        {"params": params}, state, ids, method="read", mutable=[ROUTING]
      )
      log_p = jnp.where(barred[None], -jnp.inf, log_p[:, -1])
      keys = jax.vmap(jax.random.fold_in, (0, None))(keys, at)
      found = _mixtures(sown) if show_experts else []
      read_by = [routing_lib.edges(routing) for routing in found]
      return state, jax.vmap(draw)(keys, log_p), read_by

    # Once for the prompt, and once for each token that follows.
    self._run = jax.jit(run, donate_argnums=1)

  def texts(
    self, params: Any, prompt: Sequence[int], length: int, end: int, seed: int
  ) -> Iterator[Iterator[Token]]:
    """Yields texts without end; of each its tokens, as soon as they are read.

    There are as many at once as devices, but the seed alone decides what the
    n-th of them is.

    Args:
      params: of the model.
      prompt: what every text begins with, `<S>` first, and no `</S>` in it.
      length: tokens of a text after `<S>`, at most.
      end: id of `</S>`, the last token of a text that is not cut short.
      seed: of the draws.

    Raises:
      ValueError: the prompt leaves no room for a token.
    """
    if len(prompt) > length:
      raise ValueError(
        f"the prompt has {len(prompt) - 1} tokens, and a text at most {length};"
        f" give a shorter prompt, or a length of {len(prompt)} or more."
      )
    rows, key = self._mesh.size, jax.random.key(seed)
    for first in itertools.count(step=rows):
      keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(
        first + jnp.arange(rows)
      )
      columns = self._columns(params, prompt, length, end, keys)
      for row, each in enumerate(itertools.tee(columns, rows)):
        yield _until(end, (column[row] for column in each))

  def _columns(self, params, prompt, length, end, keys):
    """Yields the next token of every row, until all of them have ended."""
    rows = len(keys)
    state = self._model.begin(rows, length)
    known = [np.full(rows, token, np.int32) for token in prompt]
    where = sharding.batch_sharding(self._layout, self._mesh, rows)
    done, ended = 0, np.zeros(rows, bool)
    while done < length and not ended.all():
      # Of many that are read at once nobody could say who has read which.
      last = done + 1 if self._show_experts else len(known)
      ids = step.place({"ids": np.stack(known[done:last], axis=1)}, where)
      with sharding.use(self._layout, self._mesh):
        out = self._run(params, state, ids["ids"], keys, last)
      state, (drawn, read_by) = out[0], jax.device_get(out[1:])
      if last == len(known):
        known.append(drawn)
        ended |= known[-1] == end
      for column in known[done:last]:
        yield [
          Token(int(token), [_read_by(each, row) for each in read_by])
          for row, token in enumerate(column)
        ]
      done = last
    yield [Token(int(token), []) for token in known[-1]]


Part = tuple[str, list[list[tuple[int, float]]]]


def spelt(tokens: Iterator[Token], tokenizer: Any) -> Iterator[Part]:
  """Yields what each token looks like, and who has read it."""
  return ((tokenizer.spelt(token.id), token.experts) for token in tokens)


def written(tokens: Iterator[Token], tokenizer: Any) -> Iterator[Part]:
  """Yields what each token adds to the text, and who has read it.

  A letter that several tokens spell comes with the last of them, and what is
  left of one at the end.
  """

  def decode(ids):
    found = tokenizer.decode(i for i in ids if i not in tokenizer.special)
    return found if isinstance(found, str) else " ".join(found)

  # The tokens of the last part, after which a space may look otherwise than at
  # the begin, and those that came since.
  last, ids, new = [], [], ""
  for token in tokens:
    ids.append(token.id)
    new = decode([*last, *ids])[len(decode(last)) :]
    # This stands for what ends in the middle of a letter.
    if not new.endswith("\ufffd"):
      yield new, token.experts
      last, ids, new = ids, [], ""
  yield new, []


def _until(end: int, tokens: Iterator[Token]) -> Iterator[Token]:
  # The token before a text may be the one after it.
  yield next(tokens)
  for token in tokens:
    yield token
    if token.id == end:
      return


def _mixtures(sown: Any) -> list[Routing]:
  """Returns what the mixtures decided, from the bottom to the top."""
  paths = flax.traverse_util.flatten_dict(sown.get(ROUTING, {}), sep="/")

  def order(path):
    # Layer 10 comes after layer 2.
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path)]

  return losses.routings([paths[path] for path in sorted(paths, key=order)])


def _read_by(edges: Assignment, row: int) -> list[tuple[int, float]]:
  """Returns the experts and gates of a row's token, the largest gate first."""
  found = zip(edges.expert[row].tolist(), edges.gate[row].tolist(), strict=True)
  return sorted(
    (each for each in found if each[1] > 0), key=lambda each: -each[1]
  )
