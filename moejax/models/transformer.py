"""Transformers whose feed-forward layers may be mixtures.

Blocks are pre-norm: x + attention(norm(x)), then x + feed_forward(norm(x)). The
feed-forward layer is `MoE`, of one expert or of many, as it stands between
LSTMs. Sentences, and pairs of them, that share a row do not see each other.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import config_fields, sharding
from moejax.config_fields import Names, Range, Size
from moejax.models.layers import Embed, declare, look_up, product
from moejax.models.lstm_lm import Dropout, DType
from moejax.models.softmax import Predictor, Softmax
from moejax.models.stack import for_decoding
from moejax.moe import ROUTING

# As of LSTMLM, or of GNMT.
Batch = Mapping[str, Array]

# The last has no parameters, as that of OLMo (2402.00838).
NORMS = ("rms", "layer", "plain_layer")
POSITIONS = ("rotary", "relative")
QK_NORMS = ("none", "head", "width")
# T5's buckets of distances: half of them are exact, the others grow with the
# logarithm up to the last, which is for all that is further away.
_BUCKETS, _FURTHEST = 32, 128


class Cache(NamedTuple):
  """Keys and values of a layer, for as many tokens of a row as there is room.

  With layers that repeat there is an axis of these behind that of rows. Of
  `LatentAttention` it is what keys and values are made of.
  """

  keys: Float[Array, "B *layers S K _"]
  values: Float[Array, "B *layers S K _"]

  def add(self, keys: Array, values: Array, filled: Array) -> "Cache":
    """Returns one that holds those of the next tokens, too."""
    return jax.tree.map(
      lambda old, new: jax.lax.dynamic_update_slice_in_dim(
        old, new, filled, axis=1
      ),
      self,
      Cache(keys, values),
    )


class State(NamedTuple):
  """What a model has read of the rows that it continues.

  Attributes:
    filled: how many tokens, the same in every row.
    caches: those of the blocks of each unit, in turn.
  """

  filled: Int[Array, "B"]
  caches: tuple[tuple[Cache, ...], ...]


class Places(NamedTuple):
  """Where tokens are, and what each may attend to.

  Attributes:
    position: of each token in its sentence, from 0; None where attention does
      not know of places.
    seen: whether the token at L attends to the one at S.
    bias: what is added to the attention's logits; None where positions turn
      queries and keys.
    filled: where in a cache the tokens come to lie.
  """

  position: Int[Array, "B L"] | None
  seen: Bool[Array, "B 1 L S"]
  bias: Float[Array, "B N L S"] | None = None
  filled: Int[Array, ""] | None = None


class Source(NamedTuple):
  """What a decoder attends to, beside what it has written.

  Attributes:
    states: of the encoder.
    segment: number of the pair, from 1, of each token; 0 at padding.
  """

  states: Float[Array, "B M D"]
  segment: Int[Array, "B M"]


class MultiHeadAttention(nn.Module):
  """Attention with several heads (1706.03762), without biases.

  Attributes:
    num_heads: N.
    num_kv_heads: K, of keys and values, each of which N / K heads share
      (2305.13245); None has as many as heads.
    head_dim: H; None is width / N.
    rotary_base: base of the wavelengths of rotary positions (2104.09864).
    qk_norm: RMS norm of queries and keys: "none", of every "head" by itself, or
      over the "width" of all heads.
    epsilon: of that norm.
    scaled: whether logits are divided by the root of H; T5's (1910.10683) are
      not.
  """

  num_heads: Size
  num_kv_heads: Size | None = None
  head_dim: Size | None = None
  rotary_base: Annotated[float, Range(1)] = 10_000.0
  qk_norm: Annotated[str, Names(QK_NORMS)] = "none"
  epsilon: float = 1e-6
  scaled: bool = True

  def sizes(self, width: int) -> tuple[int, int, int]:
    """Returns N, K and H in a layer of this width.

    Raises:
      ValueError: they do not divide, or a head has no pairs of entries.
    """
    N, K = self.num_heads, self.num_kv_heads or self.num_heads
    if N % K:
      raise ValueError(
        f"{K} heads of keys and values do not divide {N} heads; choose a"
        " num_kv_heads that does."
      )
    if self.head_dim is None and width % N:
      raise ValueError(
        f"{N} heads do not divide a width of {width}; choose a num_heads that"
        " does, or give head_dim."
      )
    H = self.head_dim or width // N
    if H % 2:
      raise ValueError(
        f"a head has {H} entries, but positions turn pairs of them; choose an"
        " even head_dim."
      )
    return N, K, H

  def ops_per_position(self, width: int) -> int:
    """Multiply-adds of a token with each that it may attend to."""
    N, _, H = self.sizes(width)
    return 2 * N * H

  def of_token(self, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of a token's entries in the two arrays of a `Cache`."""
    _, K, H = self.sizes(width)
    return (K, H), (K, H)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B L D"],
    source: Float[Array, "B S D"],
    cache: Cache | None,
    places: Places,
  ) -> tuple[Float[Array, "B L D"], Cache | None]:
    """Lets x attend to the source or, with a cache, to what that then holds."""
    config_fields.one_of(self.qk_norm, QK_NORMS, "qk_norm")
    N, K, H = self.sizes(x.shape[-1])
    turns = places.bias is None and places.position is not None

    def project(name, x, heads):
      shape = (x.shape[-1], heads * H)
      w = declare(self, f"w_{name}", ("embed", "heads"), shape)
      y = product("BLD,DM->BLM", x, w, x.dtype)
      # Norm and rotation are of the float32 sums, as are their results.
      if self.qk_norm == "head":
        y = y.reshape(*y.shape[:2], heads, H)
      if self.qk_norm != "none" and name != "value":
        y = make_norm("rms", self.epsilon, f"norm_{name}")(y)
      y = y.reshape(*y.shape[:2], heads, H)
      if turns and name != "value":
        y = rotate(y, places.position, self.rotary_base)
      return y.astype(x.dtype)

    query = project("query", x, N)
    key, value = project("key", source, K), project("value", source, K)
    if cache is not None:
      key, value = cache = cache.add(key, value, places.filled)
    scale = None if self.scaled else 1.0
    return _attend(self, query, key, value, places, x.shape[-1], scale), cache


