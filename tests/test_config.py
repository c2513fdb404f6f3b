"""The configs that come with moejax: they build, as the paper has them."""

import pytest
import tokenizers
from config_shapes import (
  NAMES,
  VOCABULARY,
  experiment,
  load,
  parameters,
  parameters_of,
)

from moejax import config as config_lib
from moejax import moe, router, sharding
from moejax import slots as slots_lib
from moejax import workdir as workdir_lib
from moejax.data import pieces, vocab
from moejax.models.layers import table_rows
from moejax.training import cost


def rows_of(*folders, without=" "):
  """Configs of these folders, but for those with a word in their name."""
  names = [n for n in NAMES if n.startswith(folders) and without not in n]
  return pytest.mark.parametrize("name", names)


def model_of(name):
  return experiment(name).model(VOCABULARY)


@pytest.mark.usefixtures("standard_promotion")
@rows_of("")
def test_config_builds(name):
  twin, config = name.replace("en_de", "en_fr"), load(name)
  if twin != name:
    dropout = {"dropout": config.model.dropout}
    assert config.model.to_dict() == load(twin).model.to_dict() | dropout
    return
  tree = parameters_of(name)
  rows = table_rows(VOCABULARY, config.model.get("vocab_multiple", 1))
  others, tables, stacks = [], ["embed"], ("layers",)
  if config.model.kind == "gnmt":
    others, tables = ["attention"], ["embed_source", "embed_target"]
    stacks = ("encoder", "decoder")
  tables.append("head")
  if config.model.get("tied"):
    tables = ["head"]
  elif config.model.kind == "pair_transformer":
    tables = ["embed_source", "embed_target", "head"]
  for table in tables:
    assert tree[table]["table"].shape == (rows, config.model.width)
  if "transformer" in config.model.kind:
    names = "blocks", "encoder", "decoder"
    layers = [name for name in names if name in config.model]
  else:
    layers = [f"{s}_{i}" for s in stacks for i in range(len(config.model[s]))]
  assert sorted(tree) == sorted([*tables, *layers, *others])


def test_every_row_of_the_tables_has_a_config():
  found = {}
  for name in NAMES:
    folder, _, config = name.rpartition("/")
    found.setdefault(folder, set()).add(config)
  lstms = "lstm_512_512 lstm_1024_512 lstm_2048_512 two_lstm_8192_1024"
  dense = "four_lstm_512 moe_1_wide moe_1_deep draft_131072_linear"
  sparse = "moe_4 moe_32 moe_256 moe_256_h moe_1024_h moe_4096_h"
  sparse += " moe_34m moe_143m"
  assert found["lm1b"] == {*lstms.split(), *dense.split(), *sparse.split()}
  two_levels = (256, 1024, 4096, 16_384, 65_536, 131_072)
  assert found["news"] == {"four_lstm_512", "moe_32"} | {
    f"moe_{experts}_h" for experts in two_levels
  }
  mixtures = ("lstm", "gnmt", "moe_32", "moe_512_h", "moe_2048_h")
  assert found["wmt14"] == {
    f"{pair}_{mixture}" for pair in ("en_fr", "en_de") for mixture in mixtures
  }


# -- how they are trained -----------------------------------------------------


@rows_of("lm1b/", "news/")
def test_a_row_of_the_paper_is_trained_as_in_the_paper(name):
  config, news, draft = load(name), name.startswith("news/"), "draft" in name
  words = config.data.batch_size * config.data.row_length
  assert words == pytest.approx(2_500_000 if news else 300_000, rel=0.02)
  assert config.optimizer.warmup_steps == (200 if draft else 1000)
  assert config.optimizer.hold_steps == (200 if draft else 0)
  assert config.aux.to_dict() == {"importance": 0.1, "load": 0.1}
  assert config.data.kind == "lm1b"
  assert config.model.dtype == "float32"


# Of Table 7, where it is not 0.1.
DROPOUT = {
  "lm1b/moe_1024_h": 0.2,
  "lm1b/moe_4096_h": 0.2,
  "lm1b/two_lstm_8192_1024": 0.25,
  "lm1b/moe_34m": 0.3,
  "lm1b/moe_143m": 0.4,
}


@rows_of("lm1b/", without="draft")
def test_a_row_of_table_7_has_its_own_dropout(name):
  assert load(name).model.dropout == DROPOUT.get(name, 0.1)


