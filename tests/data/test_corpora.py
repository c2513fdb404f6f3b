"""What a config's section `data` opens, of every kind, and doubts."""

import pathlib
import re
import shutil
import sys

import pytest
import tensorflow_datasets as tfds

from moejax import config_fields
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


def both_sides(pairs):
  return list(zip(pairs.sources, pairs.targets, strict=True))


def opened(kind, files=(), run=None, **fields):
  """Opens a corpus as a config does; of a run that has a tokenizer, if any."""
  fields = {"row_length": 24, "batch_size": 2} | fields
  section = {"kind": kind, **fields}
  given = {"own": run, "files": files}
  return config_fields.build(corpora.DATA, section, "config.data", **given)


# -- text ---------------------------------------------------------------------


def test_unknown_words_are_warned_of_where_they_are_many(capsys):
  def of_words(**texts):
    vocabulary = Vocabulary.build(texts["train"], min_count=3)
    splits = {s: [Pairs(None, s, None, own)] for s, own in texts.items()}
    return Corpus(vocabulary, splits, 16, 2)

  words = [f"word{i}" for i in range(120)]
  train = [" ".join(words)] * 3 + ["rare"]
  both = of_words(train=train, test=["none of these", words[0], "", " "])
  assert both.rows("train").unknown == pytest.approx(1 / (3 * 121 + 2))
  assert capsys.readouterr() == ("", "")
  assert both.rows("test").unknown == 3 / 6
  said = capsys.readouterr().err
  assert "test: 2 of 4 left out: 2 without words" in said
  assert "test: 50% of 6 words are unknown to the vocabulary of 123" in said
  of_words(train=["a b c a b c a b c"]).rows("train")
  assert "unknown to the vocabulary of 6, so" in capsys.readouterr().err


def test_a_text_has_words_of_its_own_or_of_the_run(tmp_path, monkeypatch):
  path = write(tmp_path / "a.txt", ["a b", "a a b c"] * 20)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  for own in ("", str(tmp_path / "own")):
    data = opened("text", train=str(path), min_count=21, data_dir=own)
    there = pathlib.Path(own or tmp_path / "tfds")
    assert list(there.glob("text_files/*/1.0.1"))
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
  message = "config.data.test names files, but config.data.kind is 'sotu'"
  with pytest.raises(ValueError, match=message):
    opened("sotu", test="a.txt", data_dir=str(tmp_path))


def test_what_is_scored_is_counted(tmp_path):
  """Words and bytes of all sentences with tokens, of any tokens, cut or not."""
  lines = ["The café, isn't it?", "漢字 " * 30, *["a b c d"] * 60]
  path = write(tmp_path / "a.txt", lines)
  texts = [*lines, "", "\u2028", "  "]
  # "isn't" is one word; the end of each sentence is another.
  words = 6 + 1 + 30 + 1 + 60 * 5
  num_bytes = sum(len(text.encode()) for text in lines)
  for tokens in ({"kind": "words"}, {"kind": "pieces", "vocab_size": 285}):
    own = opened("text", train=str(path), data_dir=str(tmp_path), tokens=tokens)
    data = own._replace(pairs={"all": [Pairs(None, "all", None, texts)]})
    rows = data.rows("all")
    found = data.size_of_text("all", rows)
    if tokens["kind"] == "words":
      assert found == (words, num_bytes) and rows.num_words == words
    else:
      # It has a piece for what ends a line, which no word has.
      assert isinstance(data.vocabulary, Pieces)
      assert rows.num_words > words
      assert found == (words + 1, num_bytes + 3)


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
    *(
      (f"{name}=x-y=z.tsv", {Direction(*want.split()): ["x-y=z.tsv"]})
      for name, want in {
        "en-pt_BR": "en pt_BR",
        "en-pt-BR": "en pt_BR",
        "pt-BR-en": "pt_BR en",
        "zh-Hans-zh-Hant": "zh_Hans zh_Hant",
        "sr-Latn-RS-es-419": "sr_Latn_RS es_419",
        "cmn_Hant-jpn_Jpan": "cmn_Hant jpn_Jpan",
        "EN-FR": "EN FR",
      }.items()
    ),
  ],
)
def test_files_by_direction(value, want):
  assert named_files(value) == want


@pytest.mark.parametrize(
  "name", ["en-pt-br", "zh-hans-en", "EN-PT-BR", "en_fr", "en–fr", ""]
)
def test_languages_that_cannot_be_told(name):
  value = f"{name}=a.tsv"
  with pytest.raises(ValueError, match=rf"is no file, nor .* \./{value} for"):
    named_files(value)
  assert named_files(f"./{value}") == {NO_LANGUAGES: [f"./{value}"]}
  for mixed in (f"en-fr=a.tsv,./{value}", f"./{value},en-fr=a.tsv"):
    with pytest.raises(ValueError, match="has no languages .* name them, as"):
      named_files(mixed)