class LatentAttention(nn.Module):
  """Attention to what one short vector a token says (2405.04434, sec. 2.1).

  Of c = norm(x W_latent) are a head's keys, c W_key, and its values, c W_value.
  Positions turn entries of their own, which each query has, and a key once for
  all heads, x W_rotary. So a cache holds c and these alone.

  Attributes:
    num_heads: N.
    rank: entries of c.
    head_dim: H, entries of a head's key out of c, and of its value.
    rotary_dim: R, entries that positions turn.
    query_rank: queries come of a norm of so many products, as keys do; None
      makes them of x itself.
    rotary_base: as of `MultiHeadAttention`.
    epsilon: of the norms.
  """

  num_heads: Size
  rank: Size
  head_dim: Size
  rotary_dim: Size
  query_rank: Size | None = None
  rotary_base: Annotated[float, Range(1)] = 10_000.0
  epsilon: float = 1e-6

  def ops_per_position(self, width: int) -> int:
    """As of `MultiHeadAttention`."""
    del width
    return self.num_heads * (2 * self.head_dim + self.rotary_dim)

  def of_token(self, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """As of `MultiHeadAttention`."""
    del width
    return (1, self.rotary_dim), (1, self.rank)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B L D"],
    source: Float[Array, "B S D"],
    cache: Cache | None,
    places: Places,
  ) -> tuple[Float[Array, "B L D"], Cache | None]:
    """As of `MultiHeadAttention`.

    Raises:
      ValueError: rotary_dim is odd, or positions are not rotary.
    """
    N, H, R = self.num_heads, self.head_dim, self.rotary_dim
    if R % 2:
      raise ValueError(
        f"rotary_dim is {R}, but positions turn pairs of entries; choose an"
        " even one."
      )
    if places.bias is not None:
      raise ValueError(
        "latent attention has rotary positions alone; let position be 'rotary'."
      )

    def project(name, x, size, axes=("embed", "heads"), norm=False):
      w = declare(self, f"w_{name}", axes, (x.shape[-1], size))
      y = product("BLD,DM->BLM", x, w, x.dtype)
      if norm:
        y = make_norm("rms", self.epsilon, f"norm_{name}")(y)
      return y.astype(x.dtype)

    def turn(y):
      if places.position is None:
        return y
      y = rotate(y.astype(jnp.float32), places.position, self.rotary_base)
      return y.astype(x.dtype)

    def heads(y):
      return y.reshape(*y.shape[:2], N, -1)

    # What all heads share lies with none of them.
    shared = "embed", None
    asked = x
    if self.query_rank is not None:
      asked = project("query_latent", x, self.query_rank, shared, norm=True)
    query = heads(project("query", asked, N * (H + R)))
    plain, turned = jnp.split(query, [H], axis=-1)
    query = jnp.concatenate([plain, turn(turned)], axis=-1)
    c = project("latent", source, self.rank, shared, norm=True)[:, :, None]
    turned = turn(project("rotary", source, R, shared)[:, :, None])
    if cache is not None:
      turned, c = cache = cache.add(turned, c, places.filled)
    c = c[:, :, 0]
    key, value = (
      heads(project(name, c, N * H, (None, "heads")))
      for name in ("key", "value")
    )
    turned = jnp.broadcast_to(turned, (*key.shape[:3], R))
    key = jnp.concatenate([key, turned], axis=-1)
    return _attend(self, query, key, value, places, x.shape[-1]), cache


