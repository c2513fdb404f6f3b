"""Models of transformers: read, written, and computed as it computes them."""

import json
import re
import tracemalloc

import browser
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import moejax
from moejax import config as config_lib
from moejax import config_fields, huggingface, losses, routing, sharding
from moejax.main import main
from moejax.models.build import MODELS
from moejax.moe import ROUTING
from moejax.training import metrics, run, sample

pytestmark = pytest.mark.usefixtures("standard_promotion", "few_sizes")

V, D, B, L, M = 41, 32, 2, 7, 5
BASE = {
  "vocab_size": V,
  "hidden_size": D,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "hidden_act": "silu",
  "max_position_embeddings": 16,
  "rope_theta": 1e4,
}
EPS, MOE = {"rms_norm_eps": 1e-5}, {"num_experts_per_tok": 2}
# config.json of each family, as older versions and vLLM read it.
CONFIGS = {
  "llama": BASE | EPS | {"tie_word_embeddings": True},
  "mixtral": BASE | EPS | MOE | {"num_local_experts": 8},
  "olmo": BASE,
  "olmoe": BASE | EPS | MOE | {"num_experts": 8, "num_key_value_heads": 4},
  "qwen3": BASE | EPS | {"head_dim": 16},
  "qwen3_moe": BASE
  | EPS
  | MOE
  | {
    "num_hidden_layers": 3,
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
  },
  "switch_transformers": {
    "vocab_size": V,
    "d_model": D,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_experts": 8,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "encoder_sparse_step": 3,
    "decoder_sparse_step": 2,
    "expert_capacity": 64,
    "layer_norm_epsilon": 1e-6,
  },
}
CONFIGS = {kind: {"model_type": kind} | hf for kind, hf in CONFIGS.items()}
SAVED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def batch_of(kind, rng):
  """A batch of one sentence, or pair, a row."""
  start = np.arange(L)[None] == np.zeros((B, 1), int)
  ids = rng.integers(1, V, (B, L + 1)).astype(np.int32)
  batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "start": start}
  batch["mask"] = np.ones((B, L), bool)
  if kind == "switch_transformers":
    batch["segment"] = np.ones((B, L), np.int32)
    batch["source"] = rng.integers(1, V, (B, M)).astype(np.int32)
    batch["source_segment"] = np.ones((B, M), np.int32)
    batch["source_start"] = start[:, :M]
  return jax.tree.map(jnp.asarray, batch)


def model_of(kind, section, size=V):
  """A model, and the shapes of its parameters by path."""
  model = config_fields.build(MODELS, section, "config.model", vocab_size=size)
  batch = batch_of(kind, np.random.default_rng(0))
  abstract = jax.eval_shape(
    lambda: model.init(jax.random.key(0), batch, method="loss")
  )
  shapes = sharding.unbox(abstract)["params"]
  return model, flatten_dict(shapes, sep="/")


def built(hf):
  """The family, model and shapes that a config.json describes."""
  kind, section = huggingface.read_config(hf)
  return kind, *model_of(kind, section, hf["vocab_size"])


def write(folder, hf, dtype="float32", changes=None):
  """Writes a made-up model of a family; its tensors by our tables."""
  folder.mkdir()
  kind, model, shapes = built(hf)
  rng, tensors = np.random.default_rng(1), {}
  for path, names in huggingface.places(kind, model, shapes).items():
    shape = shapes[path].shape[names.ndim :]
    turned = path.endswith("kernel") or "/w_" in path
    for name in names.flat:
      value = rng.normal(size=shape[:: -1 if turned else 1])
      tensors[name] = value.astype(SAVED[dtype])
  tensors |= changes or {}
  tensors = {n: t for n, t in tensors.items() if t is not None}
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  (folder / "config.json").write_text(json.dumps(hf))
  return tensors


def read(folder):
  """Our model with parameters that lie in a folder."""
  hf = json.loads((folder / "config.json").read_text())
  kind, model, shapes = built(hf)
  places = huggingface.places(kind, model, shapes)
  source = huggingface._Source(folder, places)
  params = {
    path: jnp.asarray(source.read(path, leaf.shape, (slice(None),) * leaf.ndim))
    for path, leaf in shapes.items()
  }
  return model, unflatten_dict(params, sep="/")


