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
  bias,
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

from moejax import experts as experts_lib
from moejax import gating, losses, moe, router, sharding

NAMES = pytest.mark.parametrize("name", CASES)
WITHOUT_K = ("softmax", "switch", "gshard_top_2")


def matches(name, seed, masked, shape=(G, S, E), k=K):
  """Whether all that is decided is what the loops decide."""
  logits, noise_std, mask = draw(seed, masked, shape)
  got = case(name).run(logits, noise_std, mask, k)
  noise = noise_of(got, logits, noise_std)
  agree(got, decide(name, logits, noise, noise_std, mask, k))
  assert got.assignment.expert.shape[1] == num_edges(name, *shape[1:], k)
  assert (got.mask is None) == (mask is None)
  if masked:
    np.testing.assert_array_equal(got.mask, mask)


@pytest.mark.parametrize("masked", [False, True])
@NAMES
def test_matches_the_paper(name, masked):
  for seed in range(4):
    matches(name, seed, masked)


@pytest.mark.parametrize(
  "tokens, experts, k", [(1, 5, 2), (4, 5, 5), (3, 1, 1)]
)
@NAMES
def test_matches_the_paper_at_the_edges(name, tokens, experts, k):
  """One token, one expert, k = 1, k = E."""
  if name == "gshard_top_2" and experts < 2:
    with pytest.raises(ValueError, match="needs 2 experts, but there is 1"):
      CASES[name].run(*draw(0, shape=(G, tokens, experts)), k)
  else:
    matches(name, 1, True, (G, tokens, experts), k)


@pytest.mark.parametrize(
  "name, k", [*((name, K) for name in CASES), ("noisy_top_k", E)]
)
def test_gradient_matches_finite_differences(name, k):
  """And it is finite at extreme logits."""
  logits, noise_std, mask = draw(11, masked=True)
  random = np.random.default_rng(12)
  to_gates, to_importance, to_load = (
    random.normal(size=shape) for shape in [(G, S, E), (G, E), (G, E)]
  )

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def slopes(logits, noise_std):
    got = CASES[name].run(logits, noise_std, mask, k)
    terms = (
      (dense(got.assignment), to_gates),
      (got.importance, to_importance),
      (got.load, to_load),
    )
    return sum((a * jnp.asarray(b, a.dtype)).sum() for a, b in terms)

  drawn = case(name).run(logits, noise_std, mask, k)
  noise = noise_of(drawn, logits, noise_std)

  def reference_score(at):
    decisions = decide(name, at["logits"], noise, at["noise_std"], mask, k)
    return sum(
      (d.gates * to_gates[g]).sum()
      + (d.importance * to_importance[g]).sum()
      + (d.load * to_load[g]).sum()
      for g, d in enumerate(decisions)
    )

  got = slopes(logits, noise_std)
  at = {"logits": logits, "noise_std": noise_std}
  want = reference.gradient(reference_score, at)
  for slope, name_of in zip(got, at, strict=True):
    np.testing.assert_allclose(slope, want[name_of], rtol=2e-3, atol=2e-4)
  # Hash layers alone learn nothing.
  assert (np.abs(want["logits"]).max() > 0.1) == (name != "hash")
  assert (np.asarray(got)[:, ~np.asarray(mask)] == 0).all()
  extreme = random.choice([-1e4, -100.0, 0.0, 100.0, 1e4], (G, S, E))
  got = slopes(jnp.asarray(extreme, jnp.float32), noise_std)
  assert np.isfinite(np.asarray(got)).all()


@pytest.mark.parametrize("k", [0, E + 1])
@pytest.mark.parametrize(
  "name", [name for name in CASES if name not in WITHOUT_K]
)
def test_k_out_of_range_names_both_numbers(name, k):
  logits, noise_std, _ = draw(0)
  called = "max_k" if name == "threshold" else "k"
  with pytest.raises(ValueError, match=rf"\b{called} = {k}\b.*\b{E} experts"):
    CASES[name].run(logits, noise_std, None, k)


