"""What a config's section `data` opens, of every kind, and doubts."""

import pathlib
import re
import shutil
import sys

import pytest
import tensorflow_datasets as tfds

from moejax.data import corpora, text_files, tfds_corpora, vocab
from moejax.data.corpora import NO_LANGUAGES, Corpus, named_files
from moejax.data.packing import Direction, MultiDirection, Pairs
from moejax.data.pieces import Pieces
from moejax.data.vocab import Vocabulary

SPLITS = ("train", "validation", "test")
EN_FR = Direction("en", "fr")


def write(path, texts):
  path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
  return path


def lines(count, word="line"):
  return [f"{word} {i}\tligne {i} {word}" for i in range(count)]


def as_lines(parts):
  return [
    f"{source}\t{target}"
    for part in parts
    for source, target in zip(part.sources, part.targets, strict=True)
  ]


def opened(kind, files=(), run=None, **fields):
  """Opens a corpus as a config does; of a run that has a tokenizer, if any."""

  def of_run(kind):
    if run is not None:
      assert isinstance(run, kind)
    return run

  fields = {"row_length": 24, "batch_size": 2} | fields
  return corpora.DATA[kind](of_run=of_run, files=files, **fields)


# -- doubts -------------------------------------------------------------------

WORDS = [f"word{i}" for i in range(120)]


def of_words(**texts):
  vocabulary = Vocabulary.build(texts["train"], min_count=3)
  splits = {s: [Pairs(None, s, None, own)] for s, own in texts.items()}
  return Corpus(vocabulary, splits, 16, 2)


def test_few_unknown_words_are_no_trouble(capsys):
  train = [" ".join(WORDS)] * 3 + ["rare"]
  rows = of_words(train=train).rows("train")
  assert rows.unknown == pytest.approx(1 / (3 * 121 + 2))
  assert capsys.readouterr() == ("", "")


def test_many_unknown_words_are_warned_of(capsys):
  train = [" ".join(WORDS)] * 3
  both = of_words(train=train, test=["none of these", WORDS[0], "", " "])
  assert both.rows("test").unknown == 3 / 6
  said = capsys.readouterr().err
  assert "test: 2 of 4 left out: 2 without words" in said
  assert "test: 50% of 6 words are unknown to the vocabulary of 123" in said
  both.rows("train")
  assert capsys.readouterr().err == ""
  of_words(train=["a b c a b c a b c"]).rows("train")
  assert "unknown to the vocabulary of 6, so" in capsys.readouterr().err


# -- text ---------------------------------------------------------------------


def test_a_text_has_words_of_its_own_or_of_the_run(tmp_path):
  path = write(tmp_path / "a.txt", ["a b", "a a b c"] * 20)
  data = opened("text", train=str(path), min_count=21, data_dir=str(tmp_path))
  assert data.splits == SPLITS
  assert data.vocabulary.decode(range(3, len(data.vocabulary))) == ["a", "b"]
  assert (data.batch_size, data.row_length, data.source_length) == (2, 24, 0)
  assert len(data.rows("train")) > 0
  (tokens,) = data.tokens("test")
  assert tokens.lengths["target"].tolist() == [3, 5]
  own = Vocabulary(["</S>", "<S>", "<UNK>", "c"])
  data = opened("text", [str(path)], own, train="nowhere.txt")
  assert data.splits == ("data",) and data.vocabulary is own
  assert list(data.pairs["data"][0].targets) == ["a b", "a a b c"] * 20


def test_files_of_another_kind_are_refused(tmp_path):
  message = "config.data.test names files, but config.data.kind is 'sotu'"
  with pytest.raises(ValueError, match=message):
    opened("sotu", test="a.txt", data_dir=str(tmp_path))


def test_where_prepared_copies_lie(tmp_path, monkeypatch):
  path = write(tmp_path / "a.txt", ["a b"] * 20)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  for data_dir in ("", str(tmp_path / "own")):
    opened("text", train=str(path), data_dir=data_dir)
    there = data_dir or str(tmp_path / "tfds")
    assert list(pathlib.Path(there).glob("text_files/*/1.0.1"))


