"""The formulas against the shapes of real models, and the paper's figures."""

import flax.linen as nn
import flax.traverse_util
import pytest
from config_shapes import (
  NAMES,
  VOCABULARY,
  load,
  parameters,
  parameters_of,
  size,
)

from moejax import experts, moe, router
from moejax.models import layers, softmax
from moejax.planning import cost

# What a layer adds and no matrix multiplies.
BIASES = ("bias", "log_thresholds", "v")


def check(count, tree):
  """Compares counted entries with those of a tree of parameters."""
  tables = {n: leaves for n, leaves in tree.items() if "embed" in n}
  layers = [t for n, t in tree.items() if n not in {"head", *tables}]
  assert count.biases == sum(
    leaf.size
    for path, leaf in flax.traverse_util.flatten_dict(tree).items()
    if path[-1] in BIASES
  )
  assert count.parameters + count.biases == sum(map(size, layers))
  assert count.embedding == size(tables)
  assert count.softmax == size(tree["head"])
  assert count.total == size(tree)


@pytest.mark.parametrize("name", NAMES)
def test_formulas_count_the_real_model(name):
  check(cost.count(load(name), VOCABULARY), parameters_of(name))


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
EXACT_TRANSLATION = {
  f"wmt14/{pair}_{name}": tuple(LSTMS_OF_TRANSLATION + n for n in counts)
  for pair in ("en_fr", "en_de")
  for name, counts in TRANSLATION.items()
} | {
  "multilingual/moe_512": (
    LSTMS_OF_TRANSLATION + 2 * 512 * 8_388_608 + 2 * 2 * 512 * 512,
    LSTMS_OF_TRANSLATION + 4 * 8_388_608 + 2 * 2 * 512 * 512,
  )
}


@pytest.mark.parametrize("name", EXACT | EXACT_TRANSLATION)
def test_counts_of_the_paper(name):
  config = load(f"{name}.py")
  count = cost.count(config, config.data.vocab_size)
  exact = EXACT | EXACT_TRANSLATION
  assert (count.parameters, count.ops) == exact[name]
  multiple = config.model.get("vocab_multiple", 1)
  rows = layers.table_rows(config.data.vocab_size, multiple)
  tables = (3 if name in EXACT_TRANSLATION else 2) * rows * config.model.width
  assert count.total - count.biases == count.parameters + tables


@pytest.mark.parametrize(
  "name, ops",
  [
    ("wmt14/en_fr_lstm", 68_157_440),
    ("wmt14/en_fr_moe_32", 84_934_656),
    ("wmt14/en_fr_moe_512_h", 84_934_656),
    ("wmt14/en_fr_moe_2048_h", 84_934_656),
    ("multilingual/moe_512", 101_711_872),
  ],
)
def test_ops_of_translation_as_the_paper_counts_them(name, ops):
  """With the softmax, but neither gates nor attention."""
  config = load(f"{name}.py")
  count = cost.count(config, config.data.vocab_size)
  assert count.ops - count.gates - count.attention + count.softmax == ops


@pytest.mark.parametrize(
  "wiring, inputs", [("recurrent", 2 * 512), ("parallel", 512)]
)
def test_a_step_of_translation_reads_both_sides(wiring, inputs):
  config = load("wmt14/en_de_lstm.py")
  config.model.attention.wiring = wiring
  config.data.batch_size, config.data.row_length = 2, 3
  config.data.source_length = 5
  lstm, attention = 9_437_184, 512 * 512
  first = 4 * (inputs + 512) * 2048 + 2048 * 512
  source = 3 * lstm + attention
  target = first + lstm + attention + 512 * VOCABULARY
  want = 3 * target + 5 * source + 3 * 5 * (512 + 512)
  assert cost.flops_per_step(config, VOCABULARY) == 6 * 2 * want


def test_a_step_counts_the_classes_of_a_sample_once():
  config = load("lm1b/moe_1_wide.py")
  config.data.batch_size, config.data.row_length = 2, 3
  classes = softmax.most_distinct(8192, VOCABULARY)
  assert classes < 8192
  want = 8_388_608 + 512 * (classes + 1)
  assert cost.flops_per_step(config, VOCABULARY) == 6 * 2 * 3 * want


