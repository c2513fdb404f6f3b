"""Models of Hugging Face's `transformers`: into a workdir, and out of one.

A family is a table, of fields of its config.json and of names of its tensors
beside ours, which is read in both directions: what is exported again is, bit by
bit, what was imported. Their matrices are [out, in], ours [in, out].
"""

import contextlib
import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from moejax import config as config_lib
from moejax import config_fields, terminal
from moejax import files as files_lib
from moejax import workdir as workdir_lib
from moejax.config_fields import EMPTY
from moejax.data.tokenizer_file import TokenizerFile
from moejax.models.build import MODELS
from moejax.training import processes, run, session
from moejax.training.checkpoint import Checkpoints
from moejax.training.state import TrainState

# Fields of a config's section `model` by their paths, "blocks.norm": all that
# decide what a model computes in evaluation, in one spelling. In tables * is
# every stack of blocks; "*.layers" is which kind of layer each block has.
Facts = dict[str, Any]
_READ = "F32", "BF16", "F16"
_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
# Of a large model a file has no more, and no more is in memory twice.
_FILE_BYTES = 2**30
# Copies of tied tables, and constants, that some files have.
_SPARE = re.compile(
  r"(encoder|decoder)\.embed_tokens\.weight|.*\.rotary_emb\.inv_freq"
)

# -- families -----------------------------------------------------------------


_FIELDS = {
  "hidden_size": "width",
  "tie_word_embeddings": "tied",
  "num_attention_heads": "*.attention.num_heads",
  "num_key_value_heads": "*.attention.num_kv_heads",
  "rope_theta": "*.attention.rotary_base",
}
_NORM = {"rms_norm_eps": "*.epsilon *.attention.epsilon"}
_HEAD = {"head_dim": "*.attention.head_dim"}
_DENSE = {"intermediate_size": "*.dense.hidden"}
_EXPERT = {"intermediate_size": "*.moe.experts.hidden"}
_CHOSEN = {"num_experts_per_tok": "*.moe.router.k"}
_MOE = _CHOSEN | {
  "num_experts": "*.moe.num_experts",
  "norm_topk_prob": "*.moe.router.normalized",
}
_FIXED = {
  "kind": "transformer",
  "*.norm": "rms",
  "*.position": "rotary",
  "*.attention.kind": "multi_head",
  "*.attention.qk_norm": "none",
  "*.dense.kind *.moe.experts.kind": "feed_forward",
  "*.dense.gated *.moe.experts.gated": True,
  "*.dense.activation *.moe.experts.activation": "silu",
  "*.moe.router.kind": "softmax_top_k",
  # `transformers` drops no token; then groups change nothing, of any size.
  "*.moe.capacity_factor *.moe.eval_capacity_factor": None,
  "*.moe.group_size": 1,
}
_WANTED = {
  "hidden_act": "silu",
  "attention_bias": False,
  "sliding_window": None,
  "rope_type": "default",
}
_NAMES = {
  "embed/table": "model.embed_tokens.weight",
  "head/table": "lm_head.weight",
  "blocks/norm_out/scale": "model.norm.weight",
} | {
  f"blocks/{ours}": f"model.layers.{{0}}.{theirs}.weight"
  for ours, theirs in {
    "norm_1/scale": "input_layernorm",
    "norm_2/scale": "post_attention_layernorm",
    "attention/w_query": "self_attn.q_proj",
    "attention/w_key": "self_attn.k_proj",
    "attention/w_value": "self_attn.v_proj",
    "attention/w_out": "self_attn.o_proj",
    "attention/norm_query/scale": "self_attn.q_norm",
    "attention/norm_key/scale": "self_attn.k_norm",
    "dense/w_in": "mlp.gate_proj",
    "dense/w_gate": "mlp.up_proj",
    "dense/w_out": "mlp.down_proj",
    "moe/router/gate/kernel": "mlp.gate",
    "moe/experts/w_in": "mlp.experts.{1}.gate_proj",
    "moe/experts/w_gate": "mlp.experts.{1}.up_proj",
    "moe/experts/w_out": "mlp.experts.{1}.down_proj",
  }.items()
}
_MIXTRAL = {
  f"blocks/moe/{ours}": f"model.layers.{{0}}.block_sparse_moe.{theirs}.weight"
  for ours, theirs in {
    "router/gate/kernel": "gate",
    "experts/w_in": "experts.{1}.w1",
    "experts/w_gate": "experts.{1}.w3",
    "experts/w_out": "experts.{1}.w2",
  }.items()
}
_SWITCH = {"head/table": "shared.weight"}
for _side, _last in (("encoder", 1), ("decoder", 2)):
  _layer = f"{_side}.block.{{0}}.layer"
  _mlp, _first = f"{_layer}.{_last}.mlp", f"{_side}.block.0.layer.0"
  _own = {
    "norm_out/scale": f"{_side}.final_layer_norm",
    "distances": f"{_first}.SelfAttention.relative_attention_bias",
    "norm_1/scale": f"{_layer}.0.layer_norm",
    "norm_source/scale": f"{_layer}.1.layer_norm",
    "norm_2/scale": f"{_layer}.{_last}.layer_norm",
    "dense/w_in": f"{_mlp}.wi",
    "dense/w_out": f"{_mlp}.wo",
    "moe/router/gate/kernel": f"{_mlp}.router.classifier",
    "moe/experts/w_in": f"{_mlp}.experts.expert_{{1}}.wi",
    "moe/experts/w_out": f"{_mlp}.experts.expert_{{1}}.wo",
  }
  for _w in ("query", "key", "value", "out"):
    _letter = _w[0].replace("u", "o")
    _own[f"attention/w_{_w}"] = f"{_layer}.0.SelfAttention.{_letter}"
    _own[f"source_attention/w_{_w}"] = f"{_layer}.1.EncDecAttention.{_letter}"
  _SWITCH |= {f"{_side}/{n}": f"{theirs}.weight" for n, theirs in _own.items()}