# -- files of pairs -----------------------------------------------------------


@pytest.mark.parametrize(
  "value, want",
  [
    (
      "en-fr=a.tsv.xz,en-de=b.tsv,en-fr=c=d.tsv",
      {EN_FR: ["a.tsv.xz", "c=d.tsv"], Direction("en", "de"): ["b.tsv"]},
    ),
    ("a-b.tsv,x/k=v.tsv", {NO_LANGUAGES: ["a-b.tsv", "x/k=v.tsv"]}),
    ("", {}),
  ],
)
def test_files_by_direction(value, want):
  assert named_files(value) == want


@pytest.mark.parametrize(
  "name, source, target",
  [
    ("en-pt_BR", "en", "pt_BR"),
    ("en-pt-BR", "en", "pt_BR"),
    ("pt-BR-en", "pt_BR", "en"),
    ("zh-Hans-en", "zh_Hans", "en"),
    ("zh-Hans-zh-Hant", "zh_Hans", "zh_Hant"),
    ("sr-Latn-RS-es-419", "sr_Latn_RS", "es_419"),
    ("cmn_Hant-jpn_Jpan", "cmn_Hant", "jpn_Jpan"),
    ("EN-FR", "EN", "FR"),
  ],
)
def test_languages_with_subtags(name, source, target):
  want = Direction(source, target)
  assert named_files(f"{name}=x-y=z.tsv") == {want: ["x-y=z.tsv"]}
  assert named_files(f"{want}=a") == {want: ["a"]}


@pytest.mark.parametrize(
  "value, message",
  [
    ("en-pt-br=a.tsv", "may be en-pt_br or en_pt-br; .* or ./en-pt-br=a.tsv"),
    ("zh-hans-en=a", "may be zh-hans_en or zh_hans-en"),
    ("EN-PT-BR=a", "may be EN-PT_BR or EN_PT-BR"),
    ("en_fr=a.tsv", "nor is 'en_fr' two languages; .* en-fr=a.tsv"),
    ("en–fr=a.tsv", "nor is 'en–fr' two languages"),
    ("=a.tsv", "nor is '' two languages"),
  ],
)
def test_languages_that_may_be_read_in_two_ways(value, message):
  with pytest.raises(ValueError, match=message):
    named_files(value)
  assert named_files(f"./{value}") == {NO_LANGUAGES: [f"./{value}"]}
  for mixed in (f"en-fr=a.tsv,./{value}", f"./{value},en-fr=a.tsv"):
    with pytest.raises(ValueError, match="has no languages .* name them, as"):
      named_files(mixed)


def test_directions_have_files_of_their_own(tmp_path, capsys):
  files = {
    EN_FR: [write(tmp_path / "fr.tsv", lines(40, "fr"))],
    Direction("en", "de"): [write(tmp_path / "de.tsv", lines(20, "de"))],
  }
  test = {EN_FR: [write(tmp_path / "test.tsv", lines(3, "test"))]}
  splits = corpora.open_pairs(files, {}, test, tmp_path / "tfds")
  leaks = "validation and test are carved out of the files of each direction"
  assert leaks in (said := capsys.readouterr().err) and "sentence in en" in said
  corpora.open_pairs(files, files, files, tmp_path / "tfds")
  assert leaks not in capsys.readouterr().err
  for split, counts in zip(SPLITS, [(38, 18), (2, 1), (3, 1)], strict=True):
    assert [str(part) for part in splits[split]] == [
      f"en-fr {split}",
      f"en-de {split}",
    ]
    assert tuple(len(part.sources) for part in splits[split]) == counts


