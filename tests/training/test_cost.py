"""Counts by hand, and the paper's figures."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_shapes import VOCABULARY, experiment, load

from experiments import paper_counts
from moejax import config as config_lib
from moejax import experts, moe, router
from moejax.models import layers
from moejax.training import cost

# name -> parameters, ops/timestep, by hand from sec. 5.1, app. C and D.
EXACT = {
  "lm1b/lstm_512_512": (2_359_296, 2_359_296),
  "lm1b/lstm_1024_512": (4_718_592, 4_718_592),
  "lm1b/lstm_2048_512": (9_437_184, 9_437_184),
  "lm1b/four_lstm_512": (8_388_608, 8_388_608),
  "lm1b/two_lstm_8192_1024": (150_994_944, 150_994_944),
  "lm1b/moe_1_wide": (8_388_608, 8_388_608),
  "lm1b/moe_1_deep": (8_388_608, 8_388_608),
  "lm1b/moe_4": (8_392_704, 8_392_704),
  "lm1b/moe_32": (37_781_504, 8_421_376),
  "lm1b/moe_256": (272_891_904, 8_650_752),
  "lm1b/moe_256_h": (272_908_288, 8_437_760),
  "lm1b/moe_1024_h": (1_079_001_088, 8_536_064),
  "lm1b/moe_4096_h": (4_303_372_288, 8_929_280),
  "lm1b/moe_34m": (4_313_907_200, 33_751_040),
  "lm1b/moe_143m": (4_371_054_592, 142_704_640),
  # 131,072 experts of 512 x 512, 4 a token; LSTMs and gates as below.
  "lm1b/draft_131072_linear": (34_498_412_544, 6_553_600),
  "news/four_lstm_512": (8_388_608, 8_388_608),
  "news/moe_32": (37_781_504, 8_421_376),
  "news/moe_256_h": (272_924_672, 8_437_760),
  "news/moe_1024_h": (1_079_017_472, 8_486_912),
  "news/moe_4096_h": (4_303_421_440, 8_585_216),
  "news/moe_16384_h": (17_200_971_776, 8_781_824),
  "news/moe_65536_h": (68_791_042_048, 9_175_040),
  "news/moe_131072_h": (137_577_627_648, 9_699_328),
}
# By hand from sec. 5.3 and app. E. LSTMs, of which one reads a context too, U
# and W of attention, 8 experts and the gates a token meets.
LSTMS_OF_TRANSLATION = 4 * 9_437_184 + 13_631_488 + 2 * 512 * 512
TRANSLATION = {
  "lstm": (0, 0),
  "moe_32": (2 * 32 * 2_097_152 + 2 * 16_384, 8 * 2_097_152 + 2 * 16_384),
  "moe_512_h": (
    2 * 512 * 2_097_152 + 2 * 512 * (16 + 512),
    8 * 2_097_152 + 2 * 512 * (16 + 2 * 32),
  ),
  "moe_2048_h": (
    2 * 2048 * 2_097_152 + 2 * 512 * (32 + 2048),
    8 * 2_097_152 + 2 * 512 * (32 + 2 * 64),
  ),
}
# Two LSTMs at the bottom of the encoder, one that reads both, six more; eight
# that read a context too; U and W.
GNMT = 2 * 8_388_608 + 12_582_912 + 6 * 8_388_608 + 8 * 12_582_912
GNMT_CONFIGS = ["wmt14/en_fr_gnmt", "wmt14/en_de_gnmt", "multilingual/gnmt"]
EXACT_TRANSLATION = {
  f"wmt14/{pair}_{name}": tuple(LSTMS_OF_TRANSLATION + n for n in counts)
  for pair in ("en_fr", "en_de")
  for name, counts in TRANSLATION.items()
} | {
  "multilingual/moe_512": (
    LSTMS_OF_TRANSLATION + 2 * 512 * 8_388_608 + 2 * 2 * 512 * 512,
    LSTMS_OF_TRANSLATION + 4 * 8_388_608 + 2 * 2 * 512 * 512,
  ),
  **dict.fromkeys(GNMT_CONFIGS, (GNMT + 2 * 1024 * 1024,) * 2),
}


@pytest.fixture(scope="module", autouse=True)
def _once():
  """Counts the same model once for all tests."""
  known, count = {}, cost.count

  def counted(experiment, vocab_size):
    key = repr(experiment.values), vocab_size
    known[key] = known.get(key) or count(experiment, vocab_size)
    return known[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cost, "count", counted)
    yield


def count_of(name):
  config = load(name)
  size = config.data.get("vocab_size", VOCABULARY)
  return cost.count(config_lib.parse(config), size)


@pytest.mark.parametrize("name", EXACT | EXACT_TRANSLATION)
def test_counts_of_the_paper(name):
  config, count = load(name), count_of(name)
  translates = name in EXACT_TRANSLATION
  exact = EXACT_TRANSLATION if translates else EXACT
  assert (count.parameters, count.ops) == exact[name]
  multiple = config.model.get("vocab_multiple", 1)
  table = layers.table_rows(config.data.vocab_size, multiple)
  table *= config.model.width
  assert (count.embedding, count.softmax) == ((1 + translates) * table, table)
  assert (
    count.total == count.parameters + count.biases + (2 + translates) * table
  )


def test_a_recurrent_mixture_costs_what_one_between_lstms_does():
  """2 of 16 matrices of 128 by 256, two LSTMs; biases are of all three."""
  counts = [count_of(f"sotu/{name}") for name in ("recurrent_moe", "moe_32")]
  assert {count.ops for count in counts} == {2 * 32_768 + 65_536 + 4096}
  assert {count.parameters for count in counts} == {65_536 + 524_288 + 4096}
  assert [count.biases for count in counts] == [3 * 256, 2 * 256]


def test_biases_gates_and_attention_are_told_apart():
  count = cost.count(experiment("wmt14/en_de_moe_32"), VOCABULARY)
  # Five LSTMs of 2048 units, v of attention, thresholds of two routers.
  assert count.biases == 5 * 4 * 2048 + 512 + 2 * 32
  assert count.gates == 2 * 512 * 32
  assert count.attention == 2 * 512 * 512


@pytest.mark.parametrize(
  "wiring, inputs", [("recurrent", 2 * 512), ("parallel", 512)]
)
def test_a_step_of_translation_reads_both_sides(wiring, inputs):
  config = load("wmt14/en_de_lstm")
  config.model.attention.wiring = wiring
  config.data.batch_size, config.data.row_length = 2, 3
  config.data.source_length = 5
  lstm, attention = 9_437_184, 512 * 512
  first = 4 * (inputs + 512) * 2048 + 2048 * 512
  source = 3 * lstm + attention
  target = first + lstm + attention + 512 * VOCABULARY
  built = config_lib.parse(config)
  count = cost.count(built, VOCABULARY)
  words = cost.flops_per_word(built, VOCABULARY, count)
  assert words == (6 * (target + 5 * (512 + 512)), 6 * source)


def test_a_step_counts_the_classes_of_a_sample_once():
  config = load("lm1b/moe_1_wide")
  config.data.batch_size, config.data.row_length = 2, 3
  # 1 - (1 - p)^8192 of each, and the target.
  vocab_size = 10_000
  p = np.log1p(1 / np.arange(1, vocab_size + 1)) / np.log(vocab_size + 1)
  classes = round((1 - (1 - p) ** 8192).sum())
  assert classes < 8192
  want = 8_388_608 + 512 * (classes + 1)
  built = config_lib.parse(config)
  count = cost.count(built, vocab_size)
  assert cost.flops_per_word(built, vocab_size, count) == (6 * want, 0)


def test_one_printed_cell_is_not_ours():
  """Of 46 of language models and 6 of translation; the total of MoE-34M too.

  And of GNMT its total, and the ops that Table 5 prints.
  """
  table = list(paper_counts.rows(quick=False))
  assert [len(paper_counts.PAPER), len(paper_counts.TRANSLATION)] == [23, 6]
  unlike = {row["config"]: row["unlike"] for row in table if row["unlike"]}
  assert len(table) == 29 and unlike == {
    "lm1b/moe_256": "ops",
    **dict.fromkeys(GNMT_CONFIGS[:2], "total"),
    GNMT_CONFIGS[2]: "ops total",
  }
  total = [row["config"] for row in table if row["ours_B"] != row["paper_B"]]
  assert total == ["lm1b/moe_34m", *GNMT_CONFIGS]
  ops = [row["ours_ops_M"] for row in table[-6:]]
  assert ops == ["85", "85", "102", "214", "214", "214"]
  # "Between 37% and 46%" in sec. 5.1, and the size of a hidden layer.
  about = {row["config"]: row for row in table}
  shares = [
    about[f"lm1b/moe_{name}"]["experts_percent"]
    for name in ("32", "256", "256_h", "1024_h", "4096_h", "34m", "143m")
  ]
  assert (min(shares), max(shares)) == (37.2, 45.5)
  ratios = {
    "lm1b/four_lstm_512": None,
    "lm1b/moe_1_deep": None,
    "lm1b/moe_4096_h": 1024,
    "lm1b/moe_143m": 8192,
    "wmt14/en_de_moe_2048_h": 2048,
  }
  assert {name: about[name]["ops_per_io"] for name in ratios} == ratios


def test_the_parameters_of_gnmt_are_those_of_other_tables():
  """Published is 278 million: three tables of 32,000 pieces, no attention."""
  count = cost.count(experiment(GNMT_CONFIGS[0]), 32_000)
  matrices = count.parameters - count.attention
  assert matrices + count.embedding + count.softmax == 278_659_072


# -- one layer ----------------------------------------------------------------

D, E, F = 32, 8, 64
EXPERT = 2 * D * F
GATE = D * E


def count(layer):
  x = jax.ShapeDtypeStruct((2, 16, D), jnp.float32)
  ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)

  class Model(nn.Module):
    """Names the layer as models do."""

    layer: nn.Module

    def __call__(self, x, ids):
      return self.layer(x, ids=ids)

  return cost.count_model(Model(layer), x, ids, method="__call__")


@pytest.mark.parametrize(
  "kind, fields, active, gates, biases",
  [
    ("softmax", {}, E, 1, 0),
    ("top_k", {"k": 3}, 3, 1, 0),
    ("noisy_top_k", {"k": 3}, 3, 2, 0),
    ("balanced", {"k": 3}, 3, 1, E),
    ("expert_threshold", {"k": 3}, 3, 1, E),
    ("softmax_top_k", {"k": 3}, 3, 1, 0),
    ("switch", {}, 1, 1, 0),
    ("gshard_top_2", {}, 2, 1, 0),
    ("expert_choice", {"k": 3}, 3, 1, 0),
    ("hash", {"k": 3}, 3, 0, 0),
    ("sigmoid", {"k": 3}, 3, 1, E),
  ],
)
def test_a_token_meets_k_experts_of_every_router(
  kind, fields, active, gates, biases
):
  gating = router.ROUTERS[kind](E, **fields)
  got = count(moe.MoE(gating, experts.FeedForward(E, F)))
  assert got.ops == gates * GATE + active * EXPERT
  assert (got.gates, got.biases) == (gates * GATE, biases)
  assert got.parameters == gates * GATE + E * EXPERT
  assert (got.experts, got.expert_io) == (active * EXPERT, active * 2 * D)
  assert got.ops_per_io == F


def test_every_router_is_counted():
  (mark,) = test_a_token_meets_k_experts_of_every_router.pytestmark
  assert {case[0] for case in mark.args[1]} == set(router.ROUTERS)


INNER = moe.MoE(router.TopK(5, 1), experts.FeedForward(5, 7))
KINDS = [experts.Linear(6), experts.FeedForward(1, 3), experts.Identity(1)]


@pytest.mark.parametrize(
  "module, ops, biases",
  [
    (experts.Linear(E), 2 * D * D, 0),
    (experts.Identity(E), 0, 0),
    (
      experts.FeedForward(E, (6, 10, 4), gated=True),
      2 * (2 * D * 6 + 6 * 10 + 10 * 4 + 4 * D),
      0,
    ),
    # A token visits 2 of 8 experts, each as busy as the others.
    (experts.Mixed(KINDS), (6 * D * D + 2 * D * 3) // 4, 0),
    # Of the user's own; mixtures, of which each chooses 1 of 5 again.
    (experts.Each(E, nn.Dense(D)), 2 * D * D, E * D),
    (experts.Each(E, INNER), 2 * (D * 5 + 2 * D * 7), 0),
  ],
)
def test_every_kind_of_expert_is_counted(module, ops, biases):
  got = count(moe.MoE(router.TopK(E, 2), module))
  assert (got.ops, got.biases) == (GATE + ops, biases)
  assert (got.experts, got.expert_io) == (ops, 2 * 2 * D)


def test_shared_experts_are_always_on():
  """Beside 2 of 8 in a layer; beside 3 groups of 4 in one of two levels."""
  shared = experts.FeedForward(3, F)
  routed = experts.FeedForward(E, F)
  got = count(moe.MoE(router.TopK(E, 2), routed, shared=shared))
  assert got.ops == GATE + (2 + 3) * EXPERT
  assert got.parameters == GATE + (E + 3) * EXPERT
  # No token is sent to them.
  assert (got.experts, got.routed) == (5 * EXPERT, 2 * EXPERT)
  assert (got.routed_parameters, got.expert_io) == (E * EXPERT, 2 * 2 * D)
  within = moe.MoE(router.TopK(3, 1), experts.FeedForward(3, F))
  got = count(moe.HierarchicalMoE(router.TopK(4, 3), within, shared=shared))
  assert (got.experts, got.routed) == (6 * EXPERT, 3 * EXPERT)
  assert (got.routed_parameters, got.expert_io) == (12 * EXPERT, 3 * 2 * D)
  assert got.parameters == D * (4 + 12) + (12 + 3) * EXPERT


def test_fine_grained_experts_cost_what_few_wide_ones_do():
  """At equal active width (2401.06066, sec. 3.1), but for the gates."""
  found = [
    count(
      moe.MoE(router.SoftmaxTopK(m * E, m), experts.FeedForward(m * E, F // m))
    )
    for m in (1, 2, 4, 8)
  ]
  assert {each.ops - each.gates for each in found} == {EXPERT}
  assert {each.parameters - each.gates for each in found} == {E * EXPERT}


def test_two_levels_meet_the_gates_of_the_groups_they_visit():
  """12 experts in 4 groups of 3; a token visits 3 groups, 1 expert in each."""
  within = moe.MoE(router.NoisyTopK(3, 1), experts.FeedForward(3, F))
  got = count(moe.HierarchicalMoE(router.NoisyTopK(4, 3), within))
  assert got.gates == 2 * D * 4 + 3 * (2 * D * 3)
  assert got.ops == got.gates + 3 * EXPERT
  assert (got.experts, got.ops_per_io) == (3 * EXPERT, F)
  assert got.parameters == 2 * D * 4 + 12 * EXPERT + 2 * D * 12
  balanced = moe.MoE(router.Sigmoid(3, 1), experts.FeedForward(3, F))
  assert count(moe.HierarchicalMoE(router.TopK(4, 3), balanced)).biases == 12


# -- Transformers -------------------------------------------------------------

# Published are 46.7, 6.92, 15.7, 600 and 7 B; active for a token, in billions,
# 12.9, 1.3, 2.4, where that of DeepSeek leaves the embedding out.
PUBLISHED = {
  "mixtral_8x7b": (46_702_792_704, "12.9"),
  "olmoe_1b_7b": (6_919_161_856, "1.3"),
  "deepseek_v2_lite": (15_706_484_224, "2.5"),
  # 18 layers of 2048 experts, 2 x 1024 x 8192 each, are 618.5 of "600 B".
  "gshard_600b": (619_464_810_496, "1.5"),
  "switch_base_128": (7_415_217_408, "0.2"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters(name):
  built = experiment(f"transformer/{name}")
  got = cost.count(built, config_lib.vocab_size(built))
  active = got.ops + got.biases + got.softmax
  if name in ("mixtral_8x7b", "olmoe_1b_7b"):
    active += got.embedding
  assert (got.total, f"{active / 1e9:.1f}") == PUBLISHED[name]


def test_recipes_have_the_ops_of_their_dense_twin():
  recipes = ["switch", "gshard_top_2", "top_k", "noisy_top_k", "balanced"]
  dense = count_of("transformer/dense").ops
  for name in recipes:
    got = count_of(f"transformer/{name}")
    assert got.ops - got.gates == dense, name
    assert got.gates == (1 + (name == "noisy_top_k")) * 2 * 64 * 32
  shared = count_of("transformer/loss_free_shared")
  assert (shared.ops - shared.gates, shared.gates) == (dense, 2 * 64 * 32)
  pairs, sides = "transformer/translate_tiny", ("encoder", "decoder")
  twin = {f"model__{side}__pattern": ("dense",) for side in sides}
  twin, sparse = experiment(pairs, **twin), count_of(pairs)
  assert sparse.ops - sparse.gates == cost.count(twin, VOCABULARY).ops


HEADS, KV, H, L, M = 4, 2, 8, 6, 5
ATTENTION = 2 * D * H * (HEADS + KV)
BLOCKS = {
  "attention": {"kind": "multi_head", "num_heads": HEADS, "num_kv_heads": KV},
  "dense": {"kind": "feed_forward", "hidden": F, "gated": True},
  "moe": {
    "num_experts": E,
    "router": {"kind": "top_k", "k": 2},
    "experts": {"kind": "feed_forward", "hidden": F},
  },
}


def counted(name, vocab_size, data, model):
  """Counts a model in place of a config's own."""
  values = load(name).to_dict()
  values["data"] |= {"batch_size": 2, "row_length": L} | data
  values["model"] = {"width": D} | model
  built = config_lib.parse(values)
  count = cost.count(built, vocab_size)
  return count, cost.flops_per_word(built, vocab_size, count)


