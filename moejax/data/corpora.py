"""What a config's section `data` opens: a tokenizer, and rows of each split."""

import collections
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from moejax import files as files_lib
from moejax import terminal
from moejax.config_fields import Names, Paths, Range, Section, Size
from moejax.data import packing, text_files, tfds_corpora, vocab
from moejax.data.packing import (
  Direction,
  PackedRows,
  Pairs,
  Rows,
  Tokenizer,
  Tokens,
)
from moejax.data.pieces import Pieces
from moejax.data.tfds_corpora import Records
from moejax.data.tokenizer_file import TokenizerFile
from moejax.data.vocab import TokenizedVocabulary, Vocabulary

# A text of words in which more are unknown, or fewer known, is doubted.
_MANY_UNKNOWN = 0.25
_FEW_WORDS = 100


class Corpus(NamedTuple):
  """What a run learns from, and is measured on.

  Attributes:
    vocabulary: gives the ids, of words or of other tokens.
    pairs: split -> what there is for each direction of translation; of a
      language model, the sentences.
    row_length: places L of a row's targets.
    batch_size: rows B of a batch, over all devices: what the paper counts in
      words (of the target) is B x L, but for what packing leaves empty.
    source_length: places M of a row's sources; 0 for a language model.
    temperature: of sampling directions, see `packing.MultiDirection`.
    split_words: finds the words of a sentence, whatever its tokens are.
  """

  vocabulary: Tokenizer
  pairs: Mapping[str, Sequence[Pairs]]
  row_length: int
  batch_size: int
  source_length: int = 0
  temperature: float = 1.0
  split_words: Callable[[str], Sequence[str]] = vocab.words

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of the parts."""
    return tuple(self.pairs)

  def tokens(self, split: str) -> list[Tokens]:
    """Reads a split as ids, those of each direction."""
    return [packing.tokenize(p, self.vocabulary) for p in self.pairs[split]]

  def rows(self, split: str) -> Rows:
    """Packs a split into rows; what is made of a prepared corpus is cached.

    Says how many sentences are in no row, and warns of many unknown words.
    """
    lengths = self.row_length, self.source_length
    parts = [
      PackedRows(tokens, self.vocabulary, *lengths)
      for tokens in self.tokens(split)
    ]
    for pairs, rows in zip(self.pairs[split], parts, strict=True):
      if rows.left_out:
        terminal.warn(f"{pairs}: {rows.left_out}")
    if self.source_length:
      return packing.MultiDirection(parts, self.temperature)
    (rows,) = parts
    if rows.unknown > _MANY_UNKNOWN or len(self.vocabulary) < _FEW_WORDS:
      cure = "see that it is in the language that these are of"
      if isinstance(self.vocabulary, Vocabulary):
        cure = (
          "see that the text has spaces between words and is in the language"
          " trained on, give more of it, or lower config.data.min_count"
        )
      terminal.warn(
        f"{split}: {rows.unknown:.0%} of {rows.num_words:,}"
        f" {self.vocabulary.UNIT}s are unknown to the vocabulary of"
        f" {len(self.vocabulary):,}, so that perplexity says little; {cure}"
      )
    return rows

  def size_of_text(self, split: str, rows: PackedRows) -> tuple[int, int]:
    """Counts what the rows of a language model's split hold, as text.

    Returns words, the end of each sentence counted as one, and bytes of UTF-8
    without line breaks. Sentences that are in no row count nothing.
    """
    words = num_bytes = 0
    (pairs,) = self.pairs[split]
    for text, in_rows in zip(pairs.targets, rows.has_ids, strict=True):
      if in_rows:
        words += len(self.split_words(text)) + 1
        num_bytes += len(text.encode())
    return words, num_bytes


# -- files of pairs -----------------------------------------------------------

NO_LANGUAGES = Direction("source", "target")
# A name "LANGUAGES=PATH"; a path has a point or a slash soon.
_NAMED = re.compile(r"([^=./\\]*)=(.*)")
# Two languages, whose subtags come after "_"; or after "-", where a language
# begins in small letters and a script or country does not, as ISO writes them.
_LANGUAGE = r"([a-z]\w*(?:-[A-Z\d]\w*)*)"
_LANGUAGES = re.compile(rf"(\w+)-(\w+)|{_LANGUAGE}-{_LANGUAGE}")


def named_files(value: str | Sequence[str]) -> dict[Direction, list[str]]:
  """Reads "en-fr=a.tsv.xz,en-de=b.tsv": files, parted by commas, by direction.

  A plain path, whose languages do not matter, is of `NO_LANGUAGES`; "./" begins
  one that would pass for a named file. ValueError where only some are named, or
  languages cannot be told.
  """
  files: dict[Direction, list[str]] = {}
  for item in text_files.find(value):
    direction, path = NO_LANGUAGES, item
    if (named := _NAMED.fullmatch(item)) and not pathlib.Path(item).exists():
      path = named[2]
      if not path or not (languages := _LANGUAGES.fullmatch(named[1])):
        raise ValueError(
          f"{item} is no file, nor is {named[1]!r} two languages; name them as"
          f" in en-fr={path} or en-pt_BR={path}, or write ./{item} for a file"
          " of this name"
        )
      source, target = filter(None, languages.groups())
      direction = Direction(source.replace("-", "_"), target.replace("-", "_"))
    files.setdefault(direction, []).append(path)
  if NO_LANGUAGES in files and len(files) > 1:
    path = files.pop(NO_LANGUAGES)[0]
    raise ValueError(
      f"{path} has no languages where other files have; name them, as in"
      f" {next(iter(files))}={path}"
    )
  return files


def directions(
  files: Iterable[Direction], both_directions: bool
) -> list[Direction]:
  """Returns the directions that files of these directions serve."""
  back = [Direction(*each[::-1]) for each in files] if both_directions else []
  return [*files, *back]


def read_pairs(
  paths: text_files.Paths, direction: Direction, strict: bool = False
) -> Pairs:
  """Reads files of pairs, all in the one split "data"."""
  found: list[tuple[str, str]] = []
  sizes = {}
  for path in map(pathlib.Path, paths):
    text_files.check(path)
    before = len(found)
    found += tfds_corpora.pair_lines(path, strict)
    sizes[str(path)] = len(found) - before
  sources, targets = map(list, zip(*found, strict=True))
  return Pairs(direction, "data", sources, targets, sizes)


def read_lines(paths: text_files.Paths) -> Pairs:
  """Reads text files, all in the one split "data".

  Warns of what may not be meant.
  """
  found: list[str] = []
  sizes = {}
  for path in map(pathlib.Path, paths):
    tfds_corpora.TextFiles.check(path)
    before = len(found)
    found += (line for (line,) in tfds_corpora.text_lines(path))
    sizes[str(path)] = len(found) - before
  return Pairs(None, "data", None, found, sizes)


# -- kinds of a config --------------------------------------------------------


def _data_dir(path: str) -> str | None:
  """Returns where prepared corpora lie; None for TFDS's own place."""
  path = path or os.environ.get("TFDS_DATA_DIR", "")
  return str(files_lib.local(path)) if path else None


