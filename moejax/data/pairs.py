"""Pairs of a sentence and its translation, from one's own files or of TFDS."""

import collections
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import tensorflow_datasets as tfds

from moejax import terminal
from moejax.data import corpora, file_names, lines, published
from moejax.data.lines import Paths

_WMT14 = "wmt14_translate"
_WMT14_PAIRS = ("de-en", "fr-en")  # those of the paper
_NAMED = re.compile(r"(\w+(?:-\w+)+)=(.+)")
# What may be meant to be named; a path has a point or a slash soon.
_MEANT = re.compile(r"([^=./\\]*)=(.*)")
# Of the lines that are left out for one reason, those whose numbers are told.
_TOLD = 3


class Direction(NamedTuple):
  """Which language is translated into which.

  A subtag of a language comes after "_", as in "pt_BR".
  """

  source: str
  target: str

  def __str__(self) -> str:
    return f"{self.source}-{self.target}"


NO_LANGUAGES = Direction("source", "target")


class Pairs(NamedTuple):
  """Sentences of a split, and the translation of each.

  Attributes:
    direction: their languages.
    split: its name.
    sources: read when asked for where they are `corpora.Records`.
    targets: as many.
  """

  direction: Direction
  split: str
  sources: Sequence[str]
  targets: Sequence[str]


def named_files(value: str | Sequence[str]) -> dict[Direction, list[str]]:
  """Reads "en-fr=a.tsv.xz,en-de=b.tsv": files, parted by commas, by direction.

  A plain path, whose languages do not matter, is of `NO_LANGUAGES`; one that
  would pass for a named file begins with "./".

  Raises:
    ValueError: some paths are plain and others are not, or the languages can be
      read in more ways than one.
  """
  files: dict[Direction, list[str]] = {}
  for item in file_names.find(value):
    direction, path = NO_LANGUAGES, item
    if named := _NAMED.fullmatch(item):
      direction, path = _direction(named[1], item), named[2]
    elif (meant := _MEANT.match(item)) and not pathlib.Path(item).exists():
      raise ValueError(
        f"{item} is no file, nor is {meant[1]!r} two languages; name them as in"
        f" en-fr={meant[2]}"
      )
    files.setdefault(direction, []).append(path)
  if NO_LANGUAGES in files and len(files) > 1:
    path = files.pop(NO_LANGUAGES)[0]
    raise ValueError(
      f"{path} has no languages where other files have; name them, as in"
      f" {next(iter(files))}={path}"
    )
  return files


def _direction(name: str, item: str) -> Direction:
  """Reads "en-fr", "en-pt_BR" or "en-pt-BR".

  Where subtags come after "-" too, a language begins in small letters and a
  script or country with a capital, as ISO writes them.
  """
  tags = name.split("-")
  ways = [
    Direction("_".join(tags[:cut]), "_".join(tags[cut:]))
    for cut in range(1, len(tags))
  ]
  if len(ways) == 1:
    return ways[0]
  plain = [
    way for way in ways if all(language[0].islower() for language in way)
  ]
  if len(plain) != 1:
    raise ValueError(
      f"{name} in {item} may be {' or '.join(map(str, plain or ways))}; write"
      f" the one that is meant, or ./{item} for a file of this name"
    )
  return plain[0]


def directions(
  files: Mapping[Direction, Paths], both_directions: bool
) -> list[Direction]:
  """Returns which ways the files of each direction serve."""
  back = [Direction(*each[::-1]) for each in files] if both_directions else []
  return [*files, *back]


def target_languages(parts: Iterable[Pairs]) -> tuple[str, ...]:
  """Returns the languages that a source must name; none where there is one."""
  languages = sorted({pairs.direction.target for pairs in parts})
  return tuple(languages) if len(languages) > 1 else ()


def texts(parts: Iterable[Pairs]) -> Iterator[str]:
  """Iterates over all sentences, of what serves both directions once."""
  sides = itertools.chain.from_iterable((p.sources, p.targets) for p in parts)
  once = {id(side): side for side in sides}
  return itertools.chain.from_iterable(once.values())


# -- files --------------------------------------------------------------------