def call(command, *flags, **named):
  """Runs a command; returns its status."""
  named = [f"--{name.strip('_')}={value}" for name, value in named.items()]
  return main(["moejax", command, *named, *flags])


# -- files, without transformers ----------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_import_then_export_gives_every_tensor_back(
  kind, tmp_path, monkeypatch
):
  """Bit by bit, in several files; each of eight devices reads its own part."""
  dtype = "float32" if kind in ("llama", "mixtral", "olmo") else "bfloat16"
  monkeypatch.setattr(huggingface, "_FILE_BYTES", 20_000)
  plain_read, counts = huggingface._Source.read, []

  def counted(*of):
    part = plain_read(*of)
    counts.append(part.size)
    return part

  monkeypatch.setattr(huggingface._Source, "read", counted)
  theirs, back = tmp_path / "theirs", tmp_path / "back"
  run = tmp_path / "run"
  tensors = write(theirs, CONFIGS[kind], dtype)
  assert call("import", from_=theirs, workdir=run) == 0
  # All have the vectors, and the routers.
  whole = [t.size for t in tensors.values() if t.size > 8 * D]
  shared = [t.size for t in tensors.values() if t.size <= 8 * D]
  assert sum(counts) <= sum(whole) + 8 * sum(shared)
  assert call("export", workdir=run, to=back, dtype=dtype) == 0
  found = {}
  index = json.loads((back / "model.safetensors.index.json").read_text())
  for name in {*index["weight_map"].values()}:
    found |= load_file(back / name)
  assert found.keys() == tensors.keys() == index["weight_map"].keys()
  for name, tensor in tensors.items():
    assert found[name].dtype == tensor.dtype
    assert found[name].tobytes() == tensor.tobytes(), name
  hf = json.loads((back / "config.json").read_text())
  (own, section), (_, given) = map(huggingface.read_config, (hf, CONFIGS[kind]))
  assert own == kind
  assert huggingface.facts_of(section) == huggingface.facts_of(given)
  loaded = moejax.load(str(run))
  assert loaded.tokenizer is None
  assert jax.tree.leaves(loaded.params)[0].dtype == np.float32


def test_a_part_of_a_parameter_reads_that_part_alone(tmp_path):
  """What a device holds is all that is read for it."""
  hf = CONFIGS["mixtral"] | {"intermediate_size": 4096, "num_hidden_layers": 1}
  write(tmp_path / "theirs", hf)
  kind, model, shapes = built(hf)
  places = huggingface.places(kind, model, shapes)
  source = huggingface._Source(tmp_path / "theirs", places)
  path = "blocks/layers_0/block_0/feed_forward/experts/w_in"
  shape = (8, D, 4096)
  whole = source.read(path, shape, (slice(None),) * 3)
  index = slice(2, 4), slice(None), slice(1024, 2048)
  tracemalloc.start()
  part = source.read(path, shape, index)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  np.testing.assert_array_equal(part, whole[index])
  assert part.nbytes < peak < 2.1 * part.nbytes < whole.nbytes / 4


def test_layers_that_repeat_lie_where_single_ones_do():
  """A scanned model is exported as the same model layer by layer."""
  hf = CONFIGS["qwen3_moe"] | {"num_hidden_layers": 6, "mlp_only_layers": [0]}
  kind, section = huggingface.read_config(hf)
  facts = huggingface.facts_of(section)
  assert facts["blocks.layers"] == ("dense", "moe") * 3
  section["blocks"] |= {"scan": True, "pattern": ("dense", "moe")}
  assert huggingface.facts_of(section) == facts
  _, model, shapes = built(hf)
  single = huggingface.places(kind, model, shapes)
  model, shapes = model_of(kind, section)
  for path, names in huggingface.places(kind, model, shapes).items():
    for repeat in range(3 if "/layers/" in path else 0):
      number = 2 * repeat + int(path.split("/block_")[1][0])
      own = path.replace("/layers/", f"/layers_{number}/")
      own = own.replace("block_1", "block_0")
      np.testing.assert_array_equal(names[repeat], single[own])


LAST = "model.norm.weight"


