"""Every gating against its paper's loops: values, gradients, padding."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from gatings import (
  CASES,
  KEY,
  E,
  G,
  K,
  S,
  agree,
  case,
  decide,
  dense,
  draw,
  edges,
  noise_of,
  num_edges,
  picks,
)
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moejax import gating, sharding

NAMES = pytest.mark.parametrize("name", gating.GATING)

WITHOUT_K = ("softmax", "switch", "gshard_top_2")
NOT_CAUSAL = ("balanced", "expert_choice")


@pytest.mark.parametrize("masked", [False, True])
@NAMES
def test_matches_the_paper(name, masked):
  for seed in range(8):
    logits, noise_std, mask = draw(seed, masked)
    got = case(name).run(logits, noise_std, mask, K)
    noise = noise_of(got, logits, noise_std)
    agree(got, decide(name, logits, noise, noise_std, mask))
    assert got.assignment.expert.shape[1] == num_edges(name, S, E, K)
    assert (got.mask is None) == (mask is None)
    if masked:
      np.testing.assert_array_equal(got.mask, mask)


@pytest.mark.parametrize(
  "tokens, experts, k", [(1, 5, 2), (7, 5, 1), (4, 5, 5), (3, 1, 1), (1, 1, 1)]
)
@NAMES
def test_matches_the_paper_at_the_edges(name, tokens, experts, k):
  """One token, one expert, k = 1, k = E."""
  if name == "gshard_top_2" and experts < 2:
    with pytest.raises(ValueError, match="needs 2 experts, but there is 1"):
      CASES[name].run(*draw(0, shape=(G, tokens, experts)), k)
    return
  logits, noise_std, mask = draw(1, True, (G, tokens, experts))
  got = case(name).run(logits, noise_std, mask, k)
  noise = noise_of(got, logits, noise_std)
  agree(got, decide(name, logits, noise, noise_std, mask, k))
  assert got.assignment.expert.shape[1] == num_edges(name, tokens, experts, k)


@NAMES
def test_gradient_matches_finite_differences(name):
  logits, noise_std, mask = draw(11, masked=True)
  random = np.random.default_rng(12)
  to_gates, to_importance, to_load = (
    random.normal(size=shape) for shape in [(G, S, E), (G, E), (G, E)]
  )

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def slopes(logits, noise_std):
    got = CASES[name].run(logits, noise_std, mask, K)
    terms = (
      (dense(got.assignment), to_gates),
      (got.importance, to_importance),
      (got.load, to_load),
    )
    return sum((a * jnp.asarray(b, a.dtype)).sum() for a, b in terms)

  drawn = case(name).run(logits, noise_std, mask, K)
  noise = noise_of(drawn, logits, noise_std)

  def reference_score(at):
    decisions = decide(name, at["logits"], noise, at["noise_std"], mask)
    return sum(
      (d.gates * to_gates[g]).sum()
      + (d.importance * to_importance[g]).sum()
      + (d.load * to_load[g]).sum()
      for g, d in enumerate(decisions)
    )

  got = slopes(logits, noise_std)
  want = reference.gradient(
    reference_score, {"logits": logits, "noise_std": noise_std}
  )
  np.testing.assert_allclose(got[0], want["logits"], rtol=2e-3, atol=2e-4)
  np.testing.assert_allclose(got[1], want["noise_std"], rtol=2e-3, atol=2e-4)
  # Hash layers alone learn nothing.
  assert (np.abs(want["logits"]).max() > 0.1) == (name != "hash")
  assert (np.asarray(got)[:, ~np.asarray(mask)] == 0).all()


@pytest.mark.parametrize("k", [-1, 0, E + 1])
@pytest.mark.parametrize(
  "name", [name for name in gating.GATING if name not in WITHOUT_K]
)
def test_k_out_of_range_names_both_numbers(name, k):
  logits, noise_std, _ = draw(0)
  called = "max_k" if name == "threshold" else "k"
  with pytest.raises(ValueError, match=rf"\b{called} = {k}\b.*\b{E} experts"):
    CASES[name].run(logits, noise_std, None, k)


@NAMES
def test_padding_changes_nothing(name):
  """Whatever stands in masked places, the rest decides the same."""
  logits, noise_std, _ = draw(9)
  mask = jnp.asarray([[False, True, False, False, True], [True] * S])
  other = jnp.where(mask[..., None], logits, 50)
  std = jnp.where(mask[..., None], noise_std, 3)
  got = case(name).run(logits, noise_std, mask, K)
  want = case(name).run(other, std, mask, K)
  for field in ("assignment", "importance", "load", "count"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(got, field), getattr(want, field)
    )
  real = np.asarray(mask)
  for g in range(G):
    listed = edges(got.assignment, g)
    assert listed and all(real[g, s] for s, _, _ in listed)
  unused = np.asarray(got.assignment.expert) == E
  assert unused.any()
  assert (np.asarray(got.assignment.gate)[unused] == 0).all()


@NAMES
def test_a_group_of_padding_decides_nothing(name):
  logits, noise_std, _ = draw(9)
  got = case(name).run(logits, noise_std, jnp.zeros((G, S), bool), K)
  for value in (got.importance, got.load, got.count, got.assignment.gate):
    assert (np.asarray(value) == 0).all()
  assert (np.asarray(got.assignment.expert) == E).all()


@NAMES
@hypothesis.given(
  k=st.sampled_from([1, 3, E]),
  logits=arrays("float32", (G, S, E), elements=st.floats(-1e4, 1e4, width=32)),
  mask=arrays(bool, (G, S)),
)
def test_properties(name, k, logits, mask):
  noise_std = jnp.ones((G, S, E))
  got = case(name).run(jnp.asarray(logits), noise_std, jnp.asarray(mask), k)
  sums = np.asarray(dense(got.assignment)).sum(-1)
  gate = np.asarray(got.assignment.gate)
  assert (gate >= 0).all()
  choices = case(name).choices and case(name).choices(E, k)
  for g in range(G):
    listed = edges(got.assignment, g)
    pairs = [edge[:2] for edge in listed]
    assert len(set(pairs)) == len(pairs)
    by_token = np.bincount([s for s, _ in pairs], minlength=S)
    by_expert = np.bincount([e for _, e in pairs], minlength=E)
    assert (by_token[~mask[g]] == 0).all()
    np.testing.assert_array_equal(got.count[g], by_expert)
    np.testing.assert_allclose(
      got.importance[g],
      [sum(w for _, e, w in listed if e == i) for i in range(E)],
      atol=1e-4,
    )
    if choices is not None:
      assert (by_token[mask[g]] == choices).all()
    elif name == "threshold":
      assert (by_token <= k).all()
    else:
      real = mask[g].sum()
      assert (by_expert == min(real, picks(real, E, k))).all()
    want = {"one": mask[g], "one or none": by_token > 0, "at most one": 1}
    if case(name).gates == "at most one":
      assert (sums[g] <= 1 + 1e-5).all()
    else:
      np.testing.assert_allclose(sums[g], want[case(name).gates], atol=1e-5)
  load = np.asarray(got.load)
  assert (load >= 0).all() and (load <= mask.sum(-1)[:, None] + 1e-4).all()


@NAMES
def test_gradient_is_finite_at_extreme_logits(name):
  random = np.random.default_rng(21)
  logits = random.choice([-1e4, -100.0, 0.0, 100.0, 1e4], (G, S, E))
  _, noise_std, mask = draw(21, masked=True)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(logits):
    got = CASES[name].run(logits, noise_std, mask, K)
    return (dense(got.assignment) ** 2).sum() + got.load.sum(), got

  slopes, got = run(jnp.asarray(logits, jnp.float32))
  assert np.isfinite(np.asarray(slopes)).all()
  assert np.isfinite(np.asarray(got.assignment.gate)).all()


@NAMES
def test_what_is_causal_does_not_see_later_tokens(name):
  logits, noise_std, _ = draw(22)
  later = logits.at[:, -1].add(jnp.asarray([[3.0, -2, 1, -1, 2]]))
  before, after = (
    dense(case(name).run(logits, noise_std, None, K).assignment)[:, :-1]
    for logits in (logits, later)
  )
  assert (np.asarray(before) == after).all() == (name not in NOT_CAUSAL)


@NAMES
def test_docstring_says_what_a_gate_needs_and_teaches(name):
  """Whether it is causal, needs batch statistics, and where gradient flows."""
  text = gating.GATING[name].__doc__.lower()
  for word in ("causal", "statistic", "gradient"):
    assert word in text


@pytest.mark.parametrize("name", [*gating.GATING, "by chance"])
def test_every_device_routes_its_own_groups(name):
  """The same on 8 devices, without sending anything but the score's sum."""
  logits, noise_std, mask = draw(23, True, (8, S, E))

  def fn(logits, noise_std, mask):
    if name == "by chance":
      got = gating.gshard_top_2(logits, KEY, mask)
    else:
      got = CASES[name].run(logits, noise_std, mask, K)
    return (got.assignment.gate**2).sum() + got.load.sum(), got

  fn = jax.value_and_grad(fn, (0, 1), has_aux=True)
  want = jax.jit(fn)(logits, noise_std, mask)
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout)
  place = sharding.batch_sharding(layout, mesh, 8)
  arrays = jax.device_put((logits, noise_std, mask), place)
  with sharding.use(layout, mesh):
    compiled = jax.jit(fn).lower(*arrays).compile()
    got = compiled(*arrays)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, got, want)
  for kind in ("all-gather", "all-to-all", "collective-permute"):
    assert f"{kind}(" not in compiled.as_text()
