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
# # What experts learn
#
# Nobody tells an expert what it is for. A router sends it some tokens, it
# learns from these, and gets more of the kind that it does well. Table 9 of the
# paper shows where that leads in a translator. Here a language model with 32
# experts learns for a minute from the messages of the US presidents, and the
# routing report shows what each of its experts has become.

# %%
import html
import pathlib

import matplotlib.pyplot as plt
import numpy as np
from absl import logging
from IPython.display import HTML, IFrame

from moejax import config
from moejax.analysis import report
from moejax.training import loop, metrics

logging.set_verbosity(logging.ERROR)
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 72})

# %% [markdown]
# ## A short training
#
# The same as `moejax train --config=sotu/moe_32` with fewer steps: 4 of 32
# experts read each word, between two LSTMs. It needs some 1,200 steps to be
# good; after 150 it already has specialists.

# %%
workdir = pathlib.Path("run")
steps = [("config.train.steps", ["150"]), ("config.train.log_every", ["10"])]
trained = loop.train(config.parse(config.load("sotu/moe_32", steps)), workdir)
print(f"test perplexity {trained['test']['perplexity']:.1f}")

# %% [markdown]
# ## Load over training
#
# A run keeps how many words each expert gets. Every row below is an expert,
# every column a step; 1 is an even share. The balance losses (eq. 7 and 11)
# keep the rows near 1 from the first steps on.

# %%
((layer, (at, counts)),) = metrics.loads(workdir).items()
share = counts / counts.sum(axis=1, keepdims=True) * counts.shape[1]
figure, axes = plt.subplots(figsize=(8, 3))
picture = axes.pcolormesh(
  at, np.arange(counts.shape[1]), share.T, cmap="cividis"
)
axes.set(xlabel="step", ylabel="expert", title=f"load of {layer}, 1 is even")
figure.colorbar(picture)
plt.show()

# %% [markdown]
# ## The report
#
# One call reads the test text by the best checkpoint and writes a page and a
# file of the same numbers. (`moejax report --workdir=run` does it from a
# terminal.) The page works without a network: in a live notebook it stands
# below, elsewhere open `report.html`.

# %%
page = pathlib.Path("report.html")
told = report.write([workdir], page, sentences=40, without=8)
(layer,) = told["runs"][0]["layers"]
IFrame("report.html", width="100%", height=500)

# %% [markdown]
# ## What an expert knows
#
# If experts were chosen by a coin, to know the expert would tell nothing about
# the word. It tells much more than luck gives.

# %%
for each in layer["knowledge"]:
  print(
    f"{each['about']:<32} {each['bits']:5.2f} bits, by luck"
    f" {each['shuffled']:.2f}"
  )

# %% [markdown]
# Each point is an expert: to the right those that read most, above those whose
# words differ most from everyone's. Gray is what luck gives.

# %%
experts = layer["by_expert"]
load, bits, luck = (
  [row[name] for row in experts] for name in ("load", "bits", "shuffled")
)
figure, axes = plt.subplots(figsize=(8, 3))
axes.plot(load, bits, "o", color="#0072b2")
axes.plot(load, luck, "x", color="#707070")
axes.set(xlabel="words that it reads", ylabel="bits", ylim=(0, None))
axes.set_title("what each expert knows of the word")
plt.show()

# %% [markdown]
# ## Its words, and where it is surest
#
# Of the four experts with most bits: the words that they prefer, and below the
# place where their gate is largest, as in Table 9. Other runs have other
# experts.

# %%
lines = []
for row in sorted(experts, key=lambda row: -row["bits"])[:4]:
  words = ", ".join(html.escape(word) for word, _, _ in row["tokens"][:6])
  gate, left, word, right = map(str, row["contexts"][0])
  place = f"{html.escape(left)}<b>{html.escape(word)}</b>{html.escape(right)}"
  lines.append(f"<p>expert {row['expert']}: {words}<br>{gate}: {place}</p>")
HTML("".join(lines))

# %% [markdown]
# ## A sentence in the colors of its experts
#
# Every word has the color of the expert with the largest gate; point at it for
# all four. Articles, commas and verbs each have their own.

# %%
text = told["runs"][0]["text"]["target"]
number = max(
  range(len(text)), key=lambda i: len(text[i]) if len(text[i]) < 40 else 0
)
colors = plt.get_cmap("tab20").colors
spans = []
for word, edges in zip(text[number], layer["read"][number], strict=True):
  best = max(edges, key=lambda edge: edge[1])[0]
  color = ", ".join(str(round(255 * part)) for part in colors[best % 20])
  title = "; ".join(f"expert {edge[0]}: {edge[1]}" for edge in edges)
  spans.append(
    f'<span title="{title}" style="background: rgba({color}, 0.6)">'
    f"{html.escape(word)}</span>"
  )
HTML(" ".join(spans))

# %% [markdown]
# ## What would be lost
#
# How the loss changes when an expert is taken away, as if it were full. So
# early in training it even falls without some; after a whole run it rises
# without any of the busy ones. One that hardly matters is one to prune.

# %%
lost = [row for row in experts if "loss_without" in row]
lost.sort(key=lambda row: -row["loss_without"])
figure, axes = plt.subplots(figsize=(8, 3))
axes.bar(
  [str(row["expert"]) for row in lost],
  [row["loss_without"] for row in lost],
  color="#d55e00",
)
axes.set(xlabel="expert", ylabel="nats a word")
axes.set_title("how much the loss rises without an expert")
plt.show()