def test_files_that_cannot_be(tmp_path):
  path = write(tmp_path / "a.tsv", lines(20))
  with pytest.raises(ValueError, match="1 train file or more, got 0"):
    corpora.open_pairs({}, {}, {}, tmp_path)
  message = "test files for en-fr, but the train files are for source-target"
  with pytest.raises(ValueError, match=message):
    corpora.open_pairs({NO_LANGUAGES: [path]}, {}, {EN_FR: [path]}, tmp_path)
  both = {EN_FR: [path], Direction("fr", "en"): [path]}
  message = "files for fr-en, and both_directions makes more of those for en-fr"
  with pytest.raises(ValueError, match=message):
    corpora.open_pairs(both, {}, {}, tmp_path, both_directions=True)
  bad = write(tmp_path / "bad.tsv", ["a\tb", "no tab"])
  assert as_lines([corpora.read_pairs([bad], EN_FR)]) == ["a\tb"]
  for strict in (dict(strict=True), dict(files=[f"en-fr={bad}"], strict=True)):
    with pytest.raises(ValueError, match="line 2 is without exactly one tab"):
      train = f"en-fr={bad}"
      fields = dict(vocab_size=300, source_length=24, data_dir=str(tmp_path))
      opened("pairs", train=train, **fields, **strict)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """The fields of a config."""
  folder = tmp_path_factory.mktemp("pairs")
  path = write(folder / "a.tsv", [f"word{i}\tmot{i} mot" for i in range(40)])
  fields = dict(vocab_size=290, source_length=30, data_dir=str(folder))
  return fields | dict(train=f"en-fr={path}")


def test_pairs_serve_one_direction_or_both(pairs):
  one = opened("pairs", **pairs)
  assert (one.batch_size, one.row_length, one.source_length) == (2, 24, 30)
  assert one.vocabulary.languages == () and len(one.vocabulary) == 290
  both = opened("pairs", both_directions=True, temperature=2.0, **pairs)
  assert both.vocabulary.languages == ("en", "fr")
  there, back = both.pairs["train"]
  assert [str(there.direction), str(back.direction)] == ["en-fr", "fr-en"]
  assert list(back.sources) == list(there.targets)
  assert list(back.targets) == list(there.sources)
  assert there.sources[0] == "word0" and back.sources[0] == "mot0 mot"
  # What serves both directions is read once for the pieces.
  texts = [*there.sources, *there.targets]
  want = Pieces.train(texts, 290, ["en", "fr"])
  assert both.vocabulary.digest == want.digest
  words = [len(t.ids["target"]) for t in both.tokens("train")]
  rows = both.rows("train")
  assert isinstance(rows, MultiDirection) and rows.num_words == sum(words)
  assert words[0] > words[1]
  roots = [count**0.5 for count in words]
  assert rows.shares == pytest.approx([r / sum(roots) for r in roots])


def test_files_of_pairs_in_place_of_the_corpus(pairs, tmp_path):
  pieces = opened("pairs", **pairs).vocabulary
  a = write(tmp_path / "a.tsv", ["a\tb"])
  for name in (str(a), f"en-fr={a}"):
    data = opened("pairs", [name], pieces, **pairs)
    assert data.splits == ("data",) and data.vocabulary is pieces
    (part,) = data.pairs["data"]
    assert str(part) == "en-fr data" and as_lines([part]) == ["a\tb"]
  both = pairs | {"both_directions": True}
  message = "a.tsv: pairs of .* were not trained, only of en-fr.*as in en-fr="
  for name, fields in ((f"en-de={a}", pairs), (str(a), both)):
    with pytest.raises(ValueError, match=message):
      opened("pairs", [name], pieces, **fields)


# -- corpora that TFDS downloads ----------------------------------------------

RECORDS = {
  split: [
    {"en": f"the {split} {i}", "fr": f"le «{split}» {i}"} for i in range(count)
  ]
  for split, count in {"train": 30, "validation": 4, "test": 5}.items()
}
TOKENIZED = {
  split: [f"{split} {i} costs 5\xa0% , he said ." for i in range(count)]
  for split, count in {"train": 50, "test": 200}.items()
}