@pytest.mark.parametrize("scan", [False, True])
def test_blocks_cost_the_same_one_by_one_and_scanned(scan):
  """A dense block, then three times a sparse and a dense one."""
  blocks = BLOCKS | {
    "num_layers": 7,
    "first": ("dense",),
    "pattern": ("moe", "dense"),
    "position": "relative",
    "scan": scan,
  }
  model = {"kind": "transformer", "blocks": blocks}
  got, of_word = counted("tiny", 50, {}, model)
  gates, active = 3 * GATE, 3 * 2 * EXPERT
  # Dense blocks have no experts.
  assert (got.gates, got.experts, got.routed) == (gates, active, active)
  assert got.routed_parameters == 3 * E * EXPERT and got.ops_per_io == F
  assert got.attention == 7 * ATTENTION
  assert got.ops == 7 * ATTENTION + gates + active + 4 * 3 * D * F
  assert got.parameters == got.ops + 3 * (E - 2) * EXPERT
  # Two norms a block and one after the last; T5's table.
  assert got.biases == 15 * D + 32 * HEADS
  assert got.expert_io == 3 * 2 * 2 * D
  assert of_word == (6 * (got.ops + 7 * 2 * D * L + 50 * D), 0)


def test_a_pair_costs_what_each_side_does():
  stack = BLOCKS | {"pattern": ("dense",), "scan": True}
  model = {
    "kind": "pair_transformer",
    "encoder": stack | {"num_layers": 2},
    "decoder": stack | {"num_layers": 3},
    "tied": True,
  }
  got, words = counted("translate_tiny", 50, {"source_length": M}, model)
  dense, of_states = 3 * D * F, 2 * D * H * KV
  source = 2 * (ATTENTION + dense) + 3 * of_states
  target = 3 * (2 * ATTENTION - of_states + dense)
  assert (got.source, got.ops) == (source, source + target)
  assert (got.embedding, got.softmax) == (0, 50 * D)
  target += 3 * 2 * D * (L + M) + 50 * D
  assert words == (6 * target, 6 * (source + 2 * 2 * D * M))
