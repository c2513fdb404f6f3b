"""Every config builds a model and takes flags; twins cost the same."""

import hypothesis
import hypothesis.strategies as st
import pytest
from config_shapes import (
  CONFIGS,
  NAMES,
  VOCABULARY,
  load,
  parameters,
  parameters_of,
)
from ml_collections import config_dict

from moejax import config as config_lib
from moejax import named, options, sharding
from moejax import slots as slots_lib
from moejax import workdir as workdir_lib
from moejax.data import vocab
from moejax.models.layers import table_rows
from moejax.planning import cost
from moejax.training import optim


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name):
  config = load(name)
  config_lib.check(config)
  tree = parameters_of(name)
  rows = table_rows(VOCABULARY, config.model.get("vocab_multiple", 1))
  shape = (rows, config.model.width)
  if config.model.kind == "gnmt":
    tables, stacks = ["embed_source", "embed_target"], ("encoder", "decoder")
    others = ["attention"]
  else:
    tables, stacks, others = ["embed"], ("layers",), []
  tables.append("head")
  assert all(tree[name]["table"].shape == shape for name in tables)
  layers = [
    f"{stack}_{i}" for stack in stacks for i in range(len(config.model[stack]))
  ]
  assert sorted(tree) == sorted([*tables, *layers, *others])


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_an_option_at_its_present_value(name):
  config, same = load(name), load(name)
  fields = list(config_lib.fields(config))
  given = [field for field in fields if field.value is not options.EMPTY]
  assert len(given) > 30 and len(fields) > len(given) + 30
  assert all(field.line for field in fields)
  config_lib.override(
    same, [(f.name, [options.written(f.value)]) for f in given]
  )
  assert types_of(same.to_dict()) == types_of(config.to_dict())
  # What it leaves out can be read where there is a default.
  for field in fields:
    if field.value is options.EMPTY and field.default is not options.EMPTY:
      text = options.written(field.default)
      read = options.read(text, field.annotation, field.name)
      assert types_of(read) == types_of(field.default)


def types_of(value):
  """The value, and the types within: 1 and 1.0 are the same to Python."""
  if isinstance(value, dict):
    return {name: types_of(each) for name, each in value.items()}
  if isinstance(value, tuple):
    return tuple(map(types_of, value))
  return type(value), value


def values(annotation):
  """Draws what an annotation allows."""
  return st.one_of([_values(each) for each in named.alternatives(annotation)])


def _values(each):
  about = each.about
  if isinstance(about, named.Names):
    return st.sampled_from(list(about.known))
  if isinstance(about, named.Section):
    by_kind = isinstance(about.factory, dict)
    kinds = [{"kind": kind} for kind in about.factory] if by_kind else [{}]
    return st.one_of([sections(about, kind) for kind in kinds])
  if each.entry:
    return st.lists(values(each.entry), max_size=3).map(tuple)
  finite = st.floats(allow_nan=False, allow_infinity=False)
  return {
    bool: st.booleans(),
    int: st.integers(),
    float: finite,
    str: st.text(),
    type(None): st.none(),
  }[each.kind]


def sections(about, kind):
  _, parameters = named.chosen(about, kind, "there")
  return st.fixed_dictionaries(
    {name: values(each.annotation) for name, each in parameters.items()}
  ).map(lambda fields: kind | fields)


@pytest.mark.parametrize("name", ["tiny.py", "translate_tiny.py"])
@hypothesis.given(st.data())
def test_any_field_takes_what_its_annotation_allows(name, data):
  config = load(name)
  field = data.draw(st.sampled_from(list(config_lib.fields(config))))
  value = data.draw(values(field.annotation))
  config_lib.override(config, [(field.name, [options.written(value)])])
  found = config.to_dict()
  for step in field.name.split(".")[1:]:
    found = found[step]
  assert types_of(found) == types_of(value)


def test_fields_that_refer_to_each_other_stay_so():
  width = config_dict.FieldReference(8)
  config = load("tiny.py")
  with config.unlocked(), config.ignore_type():
    config.model.width = width
    config.model.moe.experts.hidden = width * 4
  config_lib.override(config, [("config.model.width", ["16"])])
  assert config.model.moe.experts.hidden == 64