class Wmt14Translate(tfds.core.ShardBasedBuilder, skip_registration=True):
  """A small corpus of the name, version and features of the real one."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="fr-en")]
  FEATURES = tfds.features.Translation(languages=("fr", "en"))
  RECORDS = RECORDS

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, features=self.FEATURES, disable_shuffling=True
    )

  def _shard_iterators_per_split(self, dl_manager):
    return {
      split: [lambda own=own: enumerate(own)]
      for split, own in self.RECORDS.items()
    }


class WmtTranslate(Wmt14Translate, skip_registration=True):
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="fr-en.newstest2012")]
  RECORDS = {"validation": [{"en": "a new one", "fr": "un autre"}] * 3}


class Lm1b(Wmt14Translate, skip_registration=True):
  VERSION = tfds.core.Version("1.1.0")
  BUILDER_CONFIGS = []
  FEATURES = tfds.features.FeaturesDict({"text": tfds.features.Text()})
  RECORDS = {
    split: [{"text": text} for text in own] for split, own in TOKENIZED.items()
  }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp("tfds")
  with tfds_corpora.quiet():
    for builder in (
      Wmt14Translate(data_dir=data_dir, config="fr-en"),
      WmtTranslate(data_dir=data_dir),
      Lm1b(data_dir=data_dir),
    ):
      builder.download_and_prepare(file_format="array_record")
  return data_dir


@pytest.mark.parametrize("pair", ["en-fr", "fr-en"])
def test_wmt14_has_its_own_splits(prepared, pair, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow", None)  # not needed
  fields = dict(vocab_size=290, source_length=20, data_dir=str(prepared))
  data = opened("wmt14", pair=pair, **fields)
  assert data.splits == SPLITS and data.source_length == 20
  for split, (part,) in data.pairs.items():
    assert str(part) == f"{pair} {split}"
    found = list(zip(part.sources, part.targets, strict=True))
    sides = pair.split("-")
    assert found == [tuple(r[s] for s in sides) for r in RECORDS[split]]
  assert len(data.vocabulary) == 290 and data.vocabulary.languages == ()


@pytest.mark.parametrize("pair", ["en-fr", "fr-en"])
def test_wmt14_is_validated_by_tests_of_earlier_years(
  prepared, pair, monkeypatch
):
  """TFDS knows all of them, of both languages of the paper."""
  monkeypatch.setitem(sys.modules, "tensorflow", None)  # not needed
  fields = dict(vocab_size=290, source_length=20, data_dir=str(prepared))
  both = ("newstest2012", "newstest2013")
  data = opened("wmt14", pair=pair, validation=both, **fields)
  (part,) = data.pairs["validation"]
  records = WmtTranslate.RECORDS["validation"] + RECORDS["validation"]
  found = list(zip(part.sources, part.targets, strict=True))
  assert found == [tuple(r[s] for s in pair.split("-")) for r in records]
  assert data.rows("validation").num_words > 0
  known = {each.name: each for each in tfds.translate.wmt._DEV_SUBSETS}
  assert all({"de", "fr"} <= known[name].sources for name in both)
  of_corpus = tfds.translate.wmt14.Wmt14Translate._subsets.fget(None)
  assert both[1] in of_corpus["validation"] and both[0] not in of_corpus


def test_a_validation_that_is_not_prepared(prepared, tmp_path, monkeypatch):
  """The sentence has the program that prepares it."""
  fields = dict(vocab_size=290, source_length=20, data_dir=str(prepared))
  shutil.copytree(prepared / "wmt14_translate", tmp_path / "wmt14_translate")
  fields["data_dir"] = str(tmp_path)
  match = "wmt_translate/fr-en.newstest2012 is not prepared in .*; prepare it"
  with pytest.raises(FileNotFoundError, match=match) as caught:
    opened("wmt14", pair="en-fr", validation=("newstest2012",), **fields)
  (program,) = re.findall('python -c "(.*)"', str(caught.value))
  asked = []
  monkeypatch.setattr(
    tfds.translate.wmt.WmtTranslate,
    "download_and_prepare",
    lambda builder, **options: asked.append((builder, options)),
  )
  exec(program, {})
  ((builder, options),) = asked
  assert options == {"file_format": "array_record"}
  assert builder.subsets == {"validation": ["newstest2012"]}
  where = tmp_path / "wmt_translate" / "fr-en.newstest2012" / "1.0.0"
  assert pathlib.Path(builder.data_dir) == where


def test_wmt14_that_is_not_there(prepared, tmp_path):
  fields = dict(vocab_size=290, source_length=20, data_dir=str(prepared))
  with pytest.raises(FileNotFoundError, match="te/de-en is not prepared in"):
    opened("wmt14", pair="en-de", **fields)
  for pair in ("en-es", "fr-de", "english", "en-fr-de"):
    with pytest.raises(ValueError, match="de-en and fr-en, in .*is neither"):
      opened("wmt14", pair=pair, **fields)


@pytest.fixture(scope="module")
def lm1b(prepared):
  """The fields of a config."""
  words = sorted({w for text in TOKENIZED["train"] for w in text.split(" ")})
  path = prepared / "vocab.txt"
  write(path, ["</S>", "<S>", "<UNK>", *words])
  size = len(words) + 3
  return {
    "vocab_file": str(path),
    "vocab_size": size,
    "data_dir": str(prepared),
  }


def test_lm1b_holds_out_a_part_or_a_file(lm1b, tmp_path):
  data = opened("lm1b", **lm1b)
  texts = {split: list(data.pairs[split][0].targets) for split in data.splits}
  assert data.splits == SPLITS
  assert texts["train"] == TOKENIZED["train"]
  assert texts["validation"] == TOKENIZED["test"][:4]
  assert texts["test"] == TOKENIZED["test"][4:]
  # Published results are of one file, whose sentences are no validation's.
  first = write(tmp_path / "heldout", TOKENIZED["test"][1:3])
  data = opened("lm1b", test=str(first), **lm1b)
  assert data.pairs["test"][0].targets == TOKENIZED["test"][1:3]
  validation = data.pairs["validation"][0].targets
  assert validation == [TOKENIZED["test"][i] for i in (0, 3)]


def test_lm1b_words_are_parted_by_spaces(lm1b, tmp_path):
  entries = list(text_files.lines(pathlib.Path(lm1b["vocab_file"])))
  line = {entry: number for number, entry in enumerate(entries)}
  assert "5\xa0%" in line
  own = vocab.TokenizedVocabulary.load(pathlib.Path(lm1b["vocab_file"]))
  path = write(tmp_path / "a.txt", TOKENIZED["test"])
  for data, split in (
    (opened("lm1b", **lm1b), "train"),
    (opened("lm1b", [str(path)], own, **lm1b), "data"),
  ):
    want = []
    for sentence in data.pairs[split][0].targets:
      words = sentence.split(" ")
      want += [line.get(word, line["<UNK>"]) for word in words]
      want.append(line["</S>"])
    (tokens,) = data.tokens(split)
    assert tokens.ids["target"].tolist() == want


def test_a_vocabulary_that_cannot_be(lm1b, tmp_path):
  for name in ("", str(tmp_path), str(tmp_path / "nowhere.txt")):
    message = f"config.data.vocab_file is '{name}', which is no file.*entries"
    with pytest.raises(FileNotFoundError, match=message):
      opened("lm1b", **lm1b | {"vocab_file": name})
  for size, message in (
    (793_471, r"vocab.txt has [\d,]+ entries, but .* is 793,471; give the fi"),
    (5, r"is 5; give its first 5 lines \(head -n 5\), or"),
  ):
    with pytest.raises(ValueError, match=message):
      opened("lm1b", **lm1b | {"vocab_size": size})