def _attend(module, query, key, value, places, width, scale=None):
  """Attention of heads [B L N H] to [B S K H], and W_out of the module's.

  A scale of None is H^(-1/2).
  """
  (B, L, N, H), dtype, V = query.shape, query.dtype, value.shape[-1]
  # cuDNN's kernel takes 16 bits alone.
  fused = sharding.platform() == "gpu" and dtype.itemsize == 2
  y = jax.nn.dot_product_attention(
    query,
    key,
    # Values must be as wide as keys.
    jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, H - V))) if V < H else value,
    None if places.bias is None else places.bias.astype(dtype),
    places.seen,
    scale=scale,
    implementation="cudnn" if fused else None,
  )
  w_out = declare(module, "w_out", ("heads", "embed"), (N * V, width))
  y = product("BLM,MD->BLD", y[..., :V].reshape(B, L, N * V), w_out, dtype)
  return y.astype(dtype)


def rotate(
  x: Float[Array, "B L N H"], position: Int[Array, "B L"], base: float
) -> Float[Array, "B L N H"]:
  """Turns pairs of entries by angles that grow with the position (2104.09864).

  The pair of the entries i and i + H/2 turns by position * base^(-2i/H).
  """
  first, second = jnp.split(x, 2, axis=-1)
  half = first.shape[-1]
  speed = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = position[:, :, None].astype(jnp.float32) * speed[None, None]
  cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
  turned = first * cos - second * sin, second * cos + first * sin
  return jnp.concatenate(turned, axis=-1)


def make_norm(kind: str, epsilon: float, name: str | None = None) -> nn.Module:
  """Makes a norm over the last axis, of float32 parameters.

  Raises:
    ValueError: there is no such kind.
  """
  config_fields.one_of(kind, NORMS, "norm")
  fields = {"scale_init": sharding.with_axes(nn.initializers.ones, None)}
  if kind == "layer":
    fields["bias_init"] = sharding.with_axes(nn.initializers.zeros, None)
  if kind == "plain_layer":
    fields = {"use_bias": False, "use_scale": False}
  module = nn.RMSNorm if kind == "rms" else nn.LayerNorm
  # Whatever the type of the activations.
  return module(epsilon, dtype=jnp.float32, name=name, **fields)