@pytest.mark.parametrize(
  "hf, changes, complaint",
  [
    ({"model_type": "gpt2"}, {}, "'gpt2'.*it reads llama, mixtral, olmo"),
    ({}, {LAST: None}, f"1 missing: {LAST}"),
    ({}, {"extra.weight": np.ones(2, np.float32)}, "1 too many: extra.weight"),
    ({"hidden_size": 64}, {}, r"is \(.*32.*\), by config.json \(.*64"),
    ({"attention_bias": True}, {}, "attention_bias True, but of llama"),
    ({"sliding_window": 8}, {}, "sliding_window 8"),
    ({"rope_scaling": {"rope_type": "llama3"}}, {}, "rope_type 'llama3', but"),
    ({"rms_norm_eps": None}, {}, "no rms_norm_eps"),
    ({}, {LAST: np.ones(D, np.int8)}, "is I8, and F32, BF16, F16 are read"),
  ],
)
def test_what_is_no_model_of_ours_is_named(
  hf, changes, complaint, tmp_path, capsys
):
  theirs, workdir = tmp_path / "theirs", tmp_path / "run"
  write(theirs, CONFIGS["llama"], changes=changes)
  (theirs / "config.json").write_text(json.dumps(CONFIGS["llama"] | hf))
  assert call("import", from_=theirs, workdir=workdir) == 1
  (said,) = capsys.readouterr().err.splitlines()
  assert re.search(complaint, said), said
  assert not workdir.exists()