@pytest.mark.parametrize(
  "name", [name for name in NAMES if name.startswith(("lm1b/", "news/"))]
)
def test_a_row_of_the_paper_is_trained_as_in_the_paper(name):
  config = load(name)
  news = name.startswith("news/")
  words = config.data.batch_size * config.data.row_length
  assert words == pytest.approx(2_500_000 if news else 300_000, rel=0.02)
  draft = "draft" in name
  assert config.optimizer.warmup_steps == (200 if draft else 1000)
  assert config.optimizer.hold_steps == (200 if draft else 0)
  assert config.aux.to_dict() == {"importance": 0.1, "load": 0.1}
  assert config.data.kind == "lm1b"
  assert config.model.dtype == "float32"


# Of Table 7, where it is not 0.1.
DROPOUT = {
  "lm1b/moe_1024_h.py": 0.2,
  "lm1b/moe_4096_h.py": 0.2,
  "lm1b/two_lstm_8192_1024.py": 0.25,
  "lm1b/moe_34m.py": 0.3,
  "lm1b/moe_143m.py": 0.4,
}


@pytest.mark.parametrize(
  "name",
  [name for name in NAMES if name.startswith("lm1b/") and "draft" not in name],
)
def test_a_row_of_table_7_has_its_own_dropout(name):
  assert load(name).model.dropout == DROPOUT.get(name, 0.1)


def test_flat_mixtures_of_the_paper_drop_nothing():
  moe = config_lib.model(load("lm1b/moe_32.py"), VOCABULARY).layers[1]
  assert moe.capacity_factor is moe.eval_capacity_factor is None


@pytest.mark.parametrize(
  "name",
  [
    name
    for name in NAMES
    if "hierarchical_moe" in load(name).model and not name.startswith("wmt14/")
  ],
)
def test_experts_have_the_slots_that_the_factors_ask_for(name):
  """And not many more: where all groups are routed apart, there may be."""
  config = load(name)
  layer = config_lib.model(config, VOCABULARY).layers[1]
  inner, size = layer.secondary, layer.group_size
  together = layer.groups_together * size
  groups, experts = layer.primary.num_experts, inner.router.num_experts
  rows = slots_lib.capacity(2 * size, size, groups, layer.capacity_factor)
  rows *= layer.groups_together
  slots = slots_lib.capacity(2 * rows, rows, experts, inner.capacity_factor)
  assert 6.25 <= groups * experts * slots / together < 7.2


TRANSLATION = [n for n in NAMES if n.startswith(("wmt14/", "multilingual/"))]


@pytest.mark.parametrize("name", TRANSLATION)
def test_a_translation_of_the_paper_is_trained_as_in_the_paper(name):
  config = load(name)
  one_pair = name.startswith("wmt14/")
  # 64 devices of about 16,000 words.
  pieces = config.data.batch_size * config.data.row_length
  assert pieces == pytest.approx(64 * 16_000, rel=0.03)
  assert config.data.vocab_size == 32_768
  assert config.optimizer.warmup_steps == 2000
  assert config.optimizer.hold_steps == 8000
  assert config.data.kind == ("wmt14" if one_pair else "pairs")
  assert config.model.dropout == (0.4 if one_pair else 0)
  aux = {"importance": 0.01, "threshold": 1.0}
  if not one_pair:
    aux = {"importance": 0.01, "load": 0.01}
  assert config.aux.to_dict() == ({} if "lstm" in name else aux)


@pytest.mark.parametrize("name", ["moe_512_h", "moe_2048_h"])
def test_balanced_mixtures_of_two_levels_have_a_slot_for_every_edge(name):
  """In evaluation for twice the mean at either level: all that may come."""
  layer = config_lib.model(load(f"wmt14/en_fr_{name}.py"), VOCABULARY).encoder[
    2
  ]
  inner, size = layer.secondary, layer.group_size
  groups, experts = layer.primary.num_experts, inner.router.num_experts
  for factor, within, most in (
    (layer.capacity_factor, inner.capacity_factor, 2),
    (layer.eval_capacity_factor, inner.eval_capacity_factor, 4),
  ):
    rows = slots_lib.capacity(most * size, size, groups, factor)
    slots = slots_lib.capacity(most * rows, rows, experts, within)
    assert rows == most * size // groups
    assert slots == most * rows // experts


