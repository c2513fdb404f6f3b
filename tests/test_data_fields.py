"""Every field of `data` changes what is read, or where it is prepared."""

import random

import numpy as np
import pytest
from config_shapes import experiment

from moejax import config as config_lib
from moejax import config_fields
from moejax.data import batches as batches_lib
from moejax.data import corpora

WORDS = [begin + end for begin in "krtw" for end in ("ed", "un", "ars")]
SPLITS = ("train", "validation", "test")


def sentences(seed, count=60):
  draw = random.Random(seed)
  return [" ".join(draw.choices(WORDS, k=6)) + " ." for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Files of text and of pairs, two of each split."""
  path = tmp_path_factory.mktemp("text")

  def write(name, lines):
    (path / name).write_text("".join(f"{line}\n" for line in lines))

  for seed, split in enumerate((*SPLITS, *(f"{split}2" for split in SPLITS))):
    lines = sentences(seed)
    write(f"{split}.txt", lines)
    write(f"{split}.tsv", [f"{a}\t{a[::-1]}" for a in lines])
  write("few.tsv", [f"{a}\t{a.upper()}" for a in sentences(7, 20)])
  write("odd.tsv", [f"{a}\t{a[::-1]}" for a in sentences(0)] + ["no pair"])
  return path


def base(kind, folder):
  """A section, and other values of its fields."""
  suffix, mark = (".txt", "") if kind == "text" else (".tsv", "en-fr=")
  section = {"kind": kind, "row_length": 64, "batch_size": 4}
  section["data_dir"] = str(folder / "prepared")
  changes = {"row_length": 80, "batch_size": 8, "data_dir": str(folder / kind)}
  for split in SPLITS:
    section[split] = f"{mark}{folder}/{split}{suffix}"
    changes[split] = f"{mark}{folder}/{split}2{suffix}"
  if kind == "text":
    pieces = {"kind": "pieces", "vocab_size": 300}
    changes |= {"min_count": 35, "tokens": pieces}
    return section | {"min_count": 1}, changes
  for each in (section, changes):
    each["train"] += f",en-de={folder}/few.tsv"
  return section | {"vocab_size": 300, "source_length": 64}, changes | {
    "vocab_size": 310,
    "source_length": 80,
    "both_directions": True,
    "temperature": 5.0,
    "strict": True,
  }


def seen(kind, section):
  """Digests of all splits, and of the first batches of training."""
  name = "tiny" if kind == "text" else "translate_tiny"
  full = {"model__num_samples": 0} if kind == "text" else {}
  data = config_lib.open_corpus(experiment(name, data=section, **full))
  rows = {split: data.rows(split) for split in SPLITS}
  batches = batches_lib.train_batches(rows["train"], data.batch_size, 0)
  first = [next(batches) for _ in range(4)]
  return (
    {split: each.digest for split, each in rows.items()},
    data.vocabulary.digest,
    [{n: np.asarray(v).tolist() for n, v in b.items()} for b in first],
  )


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_no_field_of_the_data_is_ignored(kind, folder):
  section, changes = base(kind, folder)
  about = config_fields.Section(corpora.DATA)
  assert set(changes) == set(config_fields.chosen(about, section, "data")[1])
  before, ignored = seen(kind, section), []
  for field, value in changes.items():
    other = section | {field: value}
    if field == "strict":
      # All that differs: a line that is no pair is refused.
      odd = {"train": f"en-fr={folder}/odd.tsv"}
      seen(kind, section | odd)
      with pytest.raises(ValueError, match="odd.tsv"):
        seen(kind, other | odd)
    elif field == "data_dir":
      assert not (folder / kind).exists()
      assert seen(kind, other) == before
      assert any((folder / kind).iterdir())
    elif seen(kind, other) == before:
      ignored.append(field)
  assert not ignored