def test_files_that_are_cut_or_gone_or_in_the_way(tmp_path, capsys):
  """Each is told in one sentence, and nothing is written."""
  theirs, workdir = tmp_path / "theirs", tmp_path / "run"

  def said(command="import", **flags):
    flags = flags or {"from_": theirs}
    assert call(command, **flags, workdir=workdir) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line

  assert "no such folder" in said()
  write(theirs, CONFIGS["llama"])
  weights = theirs / "model.safetensors"
  content = weights.read_bytes()
  weights.write_bytes(content[:-10])
  assert "is missing or cut short" in said()
  weights.unlink()
  assert "model.safetensors is missing or" in said()
  index = {"weight_map": {LAST: "model-1.safetensors"}}
  (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
  assert "model-1.safetensors is missing or" in said()
  assert not workdir.exists()
  (theirs / "model.safetensors.index.json").unlink()
  weights.write_bytes(content)
  assert call("import", from_=theirs, workdir=workdir) == 0
  capsys.readouterr()
  assert "holds a run already" in said()
  assert "is there and not empty" in said("export", to=theirs)
  assert "a folder without tokenizer.json" in said("sample", prompt="a")


@pytest.mark.parametrize(
  "changes, complaint",
  [
    (
      {"blocks.moe.experts.gated": False},
      "config.model.blocks.moe.experts.gated False in place of True of mixtral",
    ),
    ({"blocks.norm": "layer"}, "norm 'layer' in place of 'rms'"),
    ({"blocks.moe.router": {"kind": "balanced", "k": 2}}, "kind 'balanced' in"),
    ({"blocks.moe.shared": {"kind": "identity"}}, "shared.kind 'identity' in"),
    ({"blocks.first": ["dense"], "blocks.dense": {"kind": "linear"}}, "linear"),
    ({"blocks.attention": {"kind": "latent", "num_heads": 4}}, "'latent' in"),
    # The same function, in other words; or that of another family.
    ({"blocks.moe.router": {"kind": "noisy_top_k", "k": 2}}, "mixtral"),
    ({"blocks.attention.qk_norm": "head"}, "qwen3_moe"),
    ({"blocks.scan": True, "blocks.moe.experts.hidden": [48]}, "mixtral"),
    # What concerns training alone, or how rows move.
    ({"blocks.moe.masked_outputs": 0.2}, "mixtral"),
    ({"blocks.moe.exchange_parts": 2}, "mixtral"),
    ({"blocks.moe.experts.init_scale": 0.1}, "mixtral"),
  ],
)
def test_families_have_their_models_and_no_others(changes, complaint):
  """It is told which part does not fit."""
  _, section = huggingface.read_config(CONFIGS["mixtral"])
  for name, value in changes.items():
    config_fields.set_field(section, f"model.{name}", value)
  facts = huggingface.facts_of(section)
  if " " in complaint or complaint == "linear":
    with pytest.raises(ValueError, match=complaint):
      huggingface.family_of(facts)
  else:
    assert huggingface.family_of(facts)["model_type"] == complaint


def test_other_models_stay_workdirs(whole, tmp_path):
  with pytest.raises(ValueError, match="config.model.kind 'lstm_lm': no fam"):
    huggingface.export_model(whole[0], tmp_path / "to")
  assert not (tmp_path / "to").exists()


def test_rows_that_pad_a_table_are_no_words(tmp_path, monkeypatch):
  kind, section = huggingface.read_config(CONFIGS["llama"])
  model, shapes = model_of(kind, section | {"vocab_multiple": 8})
  params = {path: jnp.ones(leaf.shape) for path, leaf in shapes.items()}
  values = {"model": section, "data": {"row_length": 8}}
  loaded = run.Loaded(model, unflatten_dict(params, sep="/"), None, values)
  monkeypatch.setattr(
    run, "recall", lambda _: config_lib.Experiment(values, *[None] * 10)
  )
  monkeypatch.setattr(run, "load", lambda _: loaded)
  huggingface.export_model(tmp_path / "run", tmp_path / "to")
  tensors = load_file(tmp_path / "to" / "model.safetensors")
  assert tensors["model.embed_tokens.weight"].shape == (V, D)
  hf = json.loads((tmp_path / "to" / "config.json").read_text())
  assert hf["vocab_size"] == V and hf["max_position_embeddings"] == 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """An OLMoE that was imported, trained on and exported; where it lies."""
  folder = tmp_path_factory.mktemp("trained")
  letters = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
  tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
  tokenizer.add_special_tokens(letters[:1])
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  hf = CONFIGS["olmoe"] | {"vocab_size": len(letters), "eos_token_id": 0}
  write(folder / "theirs", hf)
  tokenizer.save(str(folder / "theirs" / "tokenizer.json"))
  (folder / "text").write_text("one two three four five six\n" * 300)
  flags = [
    "layout=replicated",
    "optimizer.peak=0.01",
    "optimizer.warmup_steps=1",
  ]
  flags = [f"--config.{flag}" for flag in flags]
  run = folder / "run"
  assert call("import", *flags, from_=folder / "theirs", workdir=run) == 0
  assert train(folder, folder / "text") == 0
  assert call("export", workdir=run, to=folder / "to") == 0
  return folder


def train(folder, text):
  run = folder / "run"
  flags = [
    f"data.train={text}",
    f"data.data_dir={folder}/data",
    "train.steps=3",
  ]
  flags = [f"--config.{flag}" for flag in flags]
  return call("train", *flags, config=run / "config.json", workdir=run)


def test_an_imported_model_is_reported(trained):
  """By its own tokens, of a text that it was not made with."""
  to, text = trained / "report.html", trained / "text"
  flags = ["--without=2", "--sentences=3"]
  run = trained / "run"
  assert call("report", *flags, workdir=run, data=text, out=to) == 0
  (told,) = json.loads(to.with_suffix(".json").read_text())["runs"]
  assert [layer["experts"] for layer in told["layers"]] == [8, 8]
  assert "".join(told["text"]["target"][0]).count("one▁two") == 1
  for layer in told["layers"]:
    # Every token visits two.
    assert layer["edges"] == 2 * layer["tokens"] == 2 * told["tokens"]
    assert sum(row["load"] for row in layer["by_expert"]) == layer["edges"]
  if browser.CHROMIUM:
    plain, cells = browser.text_of(browser.opened(to, trained, "#layer=1"))
    assert str(run) in plain and browser.shown(layer["balance"]["load"]["cv"])
    assert browser.shown(layer["balance"]["load"]["cv"]) in cells


def test_an_imported_model_is_trained_on(trained, capsys):
  """From what was imported, by a fresh optimizer; its text is then its own."""
  folder, run = trained, trained / "run"
  *_, line = metrics.read(run / "metrics.jsonl")
  assert line["split"] == "test" and line["step"] == 3
  loaded = moejax.load(str(run))
  assert loaded.tokenizer.decode(loaded.tokenizer.encode("six")) == "six"
  _, params = read(folder / "to")
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
  before = load_file(folder / "theirs" / "model.safetensors")
  after = load_file(folder / "to" / "model.safetensors")
  moved = {name: np.abs(after[name] - before[name]).max() for name in before}
  # As far as three steps of Adam lead at this rate.
  assert max(moved.values()) < 0.1
  assert moved["lm_head.weight"] > 0.005
  assert (folder / "to" / "tokenizer.json").exists()
  (folder / "other").write_text("another text\n" * 300)
  assert train(folder, folder / "other") == 1
  assert "has changed since the run" in capsys.readouterr().err
  assert call("sample", workdir=run, prompt="one", length=9) == 0
  assert capsys.readouterr().out.startswith("one")


def test_a_pruned_import_keeps_what_its_family_has(trained):
  pruned, to = trained / "pruned", trained / "pruned_to"
  assert call("prune", from_=trained / "run", workdir=pruned, experts=4) == 0
  assert call("export", workdir=pruned, to=to) == 0
  before, after = (
    json.loads((trained / name / "config.json").read_text())
    for name in ("to", "pruned_to")
  )
  assert after == before | {"num_experts": 4}
  files = {path.name for path in to.iterdir()}
  assert files == {path.name for path in (trained / "to").iterdir()}


# -- beside transformers ------------------------------------------------------


def auto(kind):
  transformers = pytest.importorskip("transformers")
  if kind == "switch_transformers":
    return transformers.AutoModelForSeq2SeqLM
  return transformers.AutoModelForCausalLM


@pytest.fixture(scope="module", params=CONFIGS)
def both(request, tmp_path_factory):
  """A random model of theirs, and ours with its parameters; where it lies."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  transformers.logging.set_verbosity_error()
  folder, kind = tmp_path_factory.mktemp(request.param), request.param
  torch.manual_seed(0)
  torch.set_num_threads(1)
  hf = {n: v for n, v in CONFIGS[kind].items() if n != "model_type"}
  config = transformers.AutoConfig.for_model(kind, **hf)
  theirs = auto(kind).from_config(config).eval()
  # T5's logits are not scaled down, and its weights are larger at first.
  scale = 1 if kind == "switch_transformers" else 3
  with torch.no_grad():
    for name, p in theirs.named_parameters():
      # Away from ones, and from logits that nearly tie.
      p.add_(0.1 * torch.randn_like(p)) if "norm" in name else p.mul_(scale)
  theirs.save_pretrained(folder)
  return kind, theirs, folder, *read(folder)


def of_theirs(kind, theirs, batch):
  torch = pytest.importorskip("torch")
  ids = torch.tensor(np.array(batch["inputs"])).long()
  if kind != "switch_transformers":
    return theirs(ids).logits
  source = torch.tensor(np.array(batch["source"])).long()
  return theirs(input_ids=source, decoder_input_ids=ids).logits


def test_logits_and_gradients_are_theirs(both, tmp_path):
  """Of a loss, by every parameter, read from where they would save them."""
  torch = pytest.importorskip("torch")
  kind, theirs, _, model, params = both
  batch = batch_of(kind, np.random.default_rng(2))

  def loss(params):
    h = model.apply({"params": params}, batch)
    logits = model.apply(
      {"params": params}, h, method=lambda m, h: m.head.logits(h)
    )
    log_p = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)
    return -chosen.mean(), logits

  (_, logits), ours = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  want = of_theirs(kind, theirs, batch)
  np.testing.assert_allclose(logits, want.detach(), atol=1e-4)
  assert np.abs(np.asarray(logits)).max() > 0.1
  targets = torch.tensor(np.array(batch["targets"])).long().flatten()
  theirs.zero_grad()
  torch.nn.functional.cross_entropy(want.flatten(0, 1), targets).backward()
  gradients = {n: p.grad for n, p in theirs.named_parameters()}
  for name, value in theirs.state_dict().items():
    if gradients.get(name) is None:
      gradients[name] = torch.zeros_like(value)
  theirs.save_pretrained(tmp_path, state_dict=gradients)
  _, wanted = read(tmp_path)
  ours = flatten_dict(ours, sep="/")
  wanted = flatten_dict(wanted, sep="/")
  for path, gradient in ours.items():
    largest = float(jnp.abs(wanted[path]).max())
    np.testing.assert_allclose(
      gradient, wanted[path], atol=5e-5 * largest, rtol=1e-3, err_msg=path
    )


def test_tokens_visit_the_same_experts(both):
  """By the logits of their routers; and their gates are the same."""
  torch = pytest.importorskip("torch")
  kind, theirs, _, model, params = both
  if kind in ("llama", "olmo", "qwen3", "switch_transformers"):
    pytest.skip("no routers whose logits come out")
  batch = batch_of(kind, np.random.default_rng(3))
  _, sown = jax.jit(
    lambda batch: model.apply({"params": params}, batch, mutable=[ROUTING])
  )(batch)
  paths = sorted(flatten_dict(sown[ROUTING], sep="/").items())
  found = losses.routings([value for _, value in paths])
  out = theirs(
    torch.tensor(np.array(batch["inputs"])).long(), output_router_logits=True
  )
  theirs = [each for each in out.router_logits if each is not None]
  for mine, logits in zip(found, theirs, strict=True):
    p = torch.softmax(logits.detach().float(), -1)
    gate, expert = torch.topk(p, 2)
    if kind != "olmoe":
      gate = gate / gate.sum(-1, keepdim=True)
    ours, wanted = np.zeros((2, *p.shape), np.float32)
    # All first choices come before all second ones.
    edges = routing.flatten_groups(routing.edges(mine), 1)
    chosen, gates = (a.reshape(2, -1).T for a in (edges.expert, edges.gate))
    np.put_along_axis(ours, np.asarray(chosen), np.asarray(gates), -1)
    np.put_along_axis(wanted, expert.numpy(), gate.numpy(), -1)
    np.testing.assert_array_equal(ours > 0, wanted > 0)
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_sampling_the_likeliest_token_is_their_generate(both):
  torch = pytest.importorskip("torch")
  kind, theirs, _, model, params = both
  if kind == "switch_transformers":
    batch = batch_of(kind, np.random.default_rng(4))
    source = torch.tensor(np.array(batch["source"])).long()
    options = {"max_new_tokens": 6, "do_sample": False}
    want = theirs.generate(source, **options, decoder_start_token_id=0)
    ids = batch["source"], batch["source_segment"], batch["source_start"]
    model = model.for_decoding()
    memory = jax.jit(
      lambda *source: model.apply({"params": params}, *source, method="encode")
    )(*ids)
    step = jax.jit(
      lambda *read: model.apply({"params": params}, *read, method="step")
    )
    state, token, written = model.begin(B, 6), jnp.zeros(B, jnp.int32), []
    for _ in range(6):
      state, log_p, _ = step(memory, state, token)
      token = jnp.argmax(log_p, -1).astype(jnp.int32)
      written.append(token)
    ended = theirs.config.eos_token_id
    for mine, other in zip(np.stack(written, 1), want[:, 1:], strict=True):
      if ended not in mine:  # Theirs may not end so early.
        assert mine.tolist() == other.tolist()
    return
  prompt = [3, 5, 8]
  want = theirs.generate(
    torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None
  )
  layout = sharding.LAYOUTS["replicated"]
  mesh = sharding.make_mesh(layout, jax.devices()[:1])
  sampler = sample.Sampler(model.for_decoding(), layout, mesh, temperature=0.0)
  texts = sampler.texts(params, prompt, 8, -1, 0)
  text = [token.id for token in next(texts)]
  assert text[-8:] == want[0].tolist()[1:]


def test_transformers_reads_what_we_export(both, tmp_path):
  """The same function, in a folder that ours alone has written."""
  kind, theirs, folder, *_ = both
  to, run = tmp_path / "to", tmp_path / "run"
  assert call("import", from_=folder, workdir=run) == 0
  # As of a model that was trained here.
  (run / "hugging_face" / "config.json").unlink()
  assert call("export", workdir=run, to=to) == 0
  with (
    safe_open(folder / "model.safetensors", "np") as before,
    safe_open(to / "model.safetensors", "np") as after,
  ):
    assert {*before.keys()} == {*after.keys()}
  batch = batch_of(kind, np.random.default_rng(5))
  again = auto(kind).from_pretrained(to).eval()
  np.testing.assert_array_equal(
    of_theirs(kind, again, batch).detach(),
    of_theirs(kind, theirs, batch).detach(),
  )


def test_transformers_computes_what_was_trained_here(trained):
  theirs = auto("olmoe").from_pretrained(trained / "to").eval()
  loaded = moejax.load(str(trained / "run"))
  batch = batch_of("olmoe", np.random.default_rng(6))
  logits = loaded.model.apply(
    {"params": loaded.params},
    batch,
    method=lambda m, batch: m.head.logits(m(batch)),
  )
  want = of_theirs("olmoe", theirs, batch).detach()
  np.testing.assert_allclose(logits, want, atol=1e-4)
