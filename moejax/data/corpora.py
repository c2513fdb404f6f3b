"""What a config's section `data` opens: a tokenizer, and rows of each split."""

import collections
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

from moejax import files as files_lib
from moejax import terminal
from moejax.data import packing, text_files, tfds_corpora
from moejax.data.packing import Direction, Pairs, Rows, Tokenizer, Tokens
from moejax.data.pieces import Pieces
from moejax.data.tfds_corpora import DataDir, Records
from moejax.data.vocab import TokenizedVocabulary, Vocabulary
from moejax.named import Names, Paths, Size

# A text of words in which more are unknown, or fewer known, is doubted.
_MANY_UNKNOWN = 0.25
_FEW_WORDS = 100


class Corpus(NamedTuple):
  """What a run learns from, and is measured on.

  Attributes:
    vocabulary: gives the ids, of words or, for translation, of word pieces.
    pairs: split -> what there is for each direction of translation; of a
      language model, the sentences.
    row_length: places L of a row's targets.
    batch_size: rows B of a batch, over all devices. The paper counts a batch in
      words (of the target): that is B x L, of which packing leaves less than
      one in a hundred empty where rows are longer than most sentences, and the
      target fills its rows before the source does.
    source_length: places M of a row's sources; 0 for a language model.
    temperature: of sampling directions, see `packing.MultiDirection`.
  """

  vocabulary: Tokenizer
  pairs: Mapping[str, Sequence[Pairs]]
  row_length: int
  batch_size: int
  source_length: int = 0
  temperature: float = 1.0

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of the parts."""
    return tuple(self.pairs)

  def tokens(self, split: str) -> list[Tokens]:
    """Reads a split as ids, those of each direction."""
    return [packing.tokenize(p, self.vocabulary) for p in self.pairs[split]]

  def rows(self, split: str) -> Rows:
    """Packs a split into rows; what is made of a prepared corpus is cached.

    Says how many sentences are in no row, and warns of words that are too few,
    or too often unknown, to be words.
    """
    parts = []
    for pairs, tokens in zip(
      self.pairs[split], self.tokens(split), strict=True
    ):
      rows = packing.PackedRows(
        tokens, self.vocabulary, self.row_length, self.source_length
      )
      if rows.left_out:
        terminal.warn(f"{pairs}: {rows.left_out}")
      parts.append(rows)
    if self.source_length:
      return packing.MultiDirection(parts, self.temperature)
    (rows,) = parts
    if rows.unknown > _MANY_UNKNOWN or len(self.vocabulary) < _FEW_WORDS:
      terminal.warn(
        f"{split}: {rows.unknown:.0%} of {rows.num_words:,} words are unknown"
        f" to the vocabulary of {len(self.vocabulary):,}, so that perplexity"
        " says little; see that the text has spaces between words and is in the"
        " language trained on, give more of it, or lower config.data.min_count"
      )
    return rows


# -- files of pairs -----------------------------------------------------------

NO_LANGUAGES = Direction("source", "target")
_NAMED = re.compile(r"(\w+(?:-\w+)+)=(.+)")
# What may be meant to be named; a path has a point or a slash soon.
_MEANT = re.compile(r"([^=./\\]*)=(.*)")


def named_files(value: str | Sequence[str]) -> dict[Direction, list[str]]:
  """Reads "en-fr=a.tsv.xz,en-de=b.tsv": files, parted by commas, by direction.

  A plain path, whose languages do not matter, is of `NO_LANGUAGES`; one that
  would pass for a named file begins with "./". ValueError where some paths are
  plain and others are not, or languages can be understood in two ways.
  """
  files: dict[Direction, list[str]] = {}
  for item in text_files.find(value):
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
  possible = [
    Direction("_".join(tags[:cut]), "_".join(tags[cut:]))
    for cut in range(1, len(tags))
  ]
  small = [d for d in possible if all(language[0].islower() for language in d)]
  if len(possible) > 1 and len(small) != 1:
    raise ValueError(
      f"{name} in {item} may be {' or '.join(map(str, small or possible))};"
      f" write the one that is meant, or ./{item} for a file of this name"
    )
  return possible[0] if len(possible) == 1 else small[0]


def directions(
  files: Iterable[Direction], both_directions: bool
) -> list[Direction]:
  """Returns the directions that files of these directions serve."""
  back = [Direction(*each[::-1]) for each in files] if both_directions else []
  return [*files, *back]


def open_pairs(
  train: Mapping[Direction, text_files.Paths],
  validation: Mapping[Direction, text_files.Paths],
  test: Mapping[Direction, text_files.Paths],
  data_dir: DataDir = None,
  both_directions: bool = False,
  strict: bool = False,
) -> dict[str, list[Pairs]]:
  """Opens the splits of one's own files; prepares them the first time.

  A split for which a direction has no files is carved out of its train files,
  and of these alone: it says so where directions share a language. ValueError
  for files of a direction that has none to train on, or that has its own where
  those of the other one serve it too.

  Returns:
    split -> what there is for each direction, and for each in return.
  """
  splits = {"train": train, "validation": validation, "test": test}
  for split, files in splits.items():
    for direction in files:
      if direction not in train:
        raise ValueError(
          f"there are {split} files for {direction}, but the train files are"
          f" for {', '.join(map(str, train))}; give train files of it as well"
        )
  served = directions(train, both_directions)
  for back in served[len(train) :]:
    if served.count(back) > 1:
      raise ValueError(
        f"there are train files for {back}, and both_directions makes more of"
        f" those for {Direction(*back[::-1])}; turn the columns of the ones"
        " around to put them with the others, or set both_directions=False"
      )
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
  opened: dict[str, list[Pairs]] = {split: [] for split in splits}
  # Without any, `PairFiles` says what is missing.
  for direction in train or [NO_LANGUAGES]:
    own = {split: files.get(direction, ()) for split, files in splits.items()}
    builder = tfds_corpora.prepared(
      functools.partial(tfds_corpora.PairFiles, own, data_dir, strict)
    )
    for split, found in opened.items():
      sides = [Records(builder, split, side) for side in ("source", "target")]
      found.append(Pairs(direction, split, *sides))
      if both_directions:
        found.append(Pairs(Direction(*direction[::-1]), split, *sides[::-1]))
  return opened


def read_pairs(
  paths: text_files.Paths, direction: Direction, strict: bool = False
) -> Pairs:
  """Reads files of pairs, all in the one split "data"."""
  found: list[tuple[str, str]] = []
  for path in map(pathlib.Path, paths):
    text_files.check(path)
    found += tfds_corpora.pair_lines(path, strict)
  sources, targets = map(list, zip(*found, strict=True))
  return Pairs(direction, "data", sources, targets)


def read_lines(paths: text_files.Paths) -> list[str]:
  """Reads the lines of text files, and warns of what may not be meant."""
  found: list[str] = []
  for path in map(pathlib.Path, paths):
    tfds_corpora.TextFiles.check(path)
    found += (line for (line,) in tfds_corpora.text_lines(path))
  return found


# -- kinds of a config --------------------------------------------------------

# A kind of tokenizer -> the run's own, or None where there is no run yet.
OfRun = Callable[[type[Tokenizer]], Tokenizer | None]


def _local(path: str) -> str:
  """Returns the path on a disk that is meant, if any is."""
  return path and str(files_lib.local(path))


def _data_dir(path: str) -> str | None:
  """Returns where prepared corpora lie; None for TFDS's own place."""
  return _local(path or os.environ.get("TFDS_DATA_DIR", "")) or None