@NAMES
@hypothesis.given(
  k=st.sampled_from([1, 3]),
  logits=arrays("float32", (G, S, E), elements=st.floats(-1e4, 1e4, width=32)),
  mask=arrays(bool, (G, S)),
)
def test_properties(name, k, logits, mask):
  noise_std = jnp.ones((G, S, E))
  got = case(name).run(jnp.asarray(logits), noise_std, jnp.asarray(mask), k)
  sums = np.asarray(dense(got.assignment)).sum(-1)
  assert (np.asarray(got.assignment.gate) >= 0).all()
  choices = case(name).choices and case(name).choices(E, k)
  if case(name).together:
    m = min(mask.sum(), picks(mask.sum(), E, k))
    assert (np.asarray(got.count).sum(0) == m).all()
  for g in range(G):
    listed = edges(got.assignment, g)
    by_token = np.bincount([s for s, _, _ in listed], minlength=S)
    by_expert = np.bincount([e for _, e, _ in listed], minlength=E)
    if choices is not None:
      assert (by_token[mask[g]] == choices).all()
    elif name == "threshold":
      assert (by_token <= k).all()
    elif not case(name).together:
      real = mask[g].sum()
      assert (by_expert == min(real, picks(real, E, k))).all()
    if case(name).gates == "at most one":
      assert (sums[g] <= 1 + 1e-5).all()
    else:
      want = {"one": mask[g], "one or none": by_token > 0}
      np.testing.assert_allclose(sums[g], want[case(name).gates], atol=1e-5)
  load = np.asarray(got.load)
  assert (load >= 0).all() and (load <= mask.sum(-1)[:, None] + 1e-4).all()


def test_every_device_routes_its_own_groups():
  """The same on 8 devices, without sending anything but the score's sum."""
  args = draw(23, True, (8, S, E))
  by_chance = lambda logits, std, mask, k: (  # noqa: E731
    gating.gshard_top_2(logits, KEY, mask)
  )
  in_groups = [
    lambda logits, std, mask, k, run=run: run(logits.repeat(2, axis=-1), mask)
    for run, _ in limited("1 of 2 groups", 2 * E).values()
  ]
  gates = [*(each.run for each in CASES.values()), by_chance, *in_groups]

  def fn(logits, noise_std, mask):
    found = [gate(logits, noise_std, mask, K) for gate in gates]
    score = sum((r.assignment.gate**2).sum() + r.load.sum() for r in found)
    return score, found

  fn = jax.value_and_grad(fn, (0, 1), has_aux=True)
  want = jax.jit(fn)(*args)
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout)
  args = jax.device_put(args, sharding.batch_sharding(layout, mesh, 8))
  with sharding.use(layout, mesh):
    compiled = jax.jit(fn).lower(*args).compile()
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, compiled(*args), want)
  for kind in ("all-gather", "all-to-all", "collective-permute"):
    assert f"{kind}(" not in compiled.as_text()


# -- what sets each kind apart -------------------------------------------------


def test_one_threshold_and_one_bias_for_each_expert():
  logits, _, _ = draw(0)
  with pytest.raises(ValueError, match=rf"thresholds has 3 .*\b{E} experts"):
    gating.threshold(logits, jnp.ones(3), K)
  with pytest.raises(ValueError, match=rf"bias has 3 .*\b{E} experts"):
    gating.sigmoid(logits, jnp.ones(3), K)


@pytest.mark.parametrize("k", [1, K, E])
@pytest.mark.parametrize(
  "name", [name for name in CASES if "noisy" not in name]
)
def test_ties_go_to_the_lowest_experts_and_the_first_tokens(name, k):
  """Many rows are equal, in many groups, and so are three logits of each.

  Where experts choose exactly m survive, however many are equal.
  """
  random = np.random.default_rng(k)
  kinds = random.normal(size=(3, E)).astype("float32")
  kinds[:, 3:] = kinds[:, 1:2]
  logits = kinds[random.integers(0, 3, (G, S))]
  mask = jnp.asarray(random.random((G, S)) < 0.8)
  got = case(name).run(jnp.asarray(logits), jnp.ones_like(logits), mask, k)
  agree(got, decide(name, logits, 0 * logits, 0 * logits, mask, k))


