"""Fields of a config: what none can hold is said by name."""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import config_shapes
import pytest

from moejax import config as config_lib
from moejax import named, options


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


class Wheel(NamedTuple):
  """A wheel.

  Attributes:
    radius: of it (app. B), with a long
      line. The rest is no line of it.
    spokes: how many.
  """

  radius: Annotated[float, named.Range(0)]
  spokes: named.Size = 8


@named.fields_of(Wheel, radius=Annotated[int, named.Range(1, 9)])
def small_wheel(color: str = "red", **fields):
  """Makes one.

  Args:
    color: of it.
  """
  return color, Wheel(**fields)


class Cart(NamedTuple):
  """A cart; its load is given.

  Attributes:
    wheels: that it rolls on.
    spare: a wheel by kind.
  """

  load: object
  wheels: Sequence[Annotated[Any, named.Section(Wheel)]]
  spare: Annotated[
    Any, named.Section({"small": small_wheel}, given=("spokes",))
  ]


def test_what_is_built_says_what_its_section_holds():
  """And gets sections as functions that build them, of what is given."""
  section = {"wheels": [{"radius": 1}], "spare": {"kind": "small", "radius": 2}}
  cart = named.make(Cart, section, "cart", load="hay")
  (wheel,) = cart.wheels
  assert cart.load == "hay" and wheel() == Wheel(1)
  assert cart.spare(spokes=3) == ("red", Wheel(2, 3))
  whole = Annotated[Any, named.Section(Cart)]
  found = {
    field.name: (named.worded(field.annotation, fully=True), field.line)
    for field in options.fields(whole, "cart", section)
  }
  line = "of it (app. B), with a long line"
  assert found == {
    "cart": ("dict", ""),
    "cart.wheels": ("list of (dict)", "that it rolls on"),
    "cart.wheels[0]": ("dict", ""),
    "cart.wheels[0].radius": ("float, 0 or more", line),
    "cart.wheels[0].spokes": ("int, 1 or more", "how many"),
    "cart.spare": ("dict", "a wheel by kind"),
    "cart.spare.kind": ("small", "which of these it is"),
    "cart.spare.color": ("str", "of it"),
    "cart.spare.radius": ("int, 1 or more, and less than 9", line),
  }


@pytest.mark.parametrize(
  "section, complaint",
  [
    ({}, "cart.wheels is missing"),
    ({"wheels": [1]}, r"cart.wheels\[0\] is 1; give it as dict"),
    ({"wheels": [{}]}, r"cart.wheels\[0\].radius is missing"),
    ({"wheels": [], "load": 1}, "cart.load does not exist"),
    ({"wheels": []}, "cart.spare is missing"),
    ({"wheels": [], "spare": {}}, "cart.spare.kind is ''; choose one of 'smal"),
    (
      {"wheels": [], "spare": {"kind": "small", "radius": 9}},
      "cart.spare.radius is 9; give 1 or more, and less than 9",
    ),
    (
      {"wheels": [], "spare": {"kind": "small", "radius": 1, "spokes": 1}},
      "cart.spare.spokes does not exist",
    ),
  ],
)
def test_a_section_is_refused_before_anything_is_built(section, complaint):
  with pytest.raises(ValueError, match=complaint):
    named.make(Cart, section, "cart", load=None)