def test_one_printed_cell_of_46_is_not_ours():
  from experiments import paper_counts

  table = [
    row
    for row in paper_counts.rows(quick=True)
    if row["config"].startswith(("lm1b/", "news/"))
  ]
  assert 2 * len(table) == 46
  unlike = {row["config"]: row["unlike"] for row in table if row["unlike"]}
  assert unlike == {"lm1b/moe_256": "ops"}
  total = [row["config"] for row in table if row["ours_B"] != row["paper_B"]]
  assert total == ["lm1b/moe_34m"]


def test_all_printed_cells_of_translation_are_ours():
  from experiments import paper_counts

  table = list(paper_counts.rows(quick=True))[-3:]
  assert [row["config"] for row in table] == list(paper_counts.TRANSLATION)
  assert not any(row["unlike"] for row in table)
  assert [row["ours_ops_M"] for row in table] == ["85", "85", "102"]


def tiny(**changes):
  """configs/tiny.py with parts of its mixture replaced."""
  config = load("tiny.py")
  with config.unlocked():
    for name, value in changes.items():
      del config.model.moe[name]
      config.model.moe[name] = value
  return config


LSTMS, D, E = 2 * 4 * (32 + 32) * 32, 32, 8
EXPERT = 2 * D * 64
ROUTER_OPS = {
  "softmax": D * E + E * EXPERT,
  "top_k": D * E + 3 * EXPERT,
  "noisy_top_k": 2 * D * E + 3 * EXPERT,
  "balanced": D * E + 3 * EXPERT,
  "switch": D * E + EXPERT,
  "gshard_top_2": D * E + 2 * EXPERT,
  "expert_choice": D * E + 3 * EXPERT,
  "hash": 3 * EXPERT,
  "sigmoid": D * E + 3 * EXPERT,
}


@pytest.mark.parametrize("kind", router.ROUTERS)
def test_every_router_has_a_formula(kind):
  has_k = "k" in router.ROUTERS[kind].__dataclass_fields__
  config = tiny(router={"kind": kind, **({"k": 3} if has_k else {})})
  count = cost.count(config, VOCABULARY)
  assert count.ops == LSTMS + ROUTER_OPS[kind]
  check(count, parameters(config))


@pytest.mark.parametrize(
  "section, ops",
  [
    ({"kind": "linear"}, 2 * D * D),
    ({"kind": "identity"}, 0),
    (
      {"kind": "feed_forward", "hidden": (6, 10, 4), "gated": True},
      2 * (2 * D * 6 + 6 * 10 + 10 * 4 + 4 * D),
    ),
    (
      [
        {"kind": "linear", "num_experts": 6},
        {"kind": "feed_forward", "num_experts": 1, "hidden": 3},
        {"kind": "identity", "num_experts": 1},
      ],
      # A token visits 2 of 8 experts, each as busy as the others.
      (6 * D * D + 2 * D * 3) // 4,
    ),
  ],
)
def test_every_kind_of_expert_has_a_formula(section, ops):
  config = tiny(experts=section)
  count = cost.count(config, VOCABULARY)
  assert count.ops == LSTMS + 2 * D * E + ops
  check(count, parameters(config))


def test_two_levels_meet_the_gates_of_the_groups_they_visit():
  config = load("lm1b/moe_256_h.py")
  with config.unlocked():
    config.model.width = 8
    section = config.model.hierarchical_moe
    section.num_experts, section.num_groups = 12, 4
    section.primary.k, section.secondary.router.k = 3, 1
    section.secondary.experts.hidden = 5
  count = cost.count(config, VOCABULARY)
  lstms, expert = 2 * 4 * 16 * 8, 2 * 8 * 5
  assert count.ops == lstms + 2 * 8 * 4 + 3 * (2 * 8 * 3 + expert)
  assert count.parameters == lstms + 2 * 8 * 4 + 12 * expert + 2 * 8 * 12


def test_what_has_no_formula_is_named():
  layer = moe.MoE(router.TopK(2, 1), experts.Each(2, nn.Dense(4)))
  with pytest.raises(ValueError, match="cost of Each, only of FeedForward"):
    cost._mixture(layer, 4)
