"""Every field of every config: listed, taken by a flag, and never ignored."""

import contextlib
import functools
import re
import types
from collections.abc import Sequence

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from config_shapes import NAMES, VOCABULARY, experiment, load
from ml_collections import config_dict

from moejax import config as config_lib
from moejax import config_fields
from moejax.models import build, transformer
from moejax.training import session

pytestmark = pytest.mark.usefixtures("standard_promotion")

# -- every field changes what it should ---------------------------------------

PARAMS = {
  "a": jnp.ones((1, 2)),
  "b": {
    "experts": {"w_in": jnp.ones((2, 3, 1))},
    "router": {"kernel": jnp.ones((3, 2))},
  },
}


def updates(built):
  """What an update computes: every number of the optimizer is in it."""

  def update(gradients):
    return built.tx.update(gradients, built.tx.init(PARAMS), PARAMS)[0]

  return str(jax.make_jaxpr(update)(PARAMS))


def described(model):
  """A model in words, and what makes the layers of its blocks."""
  found = [model]
  for name in ("blocks", "encoder", "decoder"):
    if isinstance(blocks := getattr(model, name, None), transformer.Blocks):
      makers = blocks.attention, *blocks.first, *blocks.pattern
      found += [make() for make in makers]
  return re.sub(" at 0x[0-9a-f]+", "", repr(found))


# What the fields of a section decide. Of `data` see `test_data_fields.py`.
DECIDES = {
  "seed": lambda built: built.seed,
  "layout": lambda built: built.layout,
  "data": lambda built: built.shapes,
  "model": lambda built: described(built.model(VOCABULARY)),
  "aux": lambda built: (built.aux_weights, built.aux_scope),
  "optimizer": lambda built: (
    [float(built.schedule(n)) for n in (0, 5, 10**3, 10**4, 10**6)],
    updates(built),
  ),
  "train": lambda built: built.train,
}


def others(annotation, value):
  """Yields values that a field may hold in place of this one."""
  for kind, (about, entry, _) in config_fields.alternatives(annotation).items():
    if isinstance(about, config_fields.Names):
      yield from (name for name in about.known if name != value)
    elif kind is bool:
      yield not value
    elif kind is int:
      yield from (2 * value, value + 1) if type(value) is int else (2, 3)
    elif kind is float:
      yield from (value / 2, value + 0.25) if value else (0.25, 2.0)
    elif kind is str:
      yield f"{value}x"
    elif kind is Sequence:
      first = (value or (1,))[0] if isinstance(value, (tuple, list)) else 1
      yield from ((one,) for one in others(entry, first))
      yield from ((2, -1, 1), ("lstm",) * 2, ("lstm",) * 3, (first,) * 2)
    elif kind is types.NoneType:
      yield None


def is_read(config, name):
  """Whether anything reads a field.

  A layer that no stack has is not built, a layout that has a name has no
  section, "looks_ahead" only lets pass what else is refused, samples are of
  words alone, and the two fields of an annealing need each other.
  """
  if name == "config.model.looks_ahead" or "train.annealing." in name:
    return False
  if name == "config.model.num_samples" and "tokens" in config["data"]:
    return False
  if name.startswith("config.layout.") and isinstance(config["layout"], str):
    return False
  _, section, *path = *name.split("."), "", ""
  model, layers = config["model"], {*build.LAYERS, "dense"}
  stacks = ("layers", "encoder", "decoder")
  if "transformer" in model["kind"] and path[0] in model and len(path) > 3:
    model, stacks, path = model[path[0]], ("first", "pattern"), path[1:]
  used = {name for stack in stacks for name in model.get(stack, ())}
  return section != "model" or path[0] not in layers or path[0] in used


def cases():
  """Fields with a config that has each: once for all kinds it can be within."""
  found = {}
  for name in NAMES:
    values = load(name).to_dict()
    fields = list(config_lib.fields(values))
    kinds = [(f.name, f.value) for f in fields if f.name.endswith(".kind")]
    for field in fields:
      section = field.name.split(".")[1]
      own = [each for each in kinds if each[0].startswith(f"config.{section}")]
      sizes = ("row_length", "source_length", "batch_size")
      skip = section == "data" and not field.name.endswith(sizes)
      is_section = config_fields.section_of(field.annotation)
      if not is_section and not skip and is_read(values, field.name):
        found.setdefault((field.name, *own), (name, section, field))
  return found.values()