class Family(NamedTuple):
  """How `transformers` writes one kind of model.

  Attributes:
    architecture: its class there.
    fields: of config.json -> paths of the facts that it gives.
    fixed: paths -> facts that are so in all models of the family.
    wanted: fields of config.json -> the only value that is computed here.
    names: our parameter -> their tensor; {0} is the block, {1} the expert.
    sparse: which blocks have mixtures: "none", "all", or by "steps".
  """

  architecture: str
  fields: Mapping[str, str]
  fixed: Mapping[str, Any] = _FIXED
  wanted: Mapping[str, Any] = _WANTED
  names: Mapping[str, str] = _NAMES
  sparse: str = "none"


# By config.json's `model_type`.
FAMILIES = {
  "llama": Family(
    "LlamaForCausalLM",
    _FIELDS | _NORM | _HEAD | _DENSE,
    wanted=_WANTED | {"mlp_bias": False},
  ),
  "mixtral": Family(
    "MixtralForCausalLM",
    _FIELDS
    | {**_NORM, **_HEAD, **_EXPERT, **_CHOSEN}
    | {"num_local_experts": "*.moe.num_experts"},
    _FIXED | {"*.moe.router.normalized": True},
    names=_NAMES | _MIXTRAL,
    sparse="all",
  ),
  "olmo": Family(
    "OlmoForCausalLM",
    _FIELDS | _DENSE,
    _FIXED | {"*.norm": "plain_layer", "*.epsilon": 1e-5},
    _WANTED | {"clip_qkv": None},
  ),
  "olmoe": Family(
    "OlmoeForCausalLM",
    _FIELDS | _NORM | _MOE | _EXPERT,
    _FIXED | {"*.attention.qk_norm": "width"},
    _WANTED | {"clip_qkv": None},
    sparse="all",
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    _FIELDS | _NORM | _HEAD | _DENSE,
    _FIXED | {"*.attention.qk_norm": "head"},
  ),
  "qwen3_moe": Family(
    "Qwen3MoeForCausalLM",
    _FIELDS
    | {**_NORM, **_HEAD, **_MOE, **_DENSE}
    | {"moe_intermediate_size": "*.moe.experts.hidden"},
    _FIXED | {"*.attention.qk_norm": "head"},
    sparse="steps",
  ),
  "switch_transformers": Family(
    "SwitchTransformersForConditionalGeneration",
    {
      "d_model": "width",
      "d_kv": "*.attention.head_dim",
      "num_heads": "*.attention.num_heads",
      "layer_norm_epsilon": "*.epsilon",
      "d_ff": "*.dense.hidden *.moe.experts.hidden",
      "num_experts": "*.moe.num_experts",
    },
    _FIXED
    | {
      "kind": "pair_transformer",
      "tied": True,
      "scaled": True,
      "*.position": "relative",
      "*.attention.scaled": False,
      "*.dense.gated *.moe.experts.gated": False,
      "*.dense.activation *.moe.experts.activation": "relu",
      "*.moe.router.kind": "switch",
    },
    {
      "dense_act_fn": "relu",
      "relative_attention_num_buckets": 32,
      "relative_attention_max_distance": 128,
      "router_bias": False,
      "router_dtype": "float32",
      "tie_word_embeddings": True,
    },
    _SWITCH,
    "steps",
  ),
}
# Stacks of a model -> how many blocks it has and, of T5, how many are sparse.
_STACKS = {
  "transformer": {"blocks": ("num_hidden_layers", "")},
  "pair_transformer": {
    "encoder": ("num_layers", "num_sparse_encoder_layers"),
    "decoder": ("num_decoder_layers", "num_sparse_decoder_layers"),
  },
}
# What config.json may leave out; a head's size and number follow from others.
_DEFAULTS = {
  "tie_word_embeddings": False,
  "norm_topk_prob": False,
  "rope_theta": 10_000.0,
  "decoder_sparse_step": 1,
}
_FOLLOW = "head_dim", "num_key_value_heads"
# What any family has, and a run of ours does not know.
_GENERAL = "max_position_embeddings", "bos_token_id", "eos_token_id"
# Fields that change nothing in evaluation, where no expert is full.
_FREE = re.compile(
  r".*\b(scan|recompute|dropout|dispatch|group_size|dtype|vocab_multiple"
  r"|num_samples|looks_ahead|noise_epsilon|(eval_)?capacity_factor|init_scale"
  r"|masked_outputs|exchange_parts)"
)