def _sentences(texts: Mapping[str, Sequence[str]]) -> dict[str, list[Pairs]]:
  return {s: [Pairs(None, s, None, lines)] for s, lines in texts.items()}


def _prose(
  kind: str,
  of_run,
  files,
  row_length: Size,
  batch_size: Size,
  min_count: int = 3,
  data_dir: str = "",
  train: Paths = "",
  validation: Paths = "",
  test: Paths = "",
) -> Corpus:
  """Opens text.

  Args:
    row_length: words of a row; of pairs, word pieces of the target.
    batch_size: rows of a batch.
    min_count: words that the text has less often are unknown.
    data_dir: where prepared corpora lie; "" is TFDS's own place.
    train: files to learn from.
    validation: files to find the best checkpoint by; "" takes a part of train.
    test: files to measure that one by; "" takes a part of train.
  """
  splits = {"train": train, "validation": validation, "test": test}
  for split, value in splits.items():
    if value and kind != "text" and not files:
      raise ValueError(
        f"config.data.{split} names files, but config.data.kind is {kind!r};"
        " set config.data.kind=text to read them."
      )
  if files:
    texts = {"data": read_lines(text_files.find(files))}
  else:
    make = tfds_corpora.Sotu
    if kind == "text":
      found = {split: text_files.find(value) for split, value in splits.items()}
      make = functools.partial(tfds_corpora.TextFiles, found)
    make = functools.partial(make, data_dir=_data_dir(data_dir))
    builder = tfds_corpora.prepared(make)
    texts = {split: Records(builder, split) for split in builder.info.splits}
  vocabulary = of_run(TOKENIZERS[kind])
  if vocabulary is None:
    vocabulary = TOKENIZERS[kind].build(texts["train"], min_count)
  return Corpus(vocabulary, _sentences(texts), row_length, batch_size)