class Block(nn.Module):
  """Attention, then a feed-forward layer, each added to what it reads.

  Attributes:
    make_attention: makes a MultiHeadAttention, or a LatentAttention.
    make_feed_forward: makes a module called as MoE is.
    reads_source: whether there is attention to a source between the two.
    norm: one of `NORMS`.
    epsilon: of the norms.
    dropout: chance of zeroing an output.
  """

  make_attention: Callable[[], nn.Module]
  make_feed_forward: Callable[[], nn.Module]
  reads_source: bool
  norm: str
  epsilon: float
  dropout: float

  def setup(self) -> None:
    self.norm_1 = make_norm(self.norm, self.epsilon)
    self.attention = self.make_attention()
    if self.reads_source:
      self.norm_source = make_norm(self.norm, self.epsilon)
      self.source_attention = self.make_attention()
    self.norm_2 = make_norm(self.norm, self.epsilon)
    self.feed_forward = self.make_feed_forward()
    self.drop = nn.Dropout(self.dropout)

  def __call__(self, x, cache, places, source, mask, ids, train):
    y = self.norm_1(x).astype(x.dtype)
    y, cache = self.attention(y, y, cache, places)
    x = x + self.drop(y, deterministic=not train)
    if self.reads_source:
      y = self.norm_source(x).astype(x.dtype)
      states, of_source = source
      y, _ = self.source_attention(y, states, None, of_source)
      x = x + self.drop(y, deterministic=not train)
    y = self.norm_2(x).astype(x.dtype)
    y = self.feed_forward(y, train=train, mask=mask, ids=ids)
    return x + self.drop(y, deterministic=not train), cache


class _Unit(nn.Module):
  """Blocks that are recomputed, or repeated, together.

  Attributes:
    make: (what makes its feed-forward layer, name) -> a block.
    layers: what makes that layer of each block.
  """

  make: Callable[..., Block]
  layers: tuple[Callable[[], nn.Module], ...]

  @nn.compact
  def __call__(self, x, caches, *rest):
    after = []
    for i, layer in enumerate(self.layers):
      cache = None if caches is None else caches[i]
      x, cache = self.make(layer, name=f"block_{i}")(x, cache, *rest)
      after.append(cache)
    return x, None if caches is None else tuple(after)


