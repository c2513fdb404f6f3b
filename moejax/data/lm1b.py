"""The 1-billion-word benchmark (sec. 5.1, app. C.1) as TFDS prepares it."""

import os
import pathlib
from collections.abc import Sequence

from moejax.data import corpora, published
from moejax.data.vocab import Vocabulary

# The benchmark holds out 50 files; as many sentences as one of them.
_VALIDATION_PART = 50


def load_vocabulary(path: str | os.PathLike, size: int) -> Vocabulary:
  """Reads the file published with the benchmark: a word a line, frequent first.

  Args:
    path: of the file.
    size: entries it must have, 793,471 with `</S>`, `<S>` and `<UNK>`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is of another size, or no vocabulary.
  """
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f"config.data.vocab_file is '{path}', which is no file; give one of"
      f" {size:,} entries, one a line, frequent first; published with the"
      " benchmark is vocab-2016-09-10.txt, of 793,471"
    )
  vocabulary = Vocabulary.load(pathlib.Path(path))
  if len(vocabulary) != size:
    way = "the file of that size"
    if len(vocabulary) > size:
      way = f"its first {size:,} lines (head -n {size})"
    raise ValueError(
      f"{path} has {len(vocabulary):,} entries, but config.data.vocab_size is"
      f" {size:,}; give {way}, or the size of that file"
    )
  return vocabulary


def open_lm1b(
  data_dir: str | os.PathLike | None = None, test: str = ""
) -> dict[str, Sequence[str]]:
  """Opens the splits train, validation and test.

  Nothing is taken away from train. TFDS mixes the benchmark's 50 held-out files
  into one split; a fiftieth of that is validation, and the rest is the test.
  Published results are of the first of the 50 files alone: given that file, it
  is the test, and validation does without its sentences.

  Args:
    data_dir: where TFDS prepared lm1b; None is its own place, $TFDS_DATA_DIR or
      ~/tensorflow_datasets.
    test: path of news.en.heldout-00000-of-00050, from the benchmark's archive.

  Raises:
    FileNotFoundError: lm1b is not prepared there, or there is no file `test`.
    ValueError: the files prepared there, or `test`, cannot be read.
  """
  builder = published.opened("lm1b", data_dir)
  with corpora.quiet():
    count = builder.info.splits["test"].num_examples
    few = max(1, count // _VALIDATION_PART)
    train = corpora.Records(builder, "train")
    validation = corpora.Records(builder, f"test[:{few}]")
    rest = corpora.Records(builder, f"test[{few}:]")
  if not test:
    return {"train": train, "validation": validation, "test": rest}
  first = corpora.read_lines([test])
  tested = set(first)
  validation = [text for text in validation if text not in tested]
  return {"train": train, "validation": validation, "test": first}
