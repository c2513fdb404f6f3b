"""Corpora that TFDS downloads.

TensorFlow is needed to prepare one, once, and never to read it.
"""

import os
import pathlib

import tensorflow_datasets as tfds

from moejax.data import corpora


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
    ValueError: what is prepared there cannot be read without TensorFlow.
  """
  try:
    with corpora.quiet():
      builder = tfds.builder(name, data_dir=data_dir)
      prepared = builder.is_prepared()
  except tfds.core.DatasetNotFoundError:
    # Code of TFDS that cannot be imported without TensorFlow.
    prepared = False
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


def _command(name: str, data_dir: str | os.PathLike | None) -> str:
  where = (
    f", data_dir='{pathlib.Path(data_dir).absolute()}'" if data_dir else ""
  )
  return (
    'pip install tensorflow-cpu && python -c "import tensorflow_datasets as'
    f" tfds; tfds.builder('{name}'{where}).download_and_prepare("
    "file_format='array_record')\""
  )