class Blocks(nn.Module):
  """Blocks of one width, and a norm after the last.

  Attributes:
    num_layers: blocks in all.
    attention: makes that of a block, as for `Block`.
    pattern: each makes a feed-forward layer, a module called as MoE is, for a
      block; those of the blocks that follow repeat.
    first: the same, of the first blocks, which do not repeat.
    norm: "rms" (1910.07467), "layer", or "plain_layer", see `NORMS`.
    epsilon: of the norms.
    position: "rotary" (2104.09864); or "relative", T5's (1910.10683), one table
      for all layers.
    causal: whether tokens attend to none that comes later.
    reads_source: whether blocks attend to a source too, whatever its places.
    scan: whether blocks that repeat are one program, run in turn. Their
      parameters lie together, with the axis "layers" in front.
    recompute: whether the backward pass runs a block again in place of keeping
      what is in it; of blocks that repeat, as many as repeat together.
    dropout: chance of zeroing an output; the rng stream is "dropout".
  """

  num_layers: Size
  attention: Callable[[], nn.Module]
  pattern: tuple[Callable[[], nn.Module], ...]
  first: tuple[Callable[[], nn.Module], ...] = ()
  norm: Annotated[str, Names(NORMS)] = "rms"
  epsilon: float = 1e-6
  position: Annotated[str, Names(POSITIONS)] = "rotary"
  causal: bool = True
  reads_source: bool = False
  scan: bool = False
  recompute: bool = False
  dropout: Dropout = 0.0

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B L D"],
    caches: tuple[tuple[Cache, ...], ...] | None,
    *,
    position: Int[Array, "B L"],
    key_position: Int[Array, "B S"],
    seen: Bool[Array, "B L S"],
    mask: Bool[Array, "B L"] | None,
    ids: Int[Array, "B L"],
    train: bool,
    filled: Int[Array, ""] | int = 0,
    source: tuple[Float[Array, "B M D"], Bool[Array, "B L M"]] | None = None,
  ) -> tuple[Float[Array, "B L D"], tuple[tuple[Cache, ...], ...] | None]:
    """Runs the blocks, each with its cache if there are any.

    Args:
      x: what the first block reads.
      caches: of the blocks of each unit of `units`; None attends within x.
      position: of each token in its sentence.
      key_position: the same of those that are attended to.
      seen: which those are; if causal, of those that do not come later.
      mask: real tokens; None are all.
      ids: of the tokens, for routers that read them.
      train: whether to drop out and draw noise.
      filled: tokens that the caches hold before this call.
      source: states to attend to too, and which of them each token sees.

    Raises:
      ValueError: an unknown norm or kind of position, or sizes of heads that do
        not divide.
    """
    bias = None
    if config_fields.one_of(self.position, POSITIONS, "position") == "relative":
      shape = (_BUCKETS, self.attention().num_heads)
      init = nn.initializers.normal(1.0)
      table = declare(self, "distances", (None, None), shape, init)
      bucket = _bucket(
        position[:, :, None] - key_position[:, None], self.causal
      )
      bias = jnp.take(table, bucket, axis=0).transpose(0, 3, 1, 2)
    filled = jnp.asarray(filled, jnp.int32)
    places = Places(position, seen[:, None], bias, filled)
    if source is not None:
      states, own = source
      source = states, Places(None, own[:, None])
    # The last argument, `train`, decides what is compiled.
    unit = nn.remat(_Unit, static_argnums=(7,)) if self.recompute else _Unit
    after = []
    for i, (name, layers, repeats) in enumerate(self.units):
      module = unit
      if repeats > 1:
        module = nn.scan(
          unit,
          variable_axes={"params": 0, ROUTING: 0},
          split_rngs={"params": True, "router": True, "dropout": True},
          # Rows are the first axis of caches, as of all that searches sort.
          in_axes=(1, *(nn.broadcast,) * 5),
          out_axes=1,
          length=repeats,
          metadata_params={nn.PARTITION_NAME: "layers"},
        )
      x, own = module(self._block, layers, name=name)(
        x,
        None if caches is None else caches[i],
        places,
        source,
        mask,
        ids,
        train,
      )
      after.append(own)
    x = make_norm(self.norm, self.epsilon, "norm_out")(x).astype(x.dtype)
    return x, None if caches is None else tuple(after)

  @property
  def units(self) -> list[tuple[str, tuple[Callable, ...], int]]:
    """Blocks that run together: name, their feed-forward layers, how often."""
    first = self.first[: self.num_layers]
    repeats, rest = divmod(self.num_layers - len(first), len(self.pattern))
    last = self.pattern[:rest]
    if not self.scan or repeats < 2:
      first, last, repeats = (*first, *self.pattern * repeats, *last), (), 0
    singles = [
      (f"layers_{i}", (layer,), 1) for i, layer in enumerate((*first, *last))
    ]
    together = [("layers", self.pattern, repeats)] if repeats else []
    return [*singles[: len(first)], *together, *singles[len(first) :]]

  @property
  def places(self) -> list[tuple[tuple[str, str], int | None]]:
    """Where the parameters of each block lie: path, and index in a stack."""
    return [
      ((name, f"block_{i}"), time if repeats > 1 else None)
      for name, layers, repeats in self.units
      for time in range(repeats)
      for i in range(len(layers))
    ]

  def over_rows(
    self,
    x: Float[Array, "B L D"],
    start: Bool[Array, "B L"],
    segment: Int[Array, "B L"],
    **options: Any,
  ) -> Float[Array, "B L D"]:
    """Runs over whole rows, each segment by itself; see `__call__`."""
    place = jnp.broadcast_to(jnp.arange(start.shape[1])[None], start.shape)
    position = place - jax.lax.cummax(jnp.where(start, place, 0), axis=1)
    seen = segment[:, :, None] == segment[:, None]
    if self.causal:
      seen &= place[:, :, None] >= place[:, None]
    where = {"position": position, "key_position": position, "seen": seen}
    h, _ = self(x, None, **where, **options)
    return h

  @nn.nowrap
  def begin(self, rows: int, length: int, width: int, dtype: DType) -> State:
    """Returns the state before the first of `length` tokens of every row."""
    of_token = self.attention().of_token(width)

    def cache(repeats):
      stacked = (repeats,) if repeats > 1 else ()
      shape = rows, *stacked, length
      # Two arrays, each of which may be donated.
      return Cache(*(jnp.zeros((*shape, *each), dtype) for each in of_token))

    caches = tuple(
      tuple(cache(repeats) for _ in layers) for _, layers, repeats in self.units
    )
    return State(jnp.zeros((rows,), jnp.int32), caches)

  def read(
    self,
    state: State,
    x: Float[Array, "B L D"],
    ids: Int[Array, "B L"],
    source: tuple[Array, Array] | None = None,
  ) -> tuple[State, Float[Array, "B L D"]]:
    """Runs over the next tokens of all rows, in evaluation.

    Raises:
      ValueError: `begin` made room for fewer tokens. Within jit, only these
        tokens are counted, not those that were read before.
    """
    rows, count = ids.shape
    length = state.caches[0][0].keys.shape[-3]
    known = not isinstance(state.filled, jax.core.Tracer)
    needed = count + (int(state.filled[0]) if known else 0)
    if needed > length:
      raise ValueError(
        f"the cache has room for {length} tokens, and {needed} are to be read;"
        f" begin with a length of {needed} or more."
      )
    position = state.filled[:, None] + jnp.arange(count)[None]
    keys = jnp.broadcast_to(jnp.arange(length)[None], (rows, length))
    h, caches = self(
      x,
      state.caches,
      position=position,
      key_position=keys,
      seen=position[:, :, None] >= keys[:, None],
      filled=state.filled[0],
      mask=None,
      ids=ids,
      train=False,
      source=source,
    )
    return State(state.filled + count, caches), h

  @nn.nowrap
  def for_decoding(self) -> "Blocks":
    """Returns the same blocks with mixtures of `stack.for_decoding`."""
    for make in (*self.first, *self.pattern):
      for_decoding(make())  # Refuses now what could not be made later.

    def all_of(makers):
      return tuple(lambda make=make: for_decoding(make()) for make in makers)

    return self.clone(pattern=all_of(self.pattern), first=all_of(self.first))

  @nn.nowrap
  def _block(self, layer: Callable[[], nn.Module], name: str) -> Block:
    fields = self.reads_source, self.norm, self.epsilon, self.dropout
    return Block(self.attention, layer, *fields, name=name)