def _sentences(texts: Mapping[str, Sequence[str]]) -> dict[str, list[Pairs]]:
  return {s: [Pairs(None, s, None, lines)] for s, lines in texts.items()}


def _words(texts, words) -> Vocabulary:
  """Takes words, as the kind of data has them."""
  del texts
  return words()


def _pieces_of_text(texts, words, vocab_size: Size) -> Pieces:
  """Learns word pieces, whatever a space parts.

  Args:
    vocab_size: pieces, 256 bytes and 3 special ones among them.
  """
  del words
  return Pieces.train(texts(), vocab_size)


def _tokens_of_file(
  texts,
  words,
  path: str,
  start: str = "",
  end: str = "",
  vocab_size: Annotated[int, Range(0)] = 0,
) -> TokenizerFile:
  """Reads a tokenizer.json.

  Args:
    path: of the file, of the library tokenizers.
    start: the token before a sentence; "" looks for the usual names.
    end: the token after a sentence; "" looks for the usual names.
    vocab_size: ids that the model has; 0 is as many as the file has.
  """
  del texts, words
  return TokenizerFile.load(files_lib.local(path), start, end, vocab_size)


# Tokens of a language model: of the text to train on, or as its kind has words;
# both are functions.
TOKENS = {
  "words": _words,
  "pieces": _pieces_of_text,
  "file": _tokens_of_file,
}
_Tokens = Annotated[Callable[..., Tokenizer], Section(TOKENS)]
_WORDS = {"kind": "words"}