@pytest.fixture
def of_pairs(tmp_path):
  """of_pairs(train, ...): opens files of pairs; and what `write` does."""
  fields = dict(vocab_size=290, source_length=30, data_dir=str(tmp_path))

  def of_pairs(train, files=(), run=None, **more):
    return opened("pairs", files, run, train=train, **fields | more)

  return of_pairs


def test_directions_have_files_of_their_own(tmp_path, of_pairs, capsys):
  for name, count in (("fr", 40), ("de", 20), ("test", 3)):
    write(tmp_path / f"{name}.tsv", lines(count, name))
  train = f"en-fr={tmp_path}/fr.tsv,en-de={tmp_path}/de.tsv"
  data = of_pairs(train, test=f"en-fr={tmp_path}/test.tsv")
  leaks = "validation and test are carved out of the files of each direction"
  assert leaks in (said := capsys.readouterr().err) and "sentence in en" in said
  for split, counts in zip(SPLITS, [(38, 18), (2, 1), (3, 1)], strict=True):
    names = [str(part) for part in data.pairs[split]]
    assert names == [f"en-fr {split}", f"en-de {split}"]
    assert tuple(len(part.sources) for part in data.pairs[split]) == counts
  of_pairs(train, validation=train, test=train)
  assert leaks not in capsys.readouterr().err


def test_files_that_cannot_be(tmp_path, of_pairs):
  path = write(tmp_path / "a.tsv", lines(20))
  with pytest.raises(ValueError, match="1 train file or more, got 0"):
    of_pairs("")
  message = "test files for en-fr, but the train files are for source-target"
  with pytest.raises(ValueError, match=message):
    of_pairs(str(path), test=f"en-fr={path}")
  message = "files for fr-en, and both_directions makes more of those for en-fr"
  with pytest.raises(ValueError, match=message):
    of_pairs(f"en-fr={path},fr-en={path}", both_directions=True)
  bad = write(tmp_path / "bad.tsv", ["a\tb", "no tab"])
  assert both_sides(corpora.read_pairs([bad], EN_FR)) == [("a", "b")]
  for files in ((), [f"en-fr={bad}"]):
    with pytest.raises(ValueError, match="line 2 is without exactly one tab"):
      of_pairs(f"en-fr={bad}", files, strict=True)


def test_pairs_serve_one_direction_or_both(tmp_path, of_pairs):
  texts = [f"word{i}\tmot{i} mot" for i in range(40)]
  train = f"en-fr={write(tmp_path / 'a.tsv', texts)}"
  one = of_pairs(train)
  assert (one.batch_size, one.row_length, one.source_length) == (2, 24, 30)
  assert one.vocabulary.languages == () and len(one.vocabulary) == 290
  both = of_pairs(train, both_directions=True, temperature=2.0)
  assert both.vocabulary.languages == ("en", "fr")
  there, back = both.pairs["train"]
  assert [str(there.direction), str(back.direction)] == ["en-fr", "fr-en"]
  assert both_sides(back) == [pair[::-1] for pair in both_sides(there)]
  assert both_sides(there)[0] == ("word0", "mot0 mot")
  # What serves both directions is read once for the pieces.
  want = Pieces.train([*there.sources, *there.targets], 290, ["en", "fr"])
  assert both.vocabulary.digest == want.digest
  words = [len(t.ids["target"]) for t in both.tokens("train")]
  rows = both.rows("train")
  assert isinstance(rows, MultiDirection) and rows.num_words == sum(words)
  assert words[0] > words[1]
  roots = [count**0.5 for count in words]
  assert rows.shares == pytest.approx([r / sum(roots) for r in roots])

  # Files in place of the corpus.
  a = write(tmp_path / "b.tsv", ["a\tb"])
  for name in (str(a), f"en-fr={a}"):
    data = of_pairs(train, [name], one.vocabulary)
    assert data.splits == ("data",) and data.vocabulary is one.vocabulary
    (part,) = data.pairs["data"]
    assert str(part) == "en-fr data" and both_sides(part) == [("a", "b")]
  message = "b.tsv: pairs of .* were not trained, only of en-fr.*as in en-fr="
  for name, back in ((f"en-de={a}", False), (str(a), True)):
    with pytest.raises(ValueError, match=message):
      of_pairs(train, [name], one.vocabulary, both_directions=back)


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
    for kind in (Wmt14Translate, WmtTranslate, Lm1b):
      builder = kind(data_dir=data_dir)
      builder.download_and_prepare(file_format="array_record")
  return data_dir


def wmt14(prepared, **fields):
  lengths = dict(vocab_size=290, source_length=20, data_dir=str(prepared))
  return opened("wmt14", **lengths | fields)