# The benchmark holds out 50 files; as many sentences as one of them.
_VALIDATION_PART = 50


def _lm1b(
  of_run,
  files,
  vocab_file: str,
  vocab_size: Size,
  row_length: Size,
  batch_size: Size,
  data_dir: str = "",
  test: str = "",
) -> Corpus:
  """Opens the One Billion Word benchmark (sec. 5.1, app. C.1).

  Nothing is taken from train. TFDS mixes the benchmark's 50 held-out files
  into one split; a fiftieth of that is validation, and the rest is the test.
  Published results are of the first of the 50 files alone: given that file, it
  is the test, and validation does without its sentences.

  Args:
    vocab_file: one word a line, the most frequent first.
    vocab_size: entries of the vocabulary.
    test: path of news.en.heldout-00000-of-00050; "" is what TFDS holds out.
  """
  tokenizer = TOKENIZERS["lm1b"]
  vocabulary = of_run(tokenizer)
  if vocabulary is None:
    path = pathlib.Path(_local(vocab_file))
    if not path.is_file():
      raise FileNotFoundError(
        f"config.data.vocab_file is '{vocab_file}', which is no file; give one"
        f" of {vocab_size:,} entries, one a line, frequent first; published"
        " with the benchmark is vocab-2016-09-10.txt, of 793,471"
      )
    vocabulary = tokenizer.load(path)
    if len(vocabulary) != vocab_size:
      cure = "the file of that size"
      if len(vocabulary) > vocab_size:
        cure = f"its first {vocab_size:,} lines (head -n {vocab_size})"
      raise ValueError(
        f"{path} has {len(vocabulary):,} entries, but config.data.vocab_size is"
        f" {vocab_size:,}; give {cure}, or the size of that file"
      )
  if files:
    texts = {"data": read_lines(text_files.find(files))}
  else:
    builder = tfds_corpora.downloaded("lm1b", _data_dir(data_dir))
    count = builder.info.splits["test"].num_examples
    few = max(1, count // _VALIDATION_PART)
    parts = {"train": "train", "validation": f"test[:{few}]"}
    parts["test"] = f"test[{few}:]"
    texts = {split: Records(builder, part) for split, part in parts.items()}
    if test:
      texts["test"] = read_lines([_local(test)])
      tested = set(texts["test"])
      texts["validation"] = [t for t in texts["validation"] if t not in tested]
  return Corpus(vocabulary, _sentences(texts), row_length, batch_size)


def _pairs(
  of_run,
  files,
  train: Paths,
  vocab_size: Size,
  row_length: Size,
  source_length: Size,
  batch_size: Size,
  validation: Paths = "",
  test: Paths = "",
  data_dir: str = "",
  both_directions: bool = False,
  temperature: float = 1.0,
  strict: bool = False,
) -> Corpus:
  """Opens pairs of sentences.

  Args:
    source_length: word pieces of a row of the source.
    both_directions: whether each pair serves in both directions.
    temperature: above 1 small pairs of languages are read more often.
    strict: whether to refuse lines that are no pair, or else leave them out.
  """
  named = list(map(named_files, (train, validation, test)))
  known = directions(named[0], both_directions)
  pairs = _given_pairs(files, known, strict) or open_pairs(
    *named, _data_dir(data_dir), both_directions, strict
  )
  return Corpus(
    _pieces(of_run, pairs, vocab_size),
    pairs,
    row_length,
    batch_size,
    source_length,
    temperature,
  )


_WMT14 = ("de-en", "fr-en")  # those of the paper
# TFDS has the last as the validation of wmt14_translate.
_VALIDATIONS = ("newstest2012", "newstest2013")


def _wmt14(
  of_run,
  files,
  pair: str,
  vocab_size: Size,
  row_length: Size,
  source_length: Size,
  batch_size: Size,
  data_dir: str = "",
  validation: Sequence[Annotated[str, Names(_VALIDATIONS)]] = ("newstest2013",),
) -> Corpus:
  """Opens pairs of WMT'14 (sec. 5.3).

  The test is newstest2014.

  Args:
    pair: of languages, such as "en-fr".
    validation: tests of earlier years, of which TFDS prepares newstest2012 by
      itself; the paper has both.
  """
  languages = pair.split("-")
  names = [n for n in _WMT14 if sorted(n.split("-")) == sorted(languages)]
  if not names:
    raise ValueError(
      f"of wmt14_translate there are {' and '.join(_WMT14)}, in either"
      f" direction; {pair!r} is neither"
    )
  direction = Direction(*languages)
  pairs = _given_pairs(files, [direction], strict=False)
  if not pairs:
    name = f"wmt14_translate/{names[0]}"
    corpus = tfds_corpora.downloaded(name, _data_dir(data_dir))

    def side(split, language):
      """The texts of one language, of one builder or of several."""
      if split != "validation":
        return Records(corpus, split, language)
      parts = [
        Records(corpus, split, language)
        if each == _VALIDATIONS[-1]
        else Records(others[each], split, language)
        for each in validation
      ]
      # Of several there is no prepared copy to keep their ids with.
      return parts[0] if len(parts) == 1 else [*itertools.chain(*parts)]

    others = {
      each: tfds_corpora.news_test(each, names[0], _data_dir(data_dir))
      for each in validation
      if each != _VALIDATIONS[-1]
    }
    pairs = {
      split: [Pairs(direction, split, *(side(split, n) for n in direction))]
      for split in ("train", "validation", "test")
    }
  vocabulary = _pieces(of_run, pairs, vocab_size)
  return Corpus(vocabulary, pairs, row_length, batch_size, source_length)


def _given_pairs(
  files: Sequence[str], known: Sequence[Direction], strict: bool
) -> dict[str, list[Pairs]]:
  """Reads the pairs of files as the only split; none where there are none."""
  found = []
  for direction, paths in named_files(files).items():
    if direction not in known:
      if direction != NO_LANGUAGES or len(known) > 1:
        raise ValueError(
          f"{paths[0]}: pairs of {direction} were not trained, only of"
          f" {', '.join(map(str, known))}; name one, as in"
          f" {known[0]}={paths[0]}"
        )
      direction = known[0]
    found.append(read_pairs(paths, direction, strict))
  return {"data": found} if found else {}


def _pieces(
  of_run: OfRun, pairs: Mapping[str, Sequence[Pairs]], size: int
) -> Pieces:
  """Returns the pieces of the run; of what is to be one, those of its text."""
  pieces = of_run(Pieces)
  if pieces is not None:
    return pieces
  train = pairs["train"]
  # What serves both directions is read once.
  sides = itertools.chain.from_iterable(p.sides.values() for p in train)
  once = {id(side): side for side in sides}
  texts = itertools.chain.from_iterable(once.values())
  # Where there are several target languages, a source names its own.
  languages = sorted({each.direction.target for each in train})
  return Pieces.train(texts, size, languages if len(languages) > 1 else ())


DATA = {
  "sotu": functools.partial(_prose, "sotu"),
  "text": functools.partial(_prose, "text"),
  "lm1b": _lm1b,
  "pairs": _pairs,
  "wmt14": _wmt14,
}
# Of each, the kind of tokenizer that a run keeps.
TOKENIZERS: dict[str, type[Tokenizer]] = {
  "sotu": Vocabulary,
  "text": Vocabulary,
  "lm1b": TokenizedVocabulary,
  "pairs": Pieces,
  "wmt14": Pieces,
}