def test_no_field_is_ignored():
  found, ignored = list(cases()), []
  assert len(found) > 150
  as_they_are = functools.cache(
    lambda name, section: DECIDES[section](experiment(name))
  )
  for name, section, field in found:
    value = field.default if field.value is config_fields.EMPTY else field.value
    for other in others(field.annotation, value):
      config = load(name)
      config_lib.override(
        config, [(field.name, [config_fields.written(other)])]
      )
      try:
        decided = DECIDES[section](config_lib.parse(config))
        if decided != as_they_are(name, section):
          break
      except ValueError:
        # Of another kind other fields are missing.
        if field.name.endswith(".kind"):
          break
    else:
      ignored.append((name, field.name, value))
  assert not ignored


# `train_step` as it is lowered, of fields that say how to train.
STEP = {
  "seed": 1,
  "aux__importance": 0.2,
  "aux__load": 0.2,
  "aux__scope": "group",
  "train__microbatches": 2,
  "optimizer__peak": 0.1,
  "optimizer__clip_norm": 1.0,
  "model__dropout": 0.0,
  "layout": "fsdp",
}


def lowered(**changes):
  small = {
    "data__row_length": 16,
    "data__batch_size": 16,
    "model__layers": ("moe",),
    "model__width": 8,
    "model__num_samples": 16,
    "model__moe__group_size": 16,
    "model__moe__experts__hidden": 8,
  }
  built = session.build(experiment("tiny", **small | changes), VOCABULARY)
  return session.lower(built).as_text()


def test_the_lowered_step_is_that_of_the_config():
  programs = {"": lowered()}
  for field, value in STEP.items():
    programs[field] = lowered(**{field: value})
  two = {"train__microbatches": 2, "train__balance_over": "batch"}
  programs["balance_over"] = lowered(**two)
  assert len(set(programs.values())) == len(programs)


# -- fields of a command line -------------------------------------------------


def types_of(value):
  """The value, and the types within: 1 and 1.0 are the same to Python."""
  if isinstance(value, dict):
    return {name: types_of(each) for name, each in value.items()}
  if isinstance(value, tuple):
    return tuple(map(types_of, value))
  return type(value), value


# One of each folder, and those with layers or fields of their own.
SOME = [
  *("tiny", "translate_tiny", "lm1b/moe_1_deep", "lm1b/draft_131072_linear"),
  *("news/moe_65536_h", "sotu/recurrent_moe", "wmt14/en_fr_moe_2048_h"),
  *("wmt14/en_de_gnmt", "multilingual/moe_512"),
]


@pytest.mark.parametrize("name", SOME)
def test_every_field_is_an_option_at_its_present_value(name):
  config, same = load(name), load(name)
  fields = list(config_lib.fields(config))
  given = [field for field in fields if field.value is not config_fields.EMPTY]
  assert len(given) > 30 and len(fields) > len(given) + 30
  assert all(field.line for field in fields)
  config_lib.override(
    same, [(f.name, [config_fields.written(f.value)]) for f in given]
  )
  assert types_of(same.to_dict()) == types_of(config.to_dict())
  # What it leaves out can be read where there is a default.
  for field in fields:
    if (
      field.value is config_fields.EMPTY
      and field.default is not config_fields.EMPTY
    ):
      read = config_fields.value_of(
        field, [config_fields.written(field.default)]
      )
      assert types_of(read) == types_of(field.default)


def values(annotation):
  """Draws what an annotation allows."""
  kinds = config_fields.alternatives(annotation).items()
  return st.one_of([_values(kind, *each) for kind, each in kinds])


def _values(kind, about, entry, _):
  if isinstance(about, config_fields.Names):
    return st.sampled_from(list(about.known))
  if isinstance(about, config_fields.Section):
    kinds = [{"kind": kind} for kind in about.kinds] or [{}]
    return st.one_of([sections(about, kind) for kind in kinds])
  if entry:
    return st.lists(values(entry), max_size=3).map(tuple)
  finite = st.floats(allow_nan=False, allow_infinity=False)
  return {
    bool: st.booleans(),
    int: st.integers(),
    float: finite,
    str: st.text(),
    type(None): st.none(),
  }[kind]


def sections(about, kind):
  _, parameters = config_fields.chosen(about, kind, "there")
  return st.fixed_dictionaries(
    {name: values(each.annotation) for name, each in parameters.items()}
  ).map(lambda fields: kind | fields)