@pytest.mark.parametrize(
  "changes, complaint",
  [
    (
      {"decoder": ("moe", "lstm")},
      r"decoder is \('moe', 'lstm'\).*with 'lstm'",
    ),
    ({"decoder": ()}, r"decoder is \(\), .*begin with 'lstm'"),
    ({"encoder": ("lstn",)}, r"model\.encoder is 'lstn'"),
    ({"attention": {"form": "prod"}}, r"attention\.form is 'prod'.*'product'"),
    ({"attention": {"wiring": "paralel"}}, r"wiring is 'paralel'.*'parallel'"),
    ({"lstm": {"hidden": 0}}, r"model\.lstm\.hidden is 0; give 1 or more"),
    ({"attention": {"width": 0}}, r"attention\.width is 0; give 1"),
    ({"attention": {"with": 4}}, r"attention\.with .*attention\.width"),
    ({"dropout": 1.0}, r"dropout is 1\.0"),
  ],
)
def test_a_translation_model_that_cannot_be(changes, complaint):
  config = load("wmt14/en_fr_moe_32.py")
  with config.unlocked():
    for name, value in changes.items():
      del config.model[name]
      config.model[name] = value
  with pytest.raises(ValueError, match=complaint):
    config_lib.model(config, VOCABULARY)


def test_every_row_of_the_tables_has_a_config():
  lm1b = {p.stem for p in (CONFIGS / "lm1b").glob("*.py")} - {"common"}
  assert lm1b == {
    "lstm_512_512",
    "lstm_1024_512",
    "lstm_2048_512",
    "four_lstm_512",
    "two_lstm_8192_1024",
    "moe_1_wide",
    "moe_1_deep",
    "moe_4",
    "moe_32",
    "moe_256",
    "moe_256_h",
    "moe_1024_h",
    "moe_4096_h",
    "moe_34m",
    "moe_143m",
    "draft_131072_linear",
  }
  news = {p.stem for p in (CONFIGS / "news").glob("*.py")} - {"common"}
  two_levels = (256, 1024, 4096, 16_384, 65_536, 131_072)
  assert news == {"four_lstm_512", "moe_32"} | {
    f"moe_{experts}_h" for experts in two_levels
  }
  wmt14 = {p.stem for p in (CONFIGS / "wmt14").glob("*.py")} - {"common"}
  mixtures = ("lstm", "moe_32", "moe_512_h", "moe_2048_h")
  assert wmt14 == {
    f"{pair}_{mixture}" for pair in ("en_fr", "en_de") for mixture in mixtures
  }


def test_the_twins_have_the_same_ops_per_timestep():
  sparse, dense = load("sotu/moe_32.py"), load("sotu/moe_1_wide.py")
  router = 4_096
  dense_ops = cost.count(dense, VOCABULARY).ops
  assert cost.count(sparse, VOCABULARY).ops == dense_ops + router
  assert dense_ops == 131_072
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


def test_scope_of_the_balance_losses():
  config = load("tiny.py")
  weights = config.aux.to_dict()
  assert config_lib.aux(config) == (weights, "batch")
  with config.unlocked():
    config.aux.scope = "group"
  config_lib.check(config)
  assert config_lib.aux(config) == (weights, "group")
  config.aux.scope = "grop"
  with pytest.raises(ValueError, match="aux.scope is 'grop'; choose .*'group'"):
    config_lib.check(config)


def test_what_the_balance_losses_are_taken_over():
  config = load("tiny.py")
  assert config_lib.train(config).balance_over == "microbatch"
  config.train.balance_over = "bath"
  message = "config.train.balance_over is 'bath'.*'batch'"
  with pytest.raises(ValueError, match=message):
    config_lib.check(config)


def test_a_vocabulary_without_pieces():
  config = load("translate_tiny.py")
  config.data.vocab_size = 0
  with pytest.raises(ValueError, match="data.vocab_size is 0; give 1 or more"):
    config_lib.check(config)


def own_layout(**fields):
  config = load("tiny.py")
  with config.unlocked():
    del config["layout"]
    config.layout = fields
  return config


def test_a_layout_of_ones_own_starts_from_the_shared_rules(tmp_path):
  config = own_layout(
    mesh_shape=(2, -1, 1), rules={"group": ("data", "expert"), "expert": None}
  )
  config_lib.check(config)
  layout = config_lib.layout(config)
  assert layout.mesh_shape == (2, -1, 1)
  want = sharding.RULES | {
    "group": ("data", "expert"),
    "group_dispatched": ("data", "expert"),
    "group_replicated": ("data", "expert"),
    "expert": None,
  }
  assert dict(layout.rules) == want
  # The config of a run is read from JSON, which has no tuples.
  workdir_lib.remember(config, vocab.Vocabulary.build(["a a"], 1), {}, tmp_path)
  workdir_lib.check_same(config, tmp_path)
  recalled = workdir_lib.recall(tmp_path)
  assert config_lib.layout(recalled) == layout