class _LeftOut:
  """Lines of a file that are no pair: how many, why, and where the first are.

  Args:
    path: of the file.
    strict: whether the first is refused instead.
  """

  def __init__(self, path: pathlib.Path, strict: bool):
    self._path, self._strict = path, strict
    self._numbers: dict[str, list[int]] = {}

  def add(self, number: int, reason: str) -> None:
    if self._strict:
      raise ValueError(
        f"{self._path}: line {number} is {reason}; mend it, or set"
        " config.data.strict=False to leave such lines out"
      )
    self._numbers.setdefault(reason, []).append(number)

  def report(self, total: int) -> None:
    """Says so in one line, of a file of so many lines."""
    if not self._numbers:
      return
    reasons = []
    for reason, numbers in sorted(self._numbers.items(), reverse=True):
      told = ", ".join(map(str, numbers[:_TOLD]))
      more = ", ..." if len(numbers) > _TOLD else ""
      noun = "line" if len(numbers) == 1 else "lines"
      reasons.append(f"{len(numbers):,} {reason} ({noun} {told}{more})")
    count = sum(map(len, self._numbers.values()))
    terminal.warn(
      f"{self._path}: {count:,} of {total:,} lines left out:"
      f" {', '.join(reasons)}",
    )


def _read(path: pathlib.Path, strict: bool, loud: bool) -> Iterator[tuple]:
  """Yields (source, target) of the lines that have both; reports the rest."""
  left_out = _LeftOut(path, strict)
  number = 0
  for number, line in lines.numbered(path):
    sides = [side.strip() for side in line.split("\t")]
    if len(sides) == 2 and all(sides):
      yield sides[0], sides[1]
    elif len(sides) == 2:
      left_out.add(number, "with an empty side")
    elif any(sides):
      left_out.add(number, "without exactly one tab")
  if loud:
    left_out.report(number)


def _refuse_empty(path: pathlib.Path, count: int) -> None:
  if not count:
    raise ValueError(
      f"{path} holds no pair; write a sentence, a tab and its translation on"
      " each line"
    )


def read_pairs(
  paths: Paths, direction: Direction, strict: bool = False
) -> Pairs:
  """Reads tab-separated files, all in the one split "data".

  Args:
    paths: of files as `PairFiles` reads them.
    direction: which way they translate.
    strict: whether a line that is no pair is refused.

  Raises:
    FileNotFoundError: a file does not exist.
    ValueError: a path is a directory, or a file damaged, not UTF-8 or without
      a pair, or a line is none where that is refused.
  """
  found: list[tuple[str, str]] = []
  for path in map(pathlib.Path, paths):
    lines.check(path)
    before = len(found)
    found.extend(_read(path, strict, loud=True))
    _refuse_empty(path, len(found) - before)
  sources, targets = map(list, zip(*found, strict=True))
  return Pairs(direction, "data", sources, targets)


class PairFiles(corpora.TextFiles, skip_registration=True):
  """Files of lines `source<TAB>target`, plain or compressed, in UTF-8.

  A record is a pair. A line without exactly one tab or with an empty side is
  left out, and reported when the copy is made; or refused. Blank lines are
  skipped. All else is as for `corpora.TextFiles`.
  """

  FIELDS = ("source", "target", "document")

  def __init__(self, *, strict: bool = False, **files):
    """Takes the arguments of `corpora.TextFiles`.

    Args:
      strict: whether a line that is no pair is refused.
      **files: train, validation, test and data_dir.

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: a path is a directory, or there is no train file.
    """
    self._strict = strict
    super().__init__(**files)

  def _name(self):
    # A copy made with lines left out must not pass for a strict one.
    return super()._name() + ("_strict" if self._strict else "")

  def check(self):
    for path in self.sources:
      lines.check(path)

  def _read(self, path):
    return _read(path, self._strict, loud=False)

  def _count(self, path):
    count = sum(1 for _ in _read(path, self._strict, loud=True))
    _refuse_empty(path, count)
    return count