@pytest.mark.parametrize("pair", ["en-fr", "fr-en"])
def test_wmt14_is_validated_by_tests_of_earlier_years(
  prepared, pair, monkeypatch
):
  """TFDS knows all of them, of both languages of the paper."""
  monkeypatch.setitem(sys.modules, "tensorflow", None)  # not needed
  years = ("newstest2012", "newstest2013")
  sides = pair.split("-")
  data, both = (
    wmt14(prepared, pair=pair),
    wmt14(prepared, pair=pair, validation=years),
  )
  assert data.splits == both.splits == SPLITS and data.source_length == 20
  assert len(data.vocabulary) == 290 and data.vocabulary.languages == ()
  of_both = WmtTranslate.RECORDS["validation"] + RECORDS["validation"]
  for corpus, want in (
    (data, RECORDS),
    (both, RECORDS | {"validation": of_both}),
  ):
    for split, (part,) in corpus.pairs.items():
      assert str(part) == f"{pair} {split}"
      assert both_sides(part) == [
        tuple(r[s] for s in sides) for r in want[split]
      ]
  assert both.rows("validation").num_words > 0
  known = {each.name: each for each in tfds.translate.wmt._DEV_SUBSETS}
  assert all({"de", "fr"} <= known[name].sources for name in years)
  of_corpus = tfds.translate.wmt14.Wmt14Translate._subsets.fget(None)
  assert years[1] in of_corpus["validation"]
  assert years[0] not in of_corpus["validation"]


@pytest.mark.parametrize(
  "pair, validation, name",
  [
    ("en-de", "newstest2013", "wmt14_translate/de-en"),
    ("en-fr", "newstest2012", "wmt_translate/fr-en.newstest2012"),
  ],
)
def test_what_is_not_prepared_is_told_how(
  prepared, tmp_path, monkeypatch, pair, validation, name
):
  """By a program that prepares it."""
  shutil.copytree(prepared / "wmt14_translate", tmp_path / "wmt14_translate")
  match = f"{name} is not prepared in .*; prepare it by: pip"
  with pytest.raises(FileNotFoundError, match=match) as caught:
    wmt14(tmp_path, pair=pair, validation=(validation,))
  assert "\n" not in str(caught.value)
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
  assert validation in builder.subsets["validation"]
  assert pathlib.Path(builder.data_dir) == tmp_path / name / "1.0.0"


def test_wmt14_has_other_pairs(prepared):
  for pair in ("en-es", "fr-de", "english", "en-fr-de"):
    with pytest.raises(ValueError, match="de-en and fr-en, in .*is neither"):
      wmt14(prepared, pair=pair)


@pytest.fixture(scope="module")
def lm1b(prepared):
  """lm1b(...): opens it."""
  words = sorted({w for text in TOKENIZED["train"] for w in text.split(" ")})
  path = write(prepared / "vocab.txt", ["</S>", "<S>", "<UNK>", *words])
  fields = {"vocab_file": str(path), "vocab_size": len(words) + 3}
  fields["data_dir"] = str(prepared)
  return lambda files=(), run=None, **other: opened(
    "lm1b", files, run, **fields | other
  )


def test_lm1b_holds_out_a_part_or_a_file(lm1b, tmp_path):
  data = lm1b()
  texts = {split: list(data.pairs[split][0].targets) for split in data.splits}
  assert texts == {
    "train": TOKENIZED["train"],
    "validation": TOKENIZED["test"][:4],
    "test": TOKENIZED["test"][4:],
  }
  # Published results are of one file, whose sentences are no validation's.
  first = write(tmp_path / "heldout", TOKENIZED["test"][1:3])
  data = lm1b(test=str(first))
  assert data.pairs["test"][0].targets == TOKENIZED["test"][1:3]
  validation = data.pairs["validation"][0].targets
  assert validation == [TOKENIZED["test"][i] for i in (0, 3)]


def test_lm1b_words_are_parted_by_spaces(lm1b, prepared, tmp_path):
  file = prepared / "vocab.txt"
  line = {entry: number for number, entry in enumerate(text_files.lines(file))}
  assert "5\xa0%" in line
  path = write(tmp_path / "a.txt", TOKENIZED["test"])
  given = lm1b([str(path)], vocab.TokenizedVocabulary.load(file))
  for data, split in ((lm1b(), "train"), (given, "data")):
    want = [
      line.get(word, line["<UNK>"])
      for sentence in data.pairs[split][0].targets
      for word in (*sentence.split(" "), "</S>")
    ]
    (tokens,) = data.tokens(split)
    assert tokens.ids["target"].tolist() == want
    # Whatever the tokens, words are between spaces.
    tokens = {"kind": "pieces", "vocab_size": 285}
    of_pieces = lm1b(tokens=tokens, vocab_file="")
    assert isinstance(of_pieces.vocabulary, Pieces)
    for each in (data, data._replace(vocabulary=of_pieces.vocabulary)):
      words, _ = each.size_of_text(split, each.rows(split))
      assert words == len(want)


def test_a_vocabulary_that_cannot_be(lm1b, tmp_path):
  for name in ("", str(tmp_path), str(tmp_path / "nowhere.txt")):
    message = f"config.data.vocab_file is '{name}', which is no file.*entries"
    with pytest.raises(FileNotFoundError, match=message):
      lm1b(vocab_file=name)
  for size, message in (
    (793_471, r"vocab.txt has [\d,]+ entries, but .* is 793,471; give the si"),
    (5, r"is 5; give .* \(its first lines: head -n 5\)"),
  ):
    with pytest.raises(ValueError, match=message):
      lm1b(vocab_size=size)