@pytest.mark.parametrize("name", ["tiny", "translate_tiny"])
@hypothesis.given(st.data())
def test_any_field_takes_what_its_annotation_allows(name, data):
  config = load(name)
  field = data.draw(st.sampled_from(list(config_lib.fields(config))))
  value = data.draw(values(field.annotation))
  config_lib.override(config, [(field.name, [config_fields.written(value)])])
  found = config.to_dict()
  for step in field.name.split(".")[1:]:
    found = found[step]
  assert types_of(found) == types_of(value)


FIELDS = list(config_lib.fields(load("tiny")))


@hypothesis.given(st.sampled_from(FIELDS), st.text("{}[](),:'\"1a-._ e"))
@hypothesis.example(FIELDS[2], "{[1]: 2}")
@hypothesis.settings(max_examples=300)
def test_any_text_is_read_or_refused(field, text):
  with contextlib.suppress(ValueError):
    config_fields.value_of(field, [text])


def test_fields_that_refer_to_each_other_stay_so():
  width = config_dict.FieldReference(8)
  config = load("tiny")
  with config.ignore_type():
    config.model.width = width
    config.model.moe.experts.hidden = width * 4
  config_lib.override(config, [("config.model.width", ["16"])])
  assert config.model.moe.experts.hidden == 64


# -- what no field can hold ---------------------------------------------------

# A layout of one's own, but for some of its fields.
OWN = {"mesh_shape": (1, -1, 1)}


@pytest.mark.parametrize(
  "field, value, complaint",
  [
    ("seed", 2**32, "seed is 4294967296; give 0 or more, and less than"),
    ("seed", 1.5, r"seed is 1\.5; give it as int"),
    ("seed", True, "seed is True; give it as int"),
    ("aux", None, "config.aux is None; give it as dict"),
    ("model", (), r"config.model is \(\); give it as dict"),
    ("layout", 8, "config.layout is 8; give it as .* fsdp or dict"),
    ("train.steps", "100", "train.steps is '100'; give it as int"),
    ("model.moe.group_size", 8.0, r"group_size is 8\.0; .* int, .* or None"),
    ("model.moe.experts.hidden", (), r"hidden is \(\); give at least one"),
    ("model.moe.experts", "linear", "experts is 'linear'; give it as dict or"),
    ("model.moe.router.kind", ["top_k"], r"kind is \['top_k'\]; choose one"),
    ("aux.scope", "grop", "aux.scope is 'grop'; choose .*'group'"),
    ("aux.importance", float("nan"), "importance is nan; give 0 or more"),
    (
      "train.annealing",
      {"k": (16,), "until": (2,)},
      "k = 16 experts a token, but config.model.moe has 8; give at most",
    ),
    (
      "train.annealing",
      {"k": (4, 3), "until": (9, 9)},
      r"\(4, 3\) until the steps \(9, 9\); give .* less than the 400 of",
    ),
    (
      "train.annealing",
      {"k": (4, 3), "until": (9,)},
      r"k = \(4, 3\) until the steps \(9,\); give as many of both",
    ),
    ("optimizer.clip_norm", 0.0, r"clip_norm is 0\.0; give more than 0, or N"),
    ("optimizer.b2", 1.0, r"b2 is 1\.0; give 0 or more, and less than 1"),
    ("optimizer.eps", -1.0, r"eps is -1\.0; give more than 0"),
    ("data.vocab_size", 9, r"data.vocab_size does not exist; .*\.batch_size"),
    ("data.train", "caf\udce9", "train is 'caf.*udce9', which is not UTF-8"),
    ("model.layers", ("lstm", "mole"), r"model\.layers\[1\] is 'mole'"),
    ("model.moe.grop_size", 4, r"moe\.grop_size .*nearest is .*group_size"),
    (
      "model.moe.router",
      {"kind": "softmax", "k": 4},
      r"router\.k does not",
    ),
    ("model.moe.router", {"k": 4}, "router.kind is ''; choose one of 'softmax"),
    (
      "model.moe.router",
      {"kind": "top_k", "k": 2, "num_experts": 8},
      "num_experts does not exist",
    ),
    ("model.moe.experts", ("linear",), r"experts\[0\] is 'linear'; .* as dict"),
    (
      "model.moe.experts",
      ({"kind": "linear", "num_experts": 8.0},),
      r"experts\[0\].num_experts is 8.0; give it as int",
    ),
    (
      "model.moe.experts",
      ({"kind": "linear", "num_experts": 7},),
      r"lists 7 experts, .*num_experts is 8",
    ),
    ("layout", {"mesh_shap": (1, 1, 1)}, r"\.mesh_shap .*layout\.mesh_shape"),
    ("layout", {}, r"config\.layout\.mesh_shape is missing"),
    ("layout", {"mesh_shape": (1, -1)}, "-1.; give .* data, expert, model"),
    ("layout", {"mesh_shape": (-1, -1, 1)}, "at most one"),
    ("layout", {"mesh_shape": (0, -1, 1)}, r"is \(0, -1, 1\)"),
    ("layout", OWN | {"rules": {"exprt": None}}, r"rules\.exprt .*\.expert\."),
    ("layout", OWN | {"rules": {"mlp": ("modl",)}}, r"mlp\[0\] .* 'model'"),
    ("layout", OWN | {"rules": {"expert": 1}}, "expert is 1; give .* or list"),
  ],
)
def test_a_value_that_cannot_be_is_named(field, value, complaint):
  """A file may hold what no flag can."""
  with pytest.raises(ValueError, match=complaint):
    experiment("tiny", **{field.replace(".", "__"): value}).model(VOCABULARY)