def unscanned(
  model: nn.Module,
) -> tuple[nn.Module, list[tuple[tuple[str, ...], int | None]], list]:
  """Returns the same model with blocks that run one by one, and keep all.

  Beside it is where the parameters of each block lie in the model, and where
  they lie in the one returned; both are empty where it has no blocks.
  """
  fields, there, here = {}, [], []
  for field in dataclasses.fields(model):
    if isinstance(blocks := getattr(model, field.name), Blocks):
      alone = blocks.clone(scan=False, recompute=False)
      fields[field.name] = alone
      for each, places in ((blocks, there), (alone, here)):
        places += [((field.name, *path), at) for path, at in each.places]
  return model.clone(**fields), there, here


def apart(
  arrays: Mapping[tuple[str, ...], Any],
  there: list[tuple[tuple[str, ...], int | None]],
  here: list[tuple[tuple[str, ...], int | None]],
) -> dict[tuple[str, ...], Any]:
  """Takes stacks of blocks apart: parameters of the model of `unscanned`.

  Args:
    arrays: of the model itself, by paths.
    there: where its blocks lie, from `unscanned`.
    here: where they lie in that model.
  """
  found = {}
  for path, array in arrays.items():
    places = [
      ((*own, *path[len(stack) :]), at)
      for (stack, at), (own, _) in zip(there, here, strict=True)
      if path[: len(stack)] == stack
    ]
    for own, at in places or [(path, None)]:
      found[own] = array if at is None else array[at]
  return found