@rows_of("wmt14/", "multilingual/")
def test_a_translation_of_the_paper_is_trained_as_in_the_paper(name):
  config, one_pair = load(name), name.startswith("wmt14/")
  # 64 devices of about 16,000 words.
  pieces = config.data.batch_size * config.data.row_length
  assert pieces == pytest.approx(64 * 16_000, rel=0.03)
  assert config.data.vocab_size == 32_768
  assert config.optimizer.warmup_steps == 2000
  assert config.optimizer.hold_steps == 8000
  assert config.data.kind == ("wmt14" if one_pair else "pairs")
  dropout = {"wmt14/en_fr_gnmt": 0.2, "wmt14/en_de_gnmt": 0.3}
  assert config.model.dropout == dropout.get(name, 0.4 if one_pair else 0)
  aux = {"threshold": 1.0} if one_pair else {"load": 0.01}
  dense = name.endswith(("lstm", "gnmt"))
  assert config.aux.to_dict() == ({} if dense else aux | {"importance": 0.01})


def test_balance_is_over_the_batch_where_there_is_any():
  """Models of the paper without a mixture do not run forward twice."""
  for name in NAMES:
    if name.startswith(("lm1b/", "news/", "wmt14/", "multilingual/")):
      mixed = "moe_" in name and "moe_1_" not in name or "draft" in name
      over = experiment(name).train.balance_over
      assert over == ("batch" if mixed else "microbatch"), name


def test_the_twins_have_the_same_ops_per_timestep():
  sparse, dense = experiment("sotu/moe_32"), experiment("sotu/moe_1_wide")
  router = 4_096
  dense_ops = cost.count(dense, VOCABULARY).ops
  assert cost.count(sparse, VOCABULARY).ops == dense_ops + router
  assert dense_ops == 131_072
  for section in ("data", "optimizer", "train", "aux"):
    assert sparse.values[section] == dense.values[section]


# -- where mixtures stand, and their slots ------------------------------------


@rows_of("lm1b/", "news/", without="lstm")
def test_mixtures_of_language_models_stand_between_lstms(name):
  """Sec. 5.1; in app. D experts' states and hidden layers take no room."""
  config, news = load(name), name.startswith("news/")
  first, mixture, last = config.model.layers
  assert first == last == "lstm" != mixture
  assert config.train.steps == (40_000 if news else 27_000)
  assert config.optimizer.kind == ("factored_adam" if news else "adam")
  if mixture != "one_expert":
    experts = config.model[mixture].get("secondary", config.model[mixture])
    assert experts.recompute == news


@rows_of("wmt14/en_fr_moe", "wmt14/en_de_moe", "multilingual/moe")
def test_mixtures_of_translation_stand_as_in_the_paper(name):
  """App. E: between LSTMs 2 and 3, and 1 and 2."""
  model = load(name).model
  mixture = model.decoder[1]
  assert mixture.endswith("moe") and mixture in model
  assert model.encoder == ("lstm", "lstm", mixture, "lstm")
  assert model.decoder == ("lstm", mixture, "lstm")


# Too many devices for memory that holds all rows that could come.
WITH_SLOTS = ["news/moe_65536_h", "news/moe_131072_h"]


@rows_of("lm1b/", "news/", "wmt14/", without="moe_1_")
def test_mixtures_of_the_paper_drop_nothing(name):
  """In training two levels that are strictly balanced have slots for all."""
  if name in WITH_SLOTS:
    return
  model = model_of(name)
  for layer in getattr(model, "layers", ()) or (*model.encoder, *model.decoder):
    levels = [layer] * isinstance(layer, (moe.MoE, moe.HierarchicalMoE))
    levels += [each.secondary for each in levels if hasattr(each, "secondary")]
    for level in levels:
      assert level.eval_capacity_factor is None and level.dispatch == "auto"
      strict = name.startswith("wmt14/") and len(levels) > 1
      # Of the slots that arrive at the second level two in three are taken.
      room = 1.0 if level is layer else 2 / 3
      assert level.capacity_factor == (room if strict else None)