@pytest.mark.parametrize("factor, room", [(1.0, 48), (3.5, 56)])
def test_what_one_group_has_no_room_for_is_counted(factor, room):
  """Of 16 tokens in the mean an expert takes 48 of a group, not all 64."""
  groups, tokens, experts = 4, 64, 4
  logits = jax.random.normal(KEY, (groups, tokens, experts))
  # The first expert wants those of the first group, and the rest are others'.
  logits = logits.at[0, :, 0].add(20).at[1:, :, 0].add(-20)
  layer = moe.MoE(
    router.Balanced(experts, 1, over="batch", group_factor=factor),
    experts_lib.Identity(experts),
    group_size=tokens,
    capacity_factor=None,
  )
  params = {"gate": {"kernel": jnp.eye(experts)}}
  params["log_thresholds"] = jnp.zeros(experts)
  run = functools.partial(layer.apply, train=True, mutable=["routing"])
  _, sown = jax.jit(run)({"params": {"router": params}}, logits)
  (got,) = losses.routings(sown)
  np.testing.assert_array_equal(got.count.sum(axis=0), [64] * experts)
  np.testing.assert_array_equal(got.count[:, 0], [64, 0, 0, 0])
  np.testing.assert_array_equal(got.dropped[:, 0], [64 - room, 0, 0, 0])
  assert got.dropped.sum() == 64 - room
  # The largest of the group are left, and weigh what no drop would change.
  listed = [s for s, e, _ in edges(got.assignment, 0, 64, 4) if e == 0]
  x = np.asarray(jax.nn.softmax(logits))[0, :, 0]
  np.testing.assert_array_equal(listed, np.argsort(-x, kind="stable")[:room])


@pytest.mark.parametrize("start, step", [(0, 1), (1000, 1), (0, 16), (-9, 3)])
@pytest.mark.parametrize("experts", [6, 16])
def test_hash_spreads_ids_evenly(experts, start, step):
  """As evenly as chance would, be they consecutive or multiples of E."""
  words = start + step * jnp.arange(4096, dtype=jnp.int32)
  run = jax.jit(gating.hash_ids, static_argnums=(1, 2))
  expert = run(words[None], experts, 2).assignment.expert.reshape(2, -1)
  first, second = np.asarray(expert)
  pairs = np.zeros((experts, experts))
  np.add.at(pairs, (first, second), 1)
  assert (np.diag(pairs) == 0).all()
  off_diagonal = pairs[~np.eye(experts, dtype=bool)]
  for counts in (pairs.sum(0), pairs.sum(1), off_diagonal):
    free, mean = counts.size - 1, counts.mean()
    chi_squared = ((counts - mean) ** 2).sum() / mean
    assert chi_squared < free + 4.5 * np.sqrt(2 * free)


def test_bias_steers_the_choice_and_not_the_gate():
  logits, _, _ = draw(28)
  favour = jnp.asarray([0.0, 0, 0, 2, 1])

  @functools.partial(jax.grad, has_aux=True)
  def run(bias):
    got = gating.sigmoid(logits, bias, K)
    return (got.assignment.gate**2).sum() + got.importance[:, 3].sum(), got

  slopes, got = jax.jit(run)(favour)
  np.testing.assert_array_equal(got.assignment.expert, [[3] * S + [4] * S] * G)
  scores = np.asarray(jax.nn.sigmoid(logits))[..., 3:].swapaxes(1, 2)
  np.testing.assert_allclose(
    got.assignment.gate.reshape(G, K, S),
    scores / scores.sum(1, keepdims=True),
    rtol=1e-5,
  )
  assert (np.asarray(slopes) == 0).all()
  np.testing.assert_array_equal(got.bias, favour)


# Fields of gates that keep a token to few groups of 8 experts.
LIMITED = {
  "4 of 8 groups": ((4, 8, 4), {"scale": 16.0}),
  "2 of 4 groups": ((3, 4, 2), {"normalized": True, "scale": 2.5}),
  "1 of 2 groups": ((4, 2, 1), {}),
}


def limited(case, num_experts=8):
  """Returns name -> (logits, mask) -> Routing, and of one group the loops."""
  (k, number, most), fields = LIMITED[case]
  groups, scale = (number, most), fields.get("scale", 1.0)
  normalized = fields.get("normalized", False)
  steer = bias(num_experts)
  return {
    "softmax_top_k": (
      lambda logits, mask: gating.softmax_top_k(
        logits, k, mask, normalized, *groups, scale
      ),
      lambda logits, mask: reference.softmax_top_k(
        logits, k, mask, normalized, groups, scale
      ),
    ),
    "sigmoid": (
      lambda logits, mask: gating.sigmoid(
        logits, jnp.asarray(steer), k, mask, *groups, scale
      ),
      lambda logits, mask: reference.sigmoid(
        logits, steer, k, mask, groups, scale
      ),
    ),
  }