def _bucket(distance: Int[Array, "..."], causal: bool) -> Int[Array, "..."]:
  """Returns T5's bucket of how far back a token is.

  What is ahead is at 0 or, where that may be seen, has half of the buckets.
  """
  count, ahead = _BUCKETS, 0
  if not causal:
    count //= 2
    ahead = jnp.where(distance < 0, count, 0)
    distance = jnp.abs(distance)
  exact = count // 2
  distance = jnp.maximum(distance, 0)
  ratio = jnp.maximum(distance, exact).astype(jnp.float32) / exact
  steps = jnp.log(ratio) / jnp.log(_FURTHEST / exact) * (count - exact)
  far = jnp.minimum(exact + steps.astype(jnp.int32), count - 1)
  return ahead + jnp.where(distance < exact, distance, far)


class _Model(Predictor):
  """What both models share: a table of words, and its dropout."""

  def _look_up(self, embed, ids, train):
    """Looks words up in `embed` or, if tied, in the table of the softmax."""
    x = look_up(self.head.table, ids) if self.tied else embed(ids)
    return self.drop(x.astype(self.dtype), deterministic=not train)


class Transformer(_Model):
  """Embedding, a stack of blocks, softmax over the next word.

  Attributes:
    vocab_size: V.
    width: D of the embedding and of every block.
    blocks: attention and feed-forward layers.
    tied: whether the softmax reads the embedding's table.
    num_samples: classes of the sampled softmax; 0 is the full one.
    dtype: of the activations and of the operands of matrix products. Whatever
      it is, parameters, norms, routers and every softmax are float32.
    vocab_multiple: see `LSTMLM.vocab_multiple`.
  """

  vocab_size: int
  width: Size
  blocks: Blocks
  tied: bool = False
  num_samples: Annotated[int, Range(0)] = 0
  dtype: DType = "float32"
  vocab_multiple: Size = 1

  def setup(self) -> None:
    size = self.vocab_size, self.width
    self.head = Softmax(*size, self.num_samples, self.vocab_multiple)
    self.embed = None if self.tied else Embed(*size, self.vocab_multiple)
    self.drop = nn.Dropout(self.blocks.dropout)

  def __call__(
    self, batch: Batch, *, train: bool = False
  ) -> Float[Array, "B L D"]:
    """Returns the state h from which `head` reads the next word."""
    ids, start, mask = (batch[name] for name in ("inputs", "start", "mask"))
    x, segment = self._look_up(self.embed, ids, train), start.cumsum(axis=1)
    options = {"mask": mask, "ids": ids, "train": train}
    return self.blocks.over_rows(x, start, segment, **options)

  @nn.nowrap
  def for_decoding(self) -> "Transformer":
    """Returns the same model with mixtures of `stack.for_decoding`."""
    return self.clone(blocks=self.blocks.for_decoding())

  @nn.nowrap
  def begin(self, rows: int, length: int) -> State:
    """Returns the state before the first of at most `length` tokens."""
    return self.blocks.begin(rows, length, self.width, self.dtype)

  def read(
    self, state: State, ids: Int[Array, "B L"]
  ) -> tuple[State, Float[Array, "B L V"]]:
    """Reads on; returns the next state, and log p of each token's next word.

    Mixtures drop what their capacity does not hold: see `for_decoding`. Errors
    as of `Blocks.read`.
    """
    x = self._look_up(self.embed, ids, False)
    state, h = self.blocks.read(state, x, ids)
    return state, self.head.log_p(h)


