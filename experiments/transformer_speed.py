"""Question: how fast does a sparse Transformer train, beside `transformers`?

Method: words a second of whole training steps (forward, backward, Adam, full
softmax over 10,000 words) of four blocks 512 wide, 8 heads, on 32 rows of 128
random words, float32: OLMoE's blocks with 4 of 32 gated experts 256 wide,
dropless, beside `OlmoeForCausalLM` of the same sizes; and the dense twin, 1024
wide, beside `LlamaForCausalLM`. Theirs run as they come, uncompiled, on torch
with fused Adam. All take turns in one process, of two steps of which the second
is timed; ms is the median of the repeats, fastest_ms the least disturbed one,
from which words a second, `speedup` over theirs and `of_dense` come, the time
of a step over that of the dense model's.

Result: as fast as theirs, 0.98 times sparse and 0.95 dense; the sparse step is
1.11 of the dense one, theirs 1.14 (two cores of an AMD EPYC,
results/transformer_speed.csv). The products, 4.0e11 operations a step, take
2.0 s of 2.65 at the 200 GFLOP/s that these cores make: none is 1.5 times as
fast in float32.
"""

from collections.abc import Callable
from typing import Any

from experiments import figures, harness, training

MODELS = {"sparse": "4 of 32 experts", "dense": "dense"}
SIZES = {"width": 512, "blocks": 4, "heads": 8, "hidden": 1024, "experts": 32}
QUICK = {"width": 16, "blocks": 1, "heads": 2, "hidden": 16, "experts": 8}
K = 4


def rows(quick: bool) -> figures.Rows:
  """Yields a row per model, ours and theirs."""
  shape, sizes = ((2, 4), QUICK) if quick else ((32, 128), SIZES)
  with training.roughly_compiled(quick):
    runs: dict[tuple[str, str], Callable[[], Any]] = {
      ("moejax", name): training.random_step(config_of(name, shape, sizes))
      for name in MODELS
    }
  with harness.if_installed("transformers"):
    runs |= {
      ("transformers", name): peer(name, shape, sizes) for name in MODELS
    }
  times = harness.interleaved(runs, 2 if quick else 5, lead=1)
  fastest = {label: each.fastest for label, each in times.items()}
  for (by, name), each in times.items():
    theirs = fastest.get(("transformers", name))
    yield {
      "by": by,
      "model": name,
      "ms": round(each.median, 1),
      "fastest_ms": round(each.fastest, 1),
      "words_per_second": round(1e3 * shape[0] * shape[1] / each.fastest),
      "speedup": theirs and round(theirs / each.fastest, 2),
      "of_dense": round(each.fastest / fastest[by, "dense"], 2),
    }


def config_of(name: str, shape: tuple[int, int], sizes: dict[str, int]) -> Any:
  """Returns the config of ours."""
  config = training.load("transformer/dense")
  config.data.batch_size, config.data.row_length = shape
  config.model.update({"width": sizes["width"], "num_samples": 0})
  gated = {"kind": "feed_forward", "activation": "silu", "gated": True}
  attention = {"num_heads": sizes["heads"], "qk_norm": "width"}
  config.model.blocks.attention.update(attention)
  config.model.blocks.update(
    {"num_layers": sizes["blocks"], "dropout": 0.0, "dense": gated}
  )
  config.model.blocks.dense.hidden = sizes["hidden"]
  if name == "sparse":
    config.model.blocks.pattern = ("moe",)
    config.model.blocks.moe = {
      "num_experts": sizes["experts"],
      "router": {"kind": "softmax_top_k", "k": K},
      "experts": gated | {"hidden": sizes["hidden"] // K},
      "capacity_factor": None,
      "eval_capacity_factor": None,
    }
    config.aux = {"switch_balance": 1e-2}
  return config


def peer(
  name: str, shape: tuple[int, int], sizes: dict[str, int]
) -> Callable[[], None]:
  """Returns a training step of theirs."""
  import torch
  import transformers

  fields = {
    "vocab_size": training.VOCABULARY,
    "hidden_size": sizes["width"],
    "num_hidden_layers": sizes["blocks"],
    "num_attention_heads": sizes["heads"],
    "num_key_value_heads": sizes["heads"],
    "intermediate_size": sizes["hidden"],
    "use_cache": False,
  }
  if name == "sparse":
    fields |= {
      "intermediate_size": sizes["hidden"] // K,
      "num_experts": sizes["experts"],
      "num_experts_per_tok": K,
      "output_router_logits": True,
    }
    config = transformers.OlmoeConfig(**fields)
    model = transformers.OlmoeForCausalLM(config)
  else:
    config = transformers.LlamaConfig(**fields)
    model = transformers.LlamaForCausalLM(config)
  adam = torch.optim.Adam(model.parameters(), fused=True)
  words = torch.randint(training.VOCABULARY, shape)

  def step() -> None:
    adam.zero_grad()
    model(input_ids=words, labels=words).loss.backward()
    adam.step()

  return step


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  axes = figure.subplots()
  names = list(MODELS.values())
  series = {
    by: [
      next(r for r in table if (r["by"], r["model"]) == (by, name))[
        "words_per_second"
      ]
      for name in MODELS
    ]
    for by in dict.fromkeys(row["by"] for row in table)
  }
  figures.bars(axes, names, series, (figures.SPARSE, figures.LIGHT))
  axes.set_xlabel("words a second of training")
  ours = table[0]
  cost = f"costs {ours['of_dense']:.2f} times the dense one's step"
  if ours["speedup"] is None:
    return f"A sparse Transformer's step {cost}"
  return (
    f"A sparse Transformer trains {ours['speedup']:.2f} times as fast as that"
    f" of transformers, and its step {cost}"
  )


if __name__ == "__main__":
  harness.main("transformer_speed", rows, draw)