@pytest.mark.parametrize("name", WITH_SLOTS)
def test_experts_have_the_slots_that_the_factors_ask_for(name):
  """And not many more: where all groups are routed apart, there may be."""
  layer = model_of(name).layers[1]
  inner, size = layer.secondary, layer.group_size
  together = layer.groups_together * size
  groups, experts = layer.primary.num_experts, inner.router.num_experts
  rows = slots_lib.capacity(2 * size, size, groups, layer.capacity_factor)
  rows *= layer.groups_together
  slots = slots_lib.capacity(2 * rows, rows, experts, inner.capacity_factor)
  assert 6.25 <= groups * experts * slots / together < 7.2


@pytest.mark.parametrize("name", ["moe_512_h", "moe_2048_h"])
def test_balanced_mixtures_of_two_levels_have_a_slot_for_every_edge(name):
  """In training, for what a group may have of the batch's mask."""
  layer = model_of(f"wmt14/en_fr_{name}").encoder[2]
  inner, size = layer.secondary, layer.group_size
  groups, experts = layer.primary.num_experts, inner.router.num_experts
  mean = 2 * size // groups
  room = int(layer.primary.group_factor * mean)
  assert layer.primary.over == "batch" and 2 * room == 3 * mean
  rows = slots_lib.capacity(room * groups, size, groups, layer.capacity_factor)
  assert rows == room
  # Two experts take what has arrived, which fills two in three of the slots.
  arrived, taken = layer.groups_together * rows, layer.groups_together * mean
  slots = slots_lib.capacity(
    2 * arrived, arrived, experts, inner.capacity_factor
  )
  assert slots == 2 * taken // experts


# -- what a config may have ---------------------------------------------------


@pytest.mark.parametrize(
  "name, tokenizer",
  [
    ("sotu/moe_32", vocab.Vocabulary),
    ("lm1b/moe_32", vocab.TokenizedVocabulary),
    ("wmt14/en_fr_moe_32", pieces.Pieces),
  ],
)
def test_a_run_keeps_the_tokenizer_of_its_corpus(name, tokenizer):
  built = experiment(name)
  assert (built.tokenizer, built.unit) == (tokenizer, tokenizer.UNIT)
  other = {"data__tokens": {"kind": "pieces", "vocab_size": 700}}
  other["model__num_samples"] = 0
  if name.startswith("wmt14"):
    with pytest.raises(ValueError, match="config.data.tokens does not exist"):
      experiment(name, **other)
    return
  built = experiment(name, **other)
  assert (built.tokenizer, built.unit) == (pieces.Pieces, "word piece")
  # Without any text.
  assert config_lib.vocab_size(built) == 700
  del other["model__num_samples"]
  with pytest.raises(ValueError, match="num_samples is .*num_samples=0"):
    experiment(name, **other)
  other |= {"model__num_samples": 0, "data__vocab_file": "words.txt"}
  with pytest.raises(ValueError, match="vocab_file,? "):
    experiment(name, **other)


def test_tokens_of_a_file(tmp_path):
  """Their number is known without text; a run reads its copy by the names."""
  own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "END": 1}))
  path = tmp_path / "given.json"
  own.save(str(path))
  tokens = {"kind": "file", "path": str(path), "end": "END", "vocab_size": 9}
  changes = {"model__num_samples": 0, "data__tokens": tokens}
  built = experiment("tiny", **changes)
  assert config_lib.vocab_size(built) == 9 and built.unit == "token"
  found = config_lib.open_corpus(built).vocabulary
  workdir = tmp_path / "run"
  workdir.mkdir()
  workdir_lib.remember(built.values, found, {}, workdir)
  path.unlink()
  again = config_lib.open_corpus(built, workdir).vocabulary
  assert again.digest == found.digest and (again.end, len(again)) == (1, 9)
  for tokens, message in (
    ({"kind": "file"}, "config.data.tokens.path is missing"),
    ({"kind": "file", "path": str(path)}, "given.json"),
    ({"kind": "pieces"}, "config.data.tokens.vocab_size is missing"),
    ({"kind": "letters"}, "'words', 'pieces', 'file'"),
  ):
    with pytest.raises((ValueError, OSError), match=message):
      changes["data__tokens"] = tokens
      config_lib.vocab_size(experiment("tiny", **changes))