@pytest.mark.parametrize("name", ["softmax_top_k", "sigmoid"])
@pytest.mark.parametrize("case", LIMITED)
def test_a_token_keeps_to_its_best_groups(case, name):
  """The value and the gradient of the loops; of equal ones the first."""
  run, loops = limited(case)[name]
  logits, _, mask = draw(31, True, (G, 12, 8))
  to_gates = np.random.default_rng(32).normal(size=logits.shape)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def score(logits):
    got = run(logits, mask)
    gates = dense(got.assignment, *logits.shape[1:])
    return (gates * jnp.asarray(to_gates, gates.dtype)).sum(), got

  def decided(logits):
    return [loops(*each) for each in zip(logits, mask, strict=True)]

  def reference_score(at):
    found = zip(decided(at["logits"]), to_gates, strict=True)
    return sum((each.gates * to).sum() for each, to in found)

  (_, got), slopes = score(logits)
  agree(got, decided(np.float64(logits)))
  want = reference.gradient(reference_score, {"logits": logits})["logits"]
  np.testing.assert_allclose(slopes, want, rtol=2e-3, atol=2e-3)
  (k, number, most), _ = LIMITED[case]
  group = np.asarray(got.assignment.expert).reshape(G, k, 12) // (8 // number)
  visited = [len({*token}) for token in np.moveaxis(group, 1, 2)[mask]]
  assert max(visited) == most
  if name == "softmax_top_k":
    tied = jnp.abs(jnp.round(logits))  # Without -0.
    (_, got), _ = score(tied)
    agree(got, decided(np.float64(tied)))


@pytest.mark.parametrize(
  "fields, said",
  [
    ((2, 3, 1), "3 groups do not divide 8 experts; .* num_groups"),
    ((2, 0, 1), "0 groups do not divide 8 experts"),
    ((2, 4, 5), "at most 5 groups .* there are 4; .* between 1 and 4"),
    ((2, 4, 0), "at most 0 groups .* there are 4"),
    ((3, 4, 1), "k = 3 experts .* 1 of 4 groups have 2 of the 8 experts"),
    ((9, 2, 1), "k = 9 experts per token, but there are 8 experts"),
    ((2, 2, 1, 0.0), "scale is 0.0, but gates are above 0"),
  ],
)
def test_groups_that_do_not_fit(fields, said):
  k, *limit = fields
  logits = jnp.zeros((1, 1, 8))
  for run in (
    lambda: gating.softmax_top_k(logits, k, None, False, *limit),
    lambda: gating.sigmoid(logits, jnp.zeros(8), k, None, *limit),
  ):
    with pytest.raises(ValueError, match=said):
      run()


# -- noise and chance ----------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_is_the_expected_count(k):
  """Mean load over noise = frequency of choice, by noise of our own too."""
  draws, tokens = 20000, 2
  random = np.random.default_rng(k)
  logits = random.normal(size=(tokens, E)).astype("float32")
  noise_std = random.uniform(0.3, 1.2, (tokens, E)).astype("float32")

  # One token per group: the load of a group is P(x, i) of one token.
  def per_group(a):
    return jnp.asarray(np.repeat(a[None], draws, 0).reshape(-1, 1, E))

  run = jax.jit(gating.noisy_top_k, static_argnames="k")
  got = run(per_group(logits), per_group(noise_std), k=k, rng=KEY)
  load = np.asarray(got.load, np.float64).reshape(draws, tokens, E)
  count = np.asarray(got.count, np.float64).reshape(draws, tokens, E)
  ours = logits + noise_std * random.normal(size=(draws, tokens, E))
  rank = np.argsort(np.argsort(-ours, axis=-1), axis=-1)
  often = load.mean(0)
  error = np.sqrt((load.var(0) + often * (1 - often)) / draws)
  for other in (count, rank < k):
    assert (np.abs(often - other.mean(0)) < 4.5 * error).all()
  total = load.sum(-1)
  error = total.std(0) / np.sqrt(draws)
  assert (np.abs(total.mean(0) - k) < 4.5 * error).all()
  # An estimate, not a count: one draw's sum is not k.
  assert (total.std(0) > 0.05).all()
  noise = noise_of(got, per_group(logits), per_group(noise_std))
  assert abs(noise.mean()) < 4.5 / np.sqrt(noise.size)
  assert abs(noise.var() - 1) < 4.5 * np.sqrt(2 / noise.size)


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1))
def load_slopes(logits, noise_std):
  """The gradient of some sum of loads."""
  got = CASES["noisy_top_k"].run(logits, noise_std, None, K)
  return (got.load * jnp.arange(E, dtype=jnp.float32)[None]).sum()


