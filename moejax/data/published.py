"""Corpora that TFDS downloads.

TensorFlow is needed to prepare one, once, and never to read it.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import tensorflow_datasets as tfds

from moejax.data import corpora

# Where the classes are that a copy's features may be of.
_FEATURES = "tensorflow_datasets.core.features."


def opened(
  name: str, data_dir: str | os.PathLike | None = None
) -> tfds.core.DatasetBuilder:
  """Returns the builder of a corpus that is prepared.

  Args:
    name: as TFDS has it, "lm1b" or "wmt14_translate/fr-en".
    data_dir: where it is prepared; None is TFDS's own place, $TFDS_DATA_DIR or
      ~/tensorflow_datasets.

  Raises:
    FileNotFoundError: it is not prepared there.
    OSError: something there is neither a folder nor a regular file.
    ValueError: what is prepared there cannot be read without TensorFlow, or at
      all.
  """
  corpora.refuse_odd(name, data_dir)
  try:
    with corpora.quiet(), _only_own_features():
      builder = tfds.builder(name, data_dir=data_dir)
      prepared = builder.is_prepared()
  except tfds.core.DatasetNotFoundError:
    # Code of TFDS that cannot be imported without TensorFlow.
    prepared = False
  except Exception as error:  # TFDS and Protobuf raise many kinds on damage.
    folder = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR, name)
    raise corpora.damaged(folder, error) from error
  if not prepared:
    raise FileNotFoundError(
      f"{name} is not prepared in"
      f" {data_dir or '$TFDS_DATA_DIR or ~/tensorflow_datasets'}; prepare it"
      f" by: {_command(name, data_dir)}"
    )
  file_format = builder.info.file_format.value
  if file_format != "array_record":
    raise ValueError(
      f"{name} lies in {builder.data_dir} as {file_format} files, which only"
      " TensorFlow reads; remove them and prepare it by:"
      f" {_command(name, data_dir)}"
    )
  return builder


@contextlib.contextmanager
def _only_own_features() -> Iterator[None]:
  """Keeps TFDS from importing whatever module a copy's features.json names."""
  base = tfds.features.FeatureConnector
  find = base.cls_from_name

  def find_own(name: str) -> type[tfds.features.FeatureConnector]:
    if not name.startswith(_FEATURES):
      raise ValueError(f"features.json names {name!r}, which is not of TFDS")
    return find(name)

  base.cls_from_name = find_own
  try:
    yield
  finally:
    base.cls_from_name = find


def _command(name: str, data_dir: str | os.PathLike | None) -> str:
  where = (
    f", data_dir='{pathlib.Path(data_dir).absolute()}'" if data_dir else ""
  )
  return (
    'pip install tensorflow-cpu && python -c "import tensorflow_datasets as'
    f" tfds; tfds.builder('{name}'{where}).download_and_prepare("
    "file_format='array_record')\""
  )
