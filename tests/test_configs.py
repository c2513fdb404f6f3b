"""Every config builds a model, and the twins cost the same."""

import importlib.util
import pathlib

import flax.linen as nn
import jax
import pytest

from moejax import config as config_lib
from moejax import sharding
from moejax.data import text, vocab
from moejax.training import optim

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
NAMES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.py"))
VOCABULARY = 100


def load(name):
  spec = importlib.util.spec_from_file_location("config", CONFIGS / name)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def parameters(config):
  """Shapes of the parameters of a config's model; allocates nothing."""
  net = config_lib.model(config, VOCABULARY)
  shape = (config.data.batch_size, config.data.row_length)
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype)
    for name, dtype in text.TYPES.items()
  }
  tree = jax.eval_shape(
    lambda batch: net.init(jax.random.key(0), batch, method="loss"), batch
  )
  return nn.unbox(tree)["params"]


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name):
  config = load(name)
  config_lib.check(config)
  tree = parameters(config)
  shape = (VOCABULARY, config.model.width)
  assert tree["embed"]["table"].shape == shape
  assert tree["head"]["table"].shape == shape
  assert tree["layers_1"]


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_twins_have_the_same_ops_per_timestep():
  sparse, dense = load("sotu/moe_32.py"), load("sotu/moe_1_wide.py")
  sparse_layer = parameters(sparse)["layers_1"]
  dense_layer = parameters(dense)["layers_1"]
  moe = sparse.model.moe
  active = size(sparse_layer["experts"]) * moe.router.k // moe.num_experts
  assert active == size(dense_layer) == 65_536
  assert size(sparse_layer["router"]) == 4_096
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
  with pytest.raises(ValueError, match="'grop'; choose 'batch' or 'group'"):
    config_lib.check(config)


def test_what_the_balance_losses_are_taken_over():
  config = load("tiny.py")
  assert config_lib.train(config).balance_over == "microbatch"
  config.train.balance_over = "bath"
  message = "config.train.balance_over is 'bath'.*'batch'"
  with pytest.raises(ValueError, match=message):
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
    "group_sent": ("data", "expert"),
    "group_away": ("data", "expert"),
    "expert": None,
  }
  assert dict(layout.rules) == want
  # The config of a run is read from JSON, which has no tuples.
  config_lib.remember(config, vocab.Vocabulary.build(["a a"], 1), tmp_path)
  config_lib.check_same(config, tmp_path)
  recalled = config_lib.recall(tmp_path)
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
    {"kind": "feed_forward", "num_experts": 4, "hidden": 16, "capacity": 2.0},
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
  layer = config_lib.model(config, VOCABULARY).layers[1]
  assert layer.experts.capacities == (2.0, 1.0, 1.0)


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