def test_a_layout_of_ones_own_can_be_a_known_one():
  config = own_layout(name="mine", mesh_shape=(1, -1, 2))
  layout = config_lib.layout(config)
  assert layout.name == "mine"
  assert layout.rules == sharding.LAYOUTS["expert_model"].rules


@pytest.mark.parametrize(
  "fields, complaint",
  [
    ({"mesh_shap": (1, 1, 1)}, r"layout\.mesh_shap .*layout\.mesh_shape"),
    ({}, r"config\.layout\.mesh_shape is missing"),
    ({"mesh_shape": (1, -1)}, r"is \(1, -1\); give .* data, expert, model"),
    ({"mesh_shape": (-1, -1, 1)}, "at most one"),
    ({"mesh_shape": (0, -1, 1)}, r"is \(0, -1, 1\)"),
    (
      {"mesh_shape": (1, -1, 1), "rules": {"exprt": "expert"}},
      r"rules\.exprt does not exist; the nearest is .*\.expert\.",
    ),
    (
      {"mesh_shape": (1, -1, 1), "rules": {"mlp": ("expert", "modl")}},
      r"rules\.mlp is 'modl'; .*nearest is 'model'",
    ),
  ],
)
def test_a_layout_that_cannot_be(fields, complaint):
  with pytest.raises(ValueError, match=complaint):
    config_lib.check(own_layout(**fields))


def test_schedule_is_the_configs():
  config = load("tiny.py")
  schedule, _ = config_lib.optimizer(config)
  want = optim.warmup_rsqrt(config.optimizer.peak, 50)
  assert float(schedule(7)) == float(want(7))


def two_levels():
  """configs/tiny.py with a mixture of 4 groups of 2 experts."""
  config = load("tiny.py")
  experts = config.model.moe.experts.to_dict()
  with config.unlocked():
    del config.model["moe"]
    config.model.layers = ("lstm", "hierarchical_moe", "lstm")
    config.model.hierarchical_moe = {
      "num_experts": 8,
      "num_groups": 4,
      "group_size": 128,
      "primary": {"kind": "noisy_top_k", "k": 2},
      "secondary": {
        "router": {"kind": "noisy_top_k", "k": 1},
        "experts": experts,
      },
    }
  return config


def test_a_config_may_have_two_levels():
  layer = parameters(two_levels())["layers_1"]
  assert layer["primary"]["gate"]["kernel"].shape == (32, 4)
  assert layer["secondary"]["router"]["gate"]["kernel"].shape == (4, 32, 2)
  assert layer["secondary"]["experts"]["w_in"].shape == (4, 2, 32, 64)


def test_sizes_that_do_not_multiply_name_both_numbers():
  config = two_levels()
  config.model.hierarchical_moe.num_groups = 3
  with pytest.raises(ValueError, match=r"3 groups do not divide 8 experts"):
    config_lib.model(config, VOCABULARY)


def mixed(*entries):
  config = load("tiny.py")
  with config.unlocked():
    del config.model.moe["experts"]
    config.model.moe.experts = entries
  return config


def test_a_list_of_experts_is_a_mixed_layer():
  config = mixed(
    {"kind": "feed_forward", "num_experts": 4, "hidden": 16},
    {
      "kind": "feed_forward",
      "num_experts": 2,
      "hidden": 8,
      "activation": "gelu",
    },
    {"kind": "identity", "num_experts": 2},
  )
  experts = parameters(config)["layers_1"]["experts"]
  assert experts["kinds_0"]["w_in"].shape == (4, 32, 16)
  assert experts["kinds_1"]["w_in"].shape == (2, 32, 8)


def test_a_list_of_experts_must_add_up():
  config = mixed({"kind": "linear", "num_experts": 7})
  with pytest.raises(ValueError, match=r"lists 7 experts, .*num_experts is 8"):
    config_lib.model(config, VOCABULARY)


def test_an_unknown_activation_names_the_known():
  config = mixed(
    {"kind": "feed_forward", "num_experts": 8, "hidden": 8, "activation": "rel"}
  )
  with pytest.raises(ValueError, match=r"activation is 'rel'.*'relu'"):
    config_lib.model(config, VOCABULARY)
