"""Fields of a config: what none can hold is said by name."""

import config_shapes
import pytest

from moejax import config as config_lib


@pytest.mark.parametrize(
  "field, value, complaint",
  [
    ("seed", 2**32, "seed is 4294967296; give 0 or more, and less than"),
    ("seed", 1.5, r"seed is 1\.5; give it as int"),
    ("aux", None, "config.aux is None; give it as dict"),
    ("model", (), r"config.model is \(\); give it as dict"),
    ("layout", 8, "config.layout is 8; give it as str or dict"),
    ("data.batch_size", 32.0, r"data.batch_size is 32\.0; give it as int"),
    ("train.steps", "100", "train.steps is '100'; give it as int"),
    ("model.width", 32.0, r"model.width is 32\.0; give it as int"),
    ("model.moe.group_size", 8.0, r"group_size is 8\.0; .* int or None"),
    ("model.moe.experts.hidden", (), r"hidden is \(\); give at least one"),
    ("model.moe.experts.hidden", 8.0, r"hidden is 8\.0; give it as int"),
    ("model.moe.experts", "linear", "experts is 'linear'; give it as dict or"),
    ("model.moe.router", "top_k", "router is 'top_k'; give it as dict"),
    ("model.moe.router.kind", ["top_k"], r"kind is \['top_k'\]; choose one"),
    ("aux.load", "0.1", "aux.load is '0.1'; give it as float"),
    ("optimizer.clip_norm", 0.0, r"clip_norm is 0\.0; give more than 0, or N"),
    ("optimizer.b2", 1.0, r"b2 is 1\.0; give 0 or more, and less than 1"),
    ("optimizer.b2", 0.99999999, r"b2 is 0\.99999999; .* less than 1"),
    ("optimizer.eps", -1.0, r"eps is -1\.0; give more than 0"),
    ("optimizer.eps", 0.0, r"eps is 0\.0; give more than 0"),
    ("aux.importance", float("nan"), "importance is nan; give 0 or more"),
    ("data.vocab_size", 9, r"data.vocab_size does not exist; .*\.batch_size"),
    ("model.moe.experts", ("linear",), r"experts\[0\] is 'linear'; .* as dict"),
    (
      "model.moe.experts",
      ({"kind": "linear", "num_experts": 8, "capacity": "2"},),
      r"experts\[0\].capacity is '2'; give it as float",
    ),
    ("layout", {"mesh_shape": 8}, "mesh_shape is 8; give it as list"),
    (
      "layout",
      {"mesh_shape": (1, -1, 1), "rules": {"expert": 1}},
      "rules.expert is 1; give it as str or list or None",
    ),
  ],
)
def test_a_field_of_another_type_or_size_is_named(field, value, complaint):
  """A file may hold what no flag can."""
  config = config_shapes.load("tiny.py")
  *path, last = field.split(".")
  with config.unlocked(), config.ignore_type():
    section = config
    for name in path:
      section = section[name]
    section[last] = value
  with pytest.raises(ValueError, match=complaint):
    config_lib.check(config)
    config_lib.batch_shapes(config)
    config_lib.model(config, 100)