@pytest.mark.parametrize(
  "field, value, complaint",
  [
    ("data.kind", "sotu", "kind is 'gnmt', but config.data.kind is 'sotu'"),
    ("data.vocab_size", 0, "data.vocab_size is 0; give 1 or more"),
    ("model.decoder", ("moe", "lstm"), r"decoder is \('moe', .*with 'lstm'"),
    ("model.decoder", (), r"decoder is \(\), .*begin with 'lstm'"),
    ("model.decoder", ("lstm", "bidirectional_lstm"), r"is 'bidirectional_ls"),
    ("model.encoder", ("dense",), r"encoder\[0\] is 'dense'"),
    ("model.attention.form", "prod", r"form is 'prod'.*'product'"),
    ("model.attention.wiring", "paralel", r"wiring is 'paralel'.*'parallel'"),
    ("model.attention.width", 0, r"attention\.width is 0; give 1"),
    ("model.lstm", {"hidden": 0}, r"model\.lstm\.hidden is 0; give 1 or more"),
    ("model.dropout", 1.0, r"dropout is 1\.0"),
    ("model.residual_from", 0, r"residual_from is 0; give 1 or more"),
  ],
)
def test_a_translation_model_that_cannot_be(field, value, complaint):
  changes = {field.replace(".", "__"): value}
  with pytest.raises(ValueError, match=complaint):
    experiment("translate_tiny", **changes).model(VOCABULARY)


def test_fields_say_what_they_hold_and_what_they_are():
  """In the first sentence about it in a docstring."""
  config = load("tiny")
  experts = ({"kind": "identity"}, {"kind": "feed_forward"})
  config_lib.override(config, [("config.model.moe.experts", [str(experts)])])
  fields = {field.name: field for field in config_lib.fields(config)}
  for name, (held, line) in {
    "seed": ("int, 0 or more, and less than 4294967296", "of the first"),
    "layout": ("replicated | expert | data_expert |", "name of how arrays lie"),
    "optimizer.warmup_steps": ("int", "in which the rate rises to the peak"),
    "optimizer.b1": ("float", "decay of the first moment outside the experts"),
    "model.num_samples": ("int, 0 or more", "classes of the sampled softmax;"),
    "model.layers": ("list of (lstm | moe |", "sections of layers by name"),
    "model.moe.dispatch": ("auto | einsum | gather | ragged", ""),
    "model.moe.experts[0].kind": ("feed_forward | linear", "which of these"),
    "model.moe.experts[1].hidden": ("int, 1 or more or list of (int, ", ""),
    "model.recurrent_moe.group_size": ("int, 1 or more or None", "rows of a"),
    "aux.z": ("float, 0 or more or None", "weight of Mean over tokens of"),
    "train.passes": ("int, 1 or more or None", "how often the text may be"),
  }.items():
    field = fields[f"config.{name}"]
    assert config_fields.worded(field.annotation).startswith(held), name
    assert line in field.line and "None reads" not in field.line, name