def test_without_noise_load_is_the_count():
  logits, noise_std, mask = draw(5, masked=True)
  quiet = jnp.zeros_like(noise_std)
  got = case("noisy_top_k").run(logits, quiet, mask, K)
  want = case("top_k").run(logits, quiet, mask, K)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert (np.asarray(load_slopes(logits, quiet)) == 0).all()


@pytest.mark.parametrize("noise_std", [1e-6, 1e-12, 1e-20, 1e-30, 1e-38])
def test_gradient_is_finite_however_small_the_noise(noise_std):
  """Softplus(-45) is 3e-20: what noise_epsilon = 0 allows.

  Its square underflows: 0 * inf in the gradient of the quotient.
  """
  logits, _, _ = draw(6)
  slopes = load_slopes(logits, jnp.full_like(logits, noise_std))
  assert np.isfinite(np.asarray(slopes)).all()


def drawn(sample, groups, shape):
  """What each group draws: by its own index, wherever it lies."""
  keys = [jax.random.fold_in(KEY, group) for group in range(groups)]
  return np.stack([sample(key, shape) for key in keys])


@pytest.mark.parametrize("k", [K, E])
def test_noise_depends_on_the_group_alone(k):
  """It is drawn where all experts are chosen too (MoE-4)."""
  logits, noise_std = jnp.zeros((6, S, E)), jnp.ones((6, S, E))
  six = case("noisy_top_k").run(logits, noise_std, None, k).logits
  np.testing.assert_allclose(
    six, drawn(jax.random.normal, 6, (S, E)), rtol=1e-5
  )
  # And no two numbers of it are the same.
  assert len(np.unique(six)) == six.size
  other = gating.noisy_top_k(logits, noise_std, k, jax.random.key(8)).logits
  assert not np.isin(np.asarray(other), np.asarray(six)).any()


def test_second_choices_are_left_out_by_chance():
  """As often as min(1, 2 g2) says; tokens do not share their luck."""
  draws = 20000
  token = np.log([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0001], [0.98, 0.01, 0.01]])
  logits = jnp.tile(jnp.asarray(token, jnp.float32), (draws, 1, 1))
  got = jax.jit(gating.gshard_top_2)(logits, KEY)
  used = np.asarray(got.assignment.expert) < 3
  often = np.minimum(1, 2 * np.array([0.2 / 0.9, 0.5, 0.01 / 0.99]))
  error = np.sqrt(often * (1 - often) / draws)
  seen = used[:, 3:].mean(0)
  assert (np.abs(seen - often) <= 4.5 * error).all()
  both = (used[:, 3] & used[:, 5]).mean()
  assert abs(both - often[0] * often[2]) < 4.5 * np.sqrt(often[2] / draws)


def test_chance_matches_the_paper_and_depends_on_the_group_alone():
  logits, _, mask = draw(27, True, (6, S, E))
  run = jax.jit(gating.gshard_top_2)
  got, draws = run(logits, KEY, mask), drawn(jax.random.uniform, 6, (S,))
  want = [
    reference.gshard_top_2(np.float64(logits[g]), draws[g], mask[g])
    for g in range(6)
  ]
  agree(got, want)
  other = run(logits, jax.random.key(8), mask)
  assert (np.asarray(other.count) != np.asarray(got.count)).any()
  # Some are used and some are not, or this shows nothing.
  real, second = np.asarray(mask), np.asarray(got.assignment.expert)[:, S:]
  assert 0 < (second[real] < E).sum() < real.sum()