class PairTransformer(_Model):
  """Encoder, and decoder that attends to it (1706.03762), of packed pairs.

  Attributes:
    vocab_size: V, of source and target.
    width: D of embeddings and blocks.
    encoder: blocks that are not causal.
    decoder: blocks that read a source.
    tied: whether source, target and softmax share a table.
    scaled: whether what the softmax reads is divided by the root of D, as by
      T5 (1910.10683) where the table is tied.
    dtype, vocab_multiple: as of `Transformer`.
  """

  vocab_size: int
  width: Size
  encoder: Blocks
  decoder: Blocks
  tied: bool = False
  scaled: bool = False
  dtype: DType = "float32"
  vocab_multiple: Size = 1

  def setup(self) -> None:
    size = self.vocab_size, self.width
    # In full always, see GNMT.
    self.head = Softmax(*size, multiple=self.vocab_multiple)
    self.embed = {
      side: None if self.tied else Embed(*size, self.vocab_multiple)
      for side in ("source", "target")
    }
    self.drop = nn.Dropout(self.decoder.dropout)

  def __call__(
    self, batch: Batch, *, train: bool = False
  ) -> Float[Array, "B L D"]:
    """Returns the state h from which `head` reads the next piece."""
    source = (batch[f"source{name}"] for name in ("", "_segment", "_start"))
    states, segment = self.encode(*source, train=train)
    own = batch["segment"][:, :, None] == segment[:, None]
    ids = batch["inputs"]
    h = self.decoder.over_rows(
      self._look_up(self.embed["target"], ids, train),
      batch["start"],
      batch["segment"],
      mask=batch["mask"],
      ids=ids,
      train=train,
      source=(states, own),
    )
    return self._scale(h)

  def encode(
    self,
    source: Int[Array, "B M"],
    source_segment: Int[Array, "B M"],
    source_start: Bool[Array, "B M"],
    *,
    train: bool = False,
  ) -> Source:
    """Returns what the decoder reads of the source; arguments as of GNMT."""
    x = self._look_up(self.embed["source"], source, train)
    options = {"mask": source_segment > 0, "ids": source, "train": train}
    states = self.encoder.over_rows(x, source_start, source_segment, **options)
    return Source(states, source_segment)

  @nn.nowrap
  def for_decoding(self) -> "PairTransformer":
    """Returns the same model with mixtures of `stack.for_decoding`."""
    encoder, decoder = self.encoder.for_decoding(), self.decoder.for_decoding()
    return self.clone(encoder=encoder, decoder=decoder)

  @nn.nowrap
  def begin(self, rows: int, length: int) -> State:
    """Returns the decoder's state before the first of `length` pieces."""
    return self.decoder.begin(rows, length, self.width, self.dtype)

  def step(
    self, memory: Source, state: State, ids: Int[Array, "B"]
  ) -> tuple[State, Float[Array, "B V"], Float[Array, "B M"]]:
    """Reads one piece of each row; as GNMT's, for the search of translations.

    Each piece attends to every token of the source in full: attention of many
    heads aligns nothing, and nothing is asked of its coverage.
    """
    x = self._look_up(self.embed["target"], ids[:, None], False)
    own = memory.segment == 1
    source = memory.states, own[:, None]
    state, h = self.decoder.read(state, x, ids[:, None], source)
    log_p = self.head.log_p(self._scale(h))
    return state, log_p[:, 0], own.astype(jnp.float32)

  def _scale(self, h: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    return h * self.width**-0.5 if self.scaled else h