def _prose(
  kind: str,
  own,
  files,
  row_length: Size,
  batch_size: Size,
  tokens: _Tokens = _WORDS,
  min_count: int = 3,
  data_dir: str = "",
  train: Paths = "",
  validation: Paths = "",
  test: Paths = "",
) -> Corpus:
  """Opens text.

  Args:
    row_length: tokens of a row; of pairs, word pieces of the target.
    batch_size: rows of a batch.
    tokens: what the text is cut into; words by default.
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
    pairs = {"data": [read_lines(text_files.find(files))]}
  else:
    make = tfds_corpora.Sotu
    if kind == "text":
      found = {split: text_files.find(value) for split, value in splits.items()}
      make = functools.partial(tfds_corpora.TextFiles, found)
    builder = tfds_corpora.prepared(
      functools.partial(make, data_dir=_data_dir(data_dir))
    )
    texts = {split: Records(builder, split) for split in builder.info.splits}
    pairs = _sentences(texts)
  if own is None:
    own = tokens(
      texts=lambda: texts["train"],
      words=lambda: Vocabulary.build(texts["train"], min_count),
    )
  return Corpus(own, pairs, row_length, batch_size)


# The benchmark holds out 50 files; as many sentences as one of them.
_VALIDATION_PART = 50


def _lm1b(
  own,
  files,
  row_length: Size,
  batch_size: Size,
  vocab_file: str = "",
  vocab_size: Size = 793_471,
  tokens: _Tokens = _WORDS,
  data_dir: str = "",
  test: str = "",
) -> Corpus:
  """Opens the One Billion Word benchmark (sec. 5.1, app. C.1).

  TFDS mixes the benchmark's 50 held-out files into one split; a fiftieth of
  that is validation, and the rest is the test. Published results are of the
  first of the 50 alone: given that file, it is the test, and validation does
  without its sentences.

  Args:
    vocab_file: one word a line, the most frequent first.
    vocab_size: entries of the vocabulary of words.
    tokens: what the text is cut into; by default words, which are between
      spaces here.
    test: path of news.en.heldout-00000-of-00050; "" is what TFDS holds out.
  """

  def words():
    path = files_lib.local(vocab_file)
    if not path.is_file():
      raise FileNotFoundError(
        f"config.data.vocab_file is '{vocab_file}', which is no file; give one"
        f" of {vocab_size:,} entries, one a line, frequent first; published"
        " with the benchmark is vocab-2016-09-10.txt, of 793,471"
      )
    found = TokenizedVocabulary.load(path)
    if len(found) != vocab_size:
      raise ValueError(
        f"{path} has {len(found):,} entries, but config.data.vocab_size is"
        f" {vocab_size:,}; give the size of that file, or a file of that size"
        f" (its first lines: head -n {vocab_size})"
      )
    return found

  downloaded = functools.partial(
    tfds_corpora.downloaded, "lm1b", _data_dir(data_dir)
  )
  if own is None:
    # Before the text is looked for: a missing file of words is told first.
    own = tokens(texts=lambda: Records(downloaded(), "train"), words=words)
  if files:
    pairs = {"data": [read_lines(text_files.find(files))]}
  else:
    builder = downloaded()
    count = builder.info.splits["test"].num_examples
    few = max(1, count // _VALIDATION_PART)
    parts = {"train": "train", "validation": f"test[:{few}]"}
    parts["test"] = f"test[{few}:]"
    texts = {split: Records(builder, part) for split, part in parts.items()}
    if test:
      texts["test"] = read_lines([files_lib.local(test)]).targets
      tested = set(texts["test"])
      texts["validation"] = [t for t in texts["validation"] if t not in tested]
    pairs = _sentences(texts)
  return Corpus(
    own,
    pairs,
    row_length,
    batch_size,
    split_words=vocab.tokens,
  )


def _pairs(
  own,
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
  splits = {"train": train, "validation": validation, "test": test}
  splits = {split: named_files(paths) for split, paths in splits.items()}
  of_train = splits["train"]
  served = directions(of_train, both_directions)
  pairs = _given_pairs(files, served, strict)
  if not pairs:
    _check_directions(splits, served)
    pairs = {split: [] for split in splits}
    # Without any, `PairFiles` says what is missing.
    for direction in of_train or [NO_LANGUAGES]:
      named = {split: of.get(direction, ()) for split, of in splits.items()}
      builder = tfds_corpora.prepared(
        functools.partial(
          tfds_corpora.PairFiles, named, _data_dir(data_dir), strict
        )
      )
      for split, found in pairs.items():
        sides = [Records(builder, split, side) for side in ("source", "target")]
        found.append(Pairs(direction, split, *sides))
        if both_directions:
          found.append(Pairs(Direction(*direction[::-1]), split, *sides[::-1]))
  vocabulary = _pieces(own, pairs, vocab_size)
  lengths = row_length, batch_size, source_length
  return Corpus(vocabulary, pairs, *lengths, temperature)


def _check_directions(
  splits: Mapping[str, Mapping[Direction, list[str]]],
  served: Sequence[Direction],
) -> None:
  """Refuses files that do not go together, and warns of what they may share."""
  train = splits["train"]
  for split, named in splits.items():
    for direction in named.keys() - train.keys():
      raise ValueError(
        f"there are {split} files for {direction}, but the train files are"
        f" for {', '.join(map(str, train))}; give train files of it as well"
      )
  for back in served[len(train) :]:
    if served.count(back) > 1:
      raise ValueError(
        f"there are train files for {back}, and both_directions makes more of"
        f" those for {Direction(*back[::-1])}; turn the columns of the ones"
        " around to put them with the others, or set both_directions=False"
      )
  # A split without files of a direction takes a part of train.
  carved = [split for split, named in splits.items() if len(named) < len(train)]
  languages = collections.Counter(itertools.chain.from_iterable(train))
  shared = [language for language, count in languages.items() if count > 1]
  if carved and shared:
    terminal.warn(
      f"{' and '.join(carved)} are carved out of the files of each direction by"
      f" itself: a sentence in {' or '.join(shared)} that stands in files of"
      " several is trained on in one though another holds it out; where there"
      f" are such, give files for {' and '.join(carved)}",
    )


_WMT14 = ("de-en", "fr-en")  # those of the paper
# TFDS has the last as the validation of wmt14_translate.
_VALIDATIONS = ("newstest2012", "newstest2013")


def _wmt14(
  own,
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
    where = _data_dir(data_dir)
    corpus = tfds_corpora.downloaded(f"wmt14_translate/{names[0]}", where)
    builders = {"train": [corpus], "validation": [], "test": [corpus]}
    for each in validation:
      if each != _VALIDATIONS[-1]:
        name = f"wmt_translate/{names[0]}.{each}"
        builders["validation"].append(tfds_corpora.downloaded(name, where))
      else:
        builders["validation"].append(corpus)
    pairs = {}
    for split, some in builders.items():
      sides = [[Records(each, split, n) for each in some] for n in direction]
      # Of several there is no prepared copy to keep their ids with.
      texts = [s[0] if len(s) == 1 else [*itertools.chain(*s)] for s in sides]
      pairs[split] = [Pairs(direction, split, *texts)]
  vocabulary = _pieces(own, pairs, vocab_size)
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
  own: Pieces | None, pairs: Mapping[str, Sequence[Pairs]], size: int
) -> Pieces:
  """Returns the pieces of the run; of what is to be one, those of its text."""
  if own is not None:
    return own
  # What serves both directions is read once.
  sides = {id(s): s for p in pairs["train"] for s in p.sides.values()}
  texts = itertools.chain.from_iterable(sides.values())
  # Where there are several target languages, a source names its own.
  languages = sorted({each.direction.target for each in pairs["train"]})
  return Pieces.train(texts, size, languages if len(languages) > 1 else ())


DATA = {
  "sotu": functools.partial(_prose, "sotu"),
  "text": functools.partial(_prose, "text"),
  "lm1b": _lm1b,
  "pairs": _pairs,
  "wmt14": _wmt14,
}
_KEPT: dict[str, type[Tokenizer]] = {
  "sotu": Vocabulary,
  "text": Vocabulary,
  "lm1b": TokenizedVocabulary,
  "pairs": Pieces,
  "wmt14": Pieces,
}
_KEPT_TOKENS: dict[str, type[Tokenizer]] = {
  "pieces": Pieces,
  "file": TokenizerFile,
}


def kept(
  data: Mapping[str, Any],
) -> tuple[type[Tokenizer], dict[str, Any]]:
  """Returns the kind of tokenizer that a run keeps, and what else loads it.

  `data` is the section of a config.
  """
  tokens = data.get("tokens") or _WORDS
  if tokens["kind"] == "words":
    return _KEPT[data["kind"]], {}
  # Pieces hold all in their file.
  names = ("start", "end", "vocab_size") if tokens["kind"] == "file" else ()
  named = {name: tokens[name] for name in names if name in tokens}
  return _KEPT_TOKENS[tokens["kind"]], named