def _paths(text: str, stacks: Iterable[str]) -> list[str]:
  """Returns the paths that an entry of a table stands for."""
  return [
    path.replace("*", stack)
    for path in text.split()
    for stack in (stacks if "*" in path else [""])
  ]


def read_config(hf: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
  """Reads a config.json: the family, and the section `model` of such a model.

  ValueError where no table has the family, or the model needs what is computed
  by no module here.
  """
  kind = hf.get("model_type")
  if kind not in FAMILIES:
    raise ValueError(
      f"config.json is of the family {kind!r}, which moejax does not read; it"
      f" reads {', '.join(FAMILIES)}."
    )
  family = FAMILIES[kind]
  hf = _DEFAULTS | dict(family.wanted) | dict(hf)
  # Older files have both of these by themselves.
  rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  hf["rope_theta"] = rope.get("rope_theta", hf["rope_theta"])
  hf.setdefault("num_experts", hf.get("num_local_experts"))
  hf["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
  if hf.get("use_sliding_window") is False:
    hf["sliding_window"] = None
  for name, value in family.wanted.items():
    if hf[name] != value:
      raise ValueError(
        f"config.json has {name} {hf[name]!r}, but of {kind} moejax reads"
        f" models of {name} {value!r} alone."
      )

  def needed(name):
    if hf.get(name) is None:
      raise ValueError(f"config.json has no {name}, which {kind} needs.")
    return hf[name]

  needed("vocab_size")
  stacks, facts = _STACKS[family.fixed["kind"]], {}
  for text, value in family.fixed.items():
    facts |= dict.fromkeys(_paths(text, stacks), value)
  for name, text in family.fields.items():
    facts |= dict.fromkeys(_paths(text, stacks), hf.get(name))
  for stack, (depth, count) in stacks.items():
    layers = []
    for i in range(needed(depth)):
      is_sparse = family.sparse == "all"
      if count:
        # So they do, also where none is to be sparse.
        step = hf[depth] // (needed(count) or 1)
        is_sparse = i % step == 1 or step == 1
      elif family.sparse == "steps":
        is_sparse = (i + 1) % hf["decoder_sparse_step"] == 0
        is_sparse &= i not in (hf.get("mlp_only_layers") or ())
      layers.append("moe" if is_sparse else "dense")
    facts[f"{stack}.layers"] = tuple(layers)
  facts = _there(facts)
  for name, text in family.fields.items():
    if name not in _FOLLOW and facts.keys() & _paths(text, stacks):
      needed(name)
  section: dict[str, Any] = {}
  for path, value in facts.items():
    if path.endswith(".layers"):
      stack = path.removesuffix("layers")
      size = len(value) if len({*value}) > 1 else 1
      config_fields.set_field(section, f"model.{stack}num_layers", len(value))
      path, value = f"{stack}pattern", value[:size]
    config_fields.set_field(section, f"model.{path}", value)
  return kind, section


def _there(facts: Facts) -> Facts:
  """Leaves out the sections of layers that no block has."""
  layer = re.compile(r"(\w+)\.(dense|moe|hierarchical_moe)\.")
  return {
    path: value
    for path, value in facts.items()
    if not (at := layer.match(path)) or at[2] in facts[f"{at[1]}.layers"]
  }


def facts_of(section: Mapping[str, Any]) -> Facts:
  """Says what a model is: a config's section `model` in one spelling."""
  whole = Annotated[Any, config_fields.Section(MODELS)]
  facts: Facts = {}
  absent: tuple[str, ...] = ()
  for field in config_fields.fields(whole, "", section):
    path = field.name[1:]
    value = field.default if field.value is EMPTY else field.value
    if config_fields.section_of(field.annotation):
      if value is None or value is EMPTY:
        absent += (f"{path}.",)
    elif value is not EMPTY and not path.startswith(absent):
      facts[path] = value
  facts = {p: v for p, v in facts.items() if not _FREE.fullmatch(p)}
  for stack in _STACKS.get(facts["kind"], ()):
    count = facts.pop(f"{stack}.num_layers")
    first, pattern = (facts.pop(f"{stack}.{n}") for n in ("first", "pattern"))
    facts[f"{stack}.layers"] = (*first, *pattern * count)[:count]
    attention, router = f"{stack}.attention", f"{stack}.moe.router"
    heads = facts[f"{attention}.num_heads"]
    sizes = {"head_dim": facts["width"] // heads, "num_kv_heads": heads}
    for name, size in sizes.items():
      if facts.get(f"{attention}.{name}", "") is None:
        facts[f"{attention}.{name}"] = size
    if facts.get(f"{attention}.qk_norm") == "none":
      del facts[f"{attention}.epsilon"]
    if facts[f"{stack}.position"] == "relative":
      del facts[f"{attention}.rotary_base"]
    if facts.get(f"{router}.kind") in ("top_k", "noisy_top_k"):
      # The same function; noise is for training.
      own = {"kind": "softmax_top_k", "normalized": True}
      own |= {"num_groups": 1, "max_groups": 1, "scale": 1.0}
      facts |= {f"{router}.{name}": value for name, value in own.items()}
    for path in (f"{stack}.dense.hidden", f"{stack}.moe.experts.hidden"):
      match facts.get(path):
        case (size,):
          facts[path] = size
  return _there(facts)


def write_config(kind: str, facts: Facts) -> dict[str, Any]:
  """Returns the fields of a config.json of this family for such a model."""
  family = FAMILIES[kind]
  stacks = _STACKS[family.fixed["kind"]]
  hf = {"architectures": [family.architecture], "model_type": kind}
  hf |= {n: v for n, v in family.wanted.items() if n != "rope_type"}
  for name, text in family.fields.items():
    for path in _paths(text, stacks):
      if path in facts:
        hf[name] = facts[path]
  for stack, (depth, count) in stacks.items():
    layers = facts[f"{stack}.layers"]
    hf[depth] = len(layers)
    if count:
      hf[count] = layers.count("moe")
    elif family.sparse == "steps":
      dense = [i for i, each in enumerate(layers) if each == "dense"]
      hf |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
  if base := hf.get("rope_theta"):
    # Newer versions read this one.
    hf["rope_parameters"] = {"rope_theta": base, "rope_type": "default"}
  return hf


def family_of(facts: Facts) -> dict[str, Any]:
  """Returns the config.json of the family that has such models.

  ValueError says what would have to differ to be of the nearest.
  """
  differ = {}
  for kind, family in FAMILIES.items():
    if facts["kind"] == family.fixed["kind"]:
      try:
        hf = write_config(kind, facts)
        _, section = read_config(hf | {"vocab_size": 1})
      except ValueError:
        continue
      back = facts_of(section)
      differ[kind] = [
        f"config.model.{path} {facts.get(path)!r} in place of"
        f" {back.get(path)!r}"
        for path in sorted({*facts, *back})
        if facts.get(path) != back.get(path)
      ]
      if not differ[kind]:
        return hf
  said = [f"config.model.kind {facts['kind']!r}"]
  if differ:
    nearest = min(differ, key=lambda kind: len(differ[kind]))
    said = [*differ[nearest][:4], *["..."] * (len(differ[nearest]) > 4)]
    said[-1] += f" of {nearest}, the nearest"
  raise ValueError(
    f"the model has {', '.join(said)}: no family of transformers that moejax"
    f" writes has that ({', '.join(FAMILIES)}); it stays a workdir."
  )


# -- parameters ---------------------------------------------------------------


def places(
  kind: str, model: nn.Module, shapes: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the tensors of each parameter, by its path "blocks/norm_out/scale".

  Their names are stacked as the first axes of the parameter are. What makes
  noise in training has none.
  """
  family, found = FAMILIES[kind], {}
  names, layers = dict(family.names), {}
  if model.tied and "embed/table" in names:
    names["head/table"] = names["embed/table"]
  for stack in _STACKS[family.fixed["kind"]]:
    for number, (path, _) in enumerate(getattr(model, stack).places):
      layers.setdefault("/".join((stack, *path)), []).append(number)
  for path, leaf in shapes.items():
    if "/router/noise/" in path:
      continue
    key, of = path, []
    if at := re.match(r"(\w+)/layers\w*/block_\d+", path):
      key = path.replace(at[0], at[1])
      if f"{at[0]}/feed_forward/router/gate/kernel" in shapes:
        key = key.replace("feed_forward/", "moe/")
      key = key.replace("feed_forward/experts/", "dense/")
      blocks = np.array(layers[at[0]])
      of = [blocks if "/layers/" in path else blocks[0]]
      if "/experts/" in path:
        of = [of[0][..., None], np.arange(leaf.shape[of[0].ndim])]
    write = np.vectorize(names[key].format, otypes=[object])
    found[path] = np.asarray(write(*of) if of else names[key], object)
  return found


def _is_matrix(path: str) -> bool:
  """Says whether a parameter is [in, out], which theirs is not."""
  last = path.split("/")[-1]
  return last == "kernel" or last.startswith("w_")


class _Source:
  """The tensors of a folder, none of which is read before it is asked for."""

  def __init__(self, folder: files_lib.Path, found: Mapping[str, np.ndarray]):
    """Reads what is there; ValueError where a file is missing or cut short."""
    # Of each tensor its file, shape and type.
    self._found, self._there, names = found, {}, [_WEIGHTS]
    if files_lib.exists(folder / _INDEX):
      index = files_lib.read_json(folder / _INDEX)
      names = sorted({*index["weight_map"].values()})
    for path in (folder / name for name in names):
      try:
        file = safetensors.safe_open(path, "np")
      except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
          f"{path} is missing or cut short ({error}); fetch it again, or write"
          " it by save_pretrained."
        ) from None
      for name in itertools.filterfalse(_SPARE.fullmatch, file.keys()):
        own = file.get_slice(name)
        self._there[name] = path, tuple(own.get_shape()), own.get_dtype()

  def check(self, shapes: Mapping[str, Any]) -> None:
    """Refuses other tensors than a model of these shapes has."""
    wanted: dict[str, tuple[int, ...]] = {}
    for path, names in self._found.items():
      shape = shapes[path].shape[names.ndim :]
      shape = shape[::-1] if _is_matrix(path) else shape
      wanted |= dict.fromkeys(names.flat, shape)
    less, more = wanted.keys() - self._there, self._there.keys() - wanted
    said = [
      f"{len(names):,} {how}: {', '.join(sorted(names)[:3])}"
      for names, how in ((less, "missing"), (more, "too many"))
      if names
    ]
    for name, shape in wanted.items() if not said else ():
      _, own, dtype = self._there[name]
      if own != shape:
        said = [f"{name} is {own}, by config.json {shape}"]
      elif dtype not in _READ:
        said = [f"{name} is {dtype}, and {', '.join(_READ)} are read"]
    if said:
      raise ValueError(
        "the tensors are not those of the model that config.json describes"
        f" ({'; '.join(said)}); give the two of one model."
      )

  def read(
    self, path: str, shape: tuple[int, ...], index: tuple[slice, ...]
  ) -> np.ndarray:
    """Reads a part of a parameter, in float32, and of the files no more."""
    index = tuple(
      slice(*each.indices(n)) for each, n in zip(index, shape, strict=True)
    )
    out = np.empty([each.stop - each.start for each in index], np.float32)
    names, turned = self._found[path], _is_matrix(path)
    part = index[names.ndim :][:: -1 if turned else 1]
    for at, name in np.ndenumerate(names[*index[: names.ndim], ...]):
      # Of a file that stays open, all that was read stays in memory.
      with safetensors.safe_open(self._there[name][0], "np") as file:
        tensor = file.get_slice(name)[part]
      out[at] = tensor.T if turned else tensor
    return out


# -- commands -----------------------------------------------------------------


def import_model(
  source: str,
  workdir: files_lib.Path,
  changes: Sequence[tuple[str, Sequence[str]]] = (),
) -> None:
  """Makes a workdir of a model; each device reads what it is to hold.

  Args:
    source: a folder with config.json and safetensors; or the name of a model of
      the hub, which `huggingface_hub` fetches.
    workdir: where the run shall live; there is none yet.
    changes: what a command line says of fields of the run's config.

  Raises:
    ValueError: another family, or files that do not fit each other; nothing is
      written then.
    FileNotFoundError: a file is missing.
    FileExistsError: there is a run in the workdir.
  """
  if workdir_lib.is_run(workdir):
    raise FileExistsError(
      f"{workdir} holds a run already; give a new --workdir."
    )
  folder = files_lib.path(source)
  if not folder.is_dir():
    folder = _fetched(source)
  hf = files_lib.read_json(folder / "config.json")
  kind, section = read_config(hf)
  size, is_pair = hf["vocab_size"], section["kind"] == "pair_transformer"
  tokenizer = None
  rows = {
    "row_length": min(hf.get("max_position_embeddings") or 512, 2048),
    "batch_size": math.lcm(8, jax.device_count()),
  }
  if is_pair:
    data = {"kind": "pairs", "train": "", "vocab_size": size}
    rows["source_length"] = rows["row_length"]
  else:
    tokenizer, fields = _tokens(folder, hf, size)
    data = {"kind": "text", "tokens": {"kind": "file", "path": ""} | fields}
  config = config_lib.Config(
    {
      "seed": 0,
      "layout": "fsdp",
      "data": data | rows,
      "model": section,
      "aux": {},
      "optimizer": {"kind": "adam", "peak": 1e-5, "warmup_steps": 100},
      "train": {"steps": 1000},
    }
  )
  config_lib.override(config, changes)
  experiment = config_lib.parse(config)
  built = session.build(experiment, size)
  shapes = flatten_dict(built.abstract_state.params, sep="/")
  tensors = _Source(folder, places(kind, built.model, shapes))
  tensors.check(shapes)
  # One after the other, so that no more than one of them is there twice.
  params = {
    path: jax.make_array_from_callback(
      leaf.shape,
      leaf.sharding,
      functools.partial(tensors.read, path, leaf.shape),
    )
    for path, leaf in shapes.items()
  }
  step = jax.device_put(np.int32(0), built.abstract_state.step.sharding)
  # Training begins with a fresh optimizer, of which nothing need lie here.
  state = TrainState(step, unflatten_dict(params, sep="/"), None)

  def finish() -> None:
    # What goes through a workdir as it is.
    kept = workdir / workdir_lib.FOREIGN
    kept.mkdir(exist_ok=True)
    for path in folder.glob("*.json"):
      if path.name not in (_INDEX, TokenizerFile.FILE):
        files_lib.write_whole(kept / path.name, files_lib.read(path))
    workdir_lib.remember(experiment.values, tokenizer, {}, workdir, made=True)

  checkpoints = Checkpoints(workdir / run.CHECKPOINTS)
  with contextlib.closing(checkpoints):
    checkpoints.save(state, 0, {"seconds": 0.0})
  # The config comes last: without it there is no run.
  processes.first_does(finish)
  if processes.first():
    count = sum(math.prod(leaf.shape) for leaf in shapes.values())
    missing = "" if tokenizer else f"; {folder} has no {TokenizerFile.FILE}"
    terminal.say(f"{kind} of {count:,} parameters, in {workdir}{missing}")


def _fetched(source: str) -> files_lib.Path:
  """Fetches a model of the hub."""
  wanted = ["*.json", "*.safetensors"]
  try:
    import huggingface_hub

    got = huggingface_hub.snapshot_download(source, allow_patterns=wanted)
  except Exception as error:  # Of many kinds.
    raise FileNotFoundError(
      f"--from={source}: there is no such folder, and the hub gives no model of"
      f" that name ({terminal.brief(error)}); give a folder or, where"
      " huggingface_hub is installed, OWNER/NAME."
    ) from None
  return files_lib.path(got)


def _tokens(
  folder: files_lib.Path, hf: Mapping[str, Any], size: int
) -> tuple[TokenizerFile | None, dict[str, Any]]:
  """Reads the tokenizer beside a model, and what a config says of it."""
  path, fields = folder / TokenizerFile.FILE, {"vocab_size": size}
  if not files_lib.exists(path):
    return None, fields
  added = files_lib.read_json(path).get("added_tokens", ())
  contents = {token["id"]: token["content"] for token in added}
  for field, name in (("start", "bos_token_id"), ("end", "eos_token_id")):
    # Llama has several ends, and the first is that of a text.
    number = hf.get(name)
    number = number[0] if isinstance(number, list) else number
    if number in contents:
      fields[field] = contents[number]
  return TokenizerFile.load(path, **fields), fields


def export_model(
  workdir: files_lib.Path, to: files_lib.Path, dtype: str = "float32"
) -> None:
  """Writes the best checkpoint of a run as `transformers` and vLLM read it.

  What the model computes in evaluation, where no expert is full; noise of a
  router in training is left out.

  Args:
    workdir: of the run.
    to: a folder, new or empty.
    dtype: that parameters are rounded to: float32, bfloat16 or float16.

  Raises:
    ValueError: no family has such a model; nothing is written then.
    FileExistsError: there are files in the folder.
  """
  if files_lib.exists(to) and (not to.is_dir() or any(to.iterdir())):
    raise FileExistsError(f"{to} is there and not empty; give a new --to.")
  values = run.recall(workdir).values
  own = family_of(facts_of(values["model"]))
  kind = own["model_type"]
  model, params, tokenizer, _ = run.load(workdir)
  kept, before = workdir / workdir_lib.FOREIGN, {}
  if files_lib.exists(kept / "config.json"):
    before = files_lib.read_json(kept / "config.json")
  hf = {"max_position_embeddings": values["data"]["row_length"]}
  if before.get("model_type") == kind:
    hf = before
  else:
    if tokenizer:
      hf |= {"bos_token_id": tokenizer.start, "eos_token_id": tokenizer.end}
    # Of the model that this one was made from.
    hf |= {name: before[name] for name in _GENERAL if name in before}
  size, final = model.vocab_size, jnp.dtype(dtype)
  hf |= own | {"vocab_size": size, "dtype": dtype, "torch_dtype": dtype}
  leaves = flatten_dict(params, sep="/")
  # Of each tensor the parameter, and what is taken of it; by files.
  files: dict[int, dict[str, tuple[str, tuple[int, ...]]]] = {}
  total = 0
  for path, names in places(kind, model, leaves).items():
    if path.endswith("/table"):
      # The rows that pad it are no words.
      leaves[path] = leaves[path][:size]
    for at, name in np.ndenumerate(names):
      files.setdefault(total // _FILE_BYTES, {})[name] = path, at
      total += math.prod(leaves[path].shape[names.ndim :]) * final.itemsize

  def tensor(path, at):
    found = np.asarray(leaves[path][at] if at else leaves[path])
    found = found.T if _is_matrix(path) else found
    return np.ascontiguousarray(found.astype(final))

  to.mkdir(parents=True, exist_ok=True)
  index = {}
  for i, tensors in enumerate(files.values(), 1):
    name = _WEIGHTS
    if len(files) > 1:
      name = f"model-{i:05}-of-{len(files):05}.safetensors"
    safetensors.numpy.save_file(
      {name: tensor(*what) for name, what in tensors.items()},
      to / name,
      metadata={"format": "pt"},
    )
    index |= dict.fromkeys(tensors, name)
  if len(files) > 1:
    about = {"metadata": {"total_size": total}, "weight_map": index}
    files_lib.write_whole(to / _INDEX, json.dumps(about, indent=2) + "\n")
  for path in kept.iterdir() if before else ():
    files_lib.write_whole(to / path.name, files_lib.read(path))
  if isinstance(tokenizer, TokenizerFile):
    tokenizer.save(to / TokenizerFile.FILE)
  # The last, in place of theirs.
  files_lib.write_whole(to / "config.json", json.dumps(hf, indent=2) + "\n")
  terminal.say(f"{kind} of {total // final.itemsize:,} parameters, in {to}")