def test_a_layout_of_ones_own_starts_from_the_shared_rules(tmp_path):
  rules = {"group": ("data", "expert"), "expert": None}
  own = {"name": "mine", "mesh_shape": (2, -1, 1), "rules": rules}
  built = experiment("tiny", layout=own)
  layout = built.layout
  assert layout.name == "mine" and layout.mesh_shape == (2, -1, 1)
  sent = dict.fromkeys(("group_dispatched", "group_replicated"), rules["group"])
  assert dict(layout.rules) == sharding.RULES | rules | sent
  # The config of a run is read from JSON, which has no tuples.
  words = vocab.Vocabulary.build(["a a"], 1)
  workdir_lib.remember(built.values, words, {}, tmp_path)
  workdir_lib.check_same(built.values, tmp_path)
  assert config_lib.parse(workdir_lib.recall(tmp_path)).layout == layout
  # Without changes they are those of the known layouts.
  layout = experiment("tiny", layout={"mesh_shape": (1, -1, 2)}).layout
  assert layout.name == "own"
  assert layout.rules == sharding.LAYOUTS["expert_model"].rules


def test_two_levels_share_the_experts():
  """Of 256 each of 16 groups has 16; sizes that do not multiply name both."""
  mixture = parameters_of("lm1b/moe_256_h")["layers_1"]
  assert mixture["primary"]["gate"]["kernel"].shape == (512, 16)
  assert mixture["secondary"]["experts"]["w_in"].shape == (16, 16, 512, 1024)
  three = {"model__hierarchical_moe__num_groups": 3}
  with pytest.raises(ValueError, match=r"3 groups do not divide 256 experts"):
    experiment("lm1b/moe_256_h", **three).model(VOCABULARY)


def test_a_list_of_experts_is_a_mixed_layer():
  kind = {"kind": "feed_forward", "hidden": 8}
  experts = (
    kind | {"num_experts": 4, "hidden": 16},
    kind | {"num_experts": 2, "activation": "gelu"},
    {"kind": "identity", "num_experts": 2},
  )
  built = experiment("tiny", model__moe__experts=experts)
  experts = parameters(built)["layers_1"]["experts"]
  assert experts["kinds_0"]["w_in"].shape == (4, 32, 16)
  assert experts["kinds_1"]["w_in"].shape == (2, 32, 8)


@pytest.mark.parametrize(
  "name, section",
  [("tiny", "moe"), ("lm1b/moe_256_h", "hierarchical_moe")],
)
def test_a_section_of_shared_experts(name, section):
  shared = {"kind": "feed_forward", "num_experts": 2, "hidden": 8}
  changes = {f"model__{section}__shared": shared}
  mixture = parameters(experiment(name, **changes))["layers_1"]
  width = mixture["shared"]["w_in"].shape[1]
  assert mixture["shared"]["w_in"].shape == (1, width, 16)
  assert "shared" not in parameters(experiment(name))["layers_1"]
  del shared["num_experts"]
  with pytest.raises(ValueError, match=r"shared\.num_experts is missing"):
    experiment(name, **changes).model(VOCABULARY)


@pytest.mark.parametrize(
  "kind, other", [("balanced", "threshold"), ("sigmoid", "bias")]
)
def test_what_is_learned_by_quantiles(kind, other):
  section = {"kind": kind, "k": 2, "learned_by": "quantile"}
  built = experiment("tiny", model__moe__router=section, aux={"quantile": 1.0})
  assert built.aux_weights == {"quantile": 1.0}
  params = parameters(built)["layers_1"]["router"]
  assert params.keys() & router.AVERAGES and len(params) == 2
  with pytest.raises(ValueError, match=r"'quantile' has weight 1\.5, but"):
    experiment("tiny", aux={"quantile": 1.5})
  section["learned_by"] = "average"
  with pytest.raises(ValueError, match=f"'average'; .*'{other}', 'quantile'"):
    experiment("tiny", model__moe__router=section).model(VOCABULARY)


@pytest.mark.parametrize("field", ["config.data", "config.data.kind"])
def test_news_reads_any_text_and_that_once(field):
  """Another kind leaves behind the fields that it has not."""
  config = load("news/moe_32")
  changes = [("config.data.train", ["a.txt"]), (field, ["text"])]
  config_lib.override(config, changes)
  built = config_lib.parse(config)
  fields = {"kind", "train", "test", "data_dir", "row_length", "batch_size"}
  assert set(config.data) == fields
  assert built.train.passes == 1 and built.batch_size == 19_456