def open_pairs(
  train: Mapping[Direction, Paths],
  validation: Mapping[Direction, Paths],
  test: Mapping[Direction, Paths],
  data_dir: str | os.PathLike | None = None,
  both_directions: bool = False,
  strict: bool = False,
) -> dict[str, list[Pairs]]:
  """Opens the splits of one's own files; prepares them the first time.

  A split for which a direction has no files is carved out of its train files,
  and of these alone: it says so where directions share a language.

  Args:
    train: the files of each direction.
    validation: of the same directions or fewer.
    test: likewise.
    data_dir: where prepared copies are kept; None is where TFDS keeps them,
      $TFDS_DATA_DIR or ~/tensorflow_datasets.
    both_directions: whether each pair also serves the other way round.
    strict: whether a line that is no pair is refused.

  Returns:
    split -> what there is for each direction.

  Raises:
    FileNotFoundError: a file does not exist.
    ValueError: there is no train file, or files that `PairFiles` cannot use, or
      files of a direction that has none to train on, or that serve a direction
      which has its own.
  """
  if not train:
    raise ValueError("translation needs 1 train file or more, got 0")
  splits = {"train": train, "validation": validation, "test": test}
  for split, files in splits.items():
    for direction in files:
      if direction not in train:
        raise ValueError(
          f"there are {split} files for {direction}, but the train files are"
          f" for {', '.join(map(str, train))}; give train files of it as well"
        )
  ways = directions(train, both_directions)
  for back in ways[len(train) :]:
    if ways.count(back) > 1:
      raise ValueError(
        f"there are train files for {back}, and both_directions makes more of"
        f" those for {Direction(*back[::-1])}; turn the columns of the ones"
        " around to put them with the others, or set both_directions=False"
      )
  _tell_of_leaks(splits)
  opened: dict[str, list[Pairs]] = {split: [] for split in splits}
  for direction in train:
    own = {split: files.get(direction, ()) for split, files in splits.items()}
    make = functools.partial(PairFiles, strict=strict, data_dir=data_dir, **own)
    builder = corpora.prepared(make)
    for split in splits:
      there = _of_builder(builder, split, direction, ("source", "target"))
      opened[split].append(there)
      if both_directions:
        opened[split].append(_turned(there))
  return opened


def _tell_of_leaks(splits: Mapping[str, Mapping[Direction, Paths]]) -> None:
  """Says that carving each direction by itself may hold out too little."""
  train = splits["train"]
  carved = [split for split, files in splits.items() if len(files) < len(train)]
  languages = collections.Counter(itertools.chain.from_iterable(train))
  shared = [language for language, count in languages.items() if count > 1]
  if carved and shared:
    terminal.warn(
      f"{' and '.join(carved)} are carved out of the files of each direction by"
      f" itself: a sentence in {' or '.join(shared)} that stands in files of"
      " several is trained on in one though another holds it out; where there"
      f" are such, give files for {' and '.join(carved)}",
    )


def _of_builder(
  builder: tfds.core.DatasetBuilder,
  split: str,
  direction: Direction,
  fields: Sequence[str],
) -> Pairs:
  with corpora.quiet():
    sources, targets = (corpora.Records(builder, split, f) for f in fields)
  return Pairs(direction, split, sources, targets)


def _turned(pairs: Pairs) -> Pairs:
  """Returns the pairs of the other way round."""
  back = Direction(*pairs.direction[::-1])
  return Pairs(back, pairs.split, pairs.targets, pairs.sources)


# -- WMT ----------------------------------------------------------------------


def wmt14_direction(pair: str) -> Direction:
  """Reads "en-fr" or "fr-en".

  Raises:
    ValueError: WMT'14 of TFDS has no such pair.
  """
  return _wmt14(pair)[0]


def _wmt14(pair: str) -> tuple[Direction, str]:
  """Returns the direction of a pair, and what TFDS calls it."""
  languages = pair.split("-")
  for name in _WMT14_PAIRS:
    if sorted(name.split("-")) == sorted(languages):
      return Direction(*languages), name
  raise ValueError(
    f"of {_WMT14} there are {' and '.join(_WMT14_PAIRS)}, either way round;"
    f" {pair!r} is neither"
  )


def open_wmt14(
  pair: str, data_dir: str | os.PathLike | None = None
) -> dict[str, list[Pairs]]:
  """Opens train, validation and test of WMT'14 (sec. 5.3), as TFDS has them.

  Args:
    pair: source and target language, "en-fr" or "fr-en".
    data_dir: where TFDS prepared it; None is its own place, $TFDS_DATA_DIR or
      ~/tensorflow_datasets.

  Returns:
    split -> what there is, of the one direction.

  Raises:
    FileNotFoundError: it is not prepared there.
    ValueError: TFDS has no such pair, or the files there cannot be read.
  """
  direction, name = _wmt14(pair)
  builder = published.opened(f"{_WMT14}/{name}", data_dir)
  return {
    split: [_of_builder(builder, split, direction, direction)]
    for split in ("train", "validation", "test")
  }
