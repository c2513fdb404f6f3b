"""Pairs: files good and bad, splits, both directions, WMT as TFDS has it."""

import gzip
import json
import lzma
import pathlib
import re
import sys

import pytest
import tensorflow_datasets as tfds

from moejax.data import corpora, pairs
from moejax.data.pairs import Direction

SPLITS = ("train", "validation", "test")
PLAIN = Direction("source", "target")
EN_FR = Direction("en", "fr")


def lines(count, word="line"):
  return [f"{word} {i}\tligne {i} {word}" for i in range(count)]


def write(path, texts):
  path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
  return path


def opened(tmp_path, files, validation=None, test=None, **options):
  return pairs.open_pairs(
    {PLAIN: files},
    {PLAIN: validation} if validation else {},
    {PLAIN: test} if test else {},
    tmp_path / "tfds",
    **options,
  )


def as_lines(parts):
  return [
    f"{source}\t{target}"
    for part in parts
    for source, target in zip(part.sources, part.targets, strict=True)
  ]


# -- names --------------------------------------------------------------------


def test_files_by_direction():
  assert pairs.named_files("en-fr=a.tsv.xz,en-de=b.tsv,en-fr=c=d.tsv") == {
    Direction("en", "fr"): ["a.tsv.xz", "c=d.tsv"],
    Direction("en", "de"): ["b.tsv"],
  }
  assert pairs.named_files("a-b.tsv,x/k=v.tsv") == {
    PLAIN: ["a-b.tsv", "x/k=v.tsv"]
  }
  assert pairs.named_files("") == {}
  assert str(EN_FR) == "en-fr"


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
  found = pairs.named_files(f"{name}=x-y=z.tsv")
  assert found == {Direction(source, target): ["x-y=z.tsv"]}
  assert pairs.named_files(f"{Direction(source, target)}=a") == {
    Direction(source, target): ["a"]
  }


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
    pairs.named_files(value)
  assert pairs.named_files(f"./{value}") == {PLAIN: [f"./{value}"]}


@pytest.mark.parametrize("value", ["en-fr=a.tsv,b.tsv", "b.tsv,en-fr=a.tsv"])
def test_a_file_without_languages_beside_one_with(value):
  message = "b.tsv has no languages .* name them, as in en-fr=b.tsv"
  with pytest.raises(ValueError, match=message):
    pairs.named_files(value)


# -- files --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz", ".tsv.xz"])
def test_every_kind_of_file(tmp_path, suffix):
  text = "\ufeff a  b. \t c\r\n\nnaïve\t中文 \nno\tnewline"
  open_file = {".tsv.gz": gzip.open, ".tsv.xz": lzma.open}.get(suffix, open)
  path = tmp_path / f"file{suffix}"
  with open_file(path, "wb") as file:
    file.write(text.encode())
  want = ["a  b.\tc", "naïve\t中文", "no\tnewline"]
  splits = opened(tmp_path, [path], [path], [path])
  assert list(splits) == list(SPLITS)
  for split in SPLITS:
    assert as_lines(splits[split]) == want
    assert splits[split][0].split == split
  assert as_lines([pairs.read_pairs([path], PLAIN)]) == want


@pytest.mark.parametrize("count", [20, 41, 4321])
def test_held_out_blocks_are_carved_out(tmp_path, count):
  path = write(tmp_path / "a.tsv", lines(count))
  splits = opened(tmp_path, [path])
  found = {split: as_lines(splits[split]) for split in SPLITS}
  assert sorted(sum(found.values(), [])) == sorted(lines(count))
  assert len(found["train"]) > 0.85 * count
  assert min(len(found["validation"]), len(found["test"])) > 0.02 * count
  if count > 2000:
    assert found["validation"][:100] == lines(count)[900:1000]


def test_a_given_split_is_not_carved_out(tmp_path):
  a = write(tmp_path / "a.tsv", lines(40, "a"))
  b = write(tmp_path / "b.tsv", lines(3, "b"))
  splits = opened(tmp_path, [a], test=[b])
  assert as_lines(splits["test"]) == lines(3, "b")
  assert [len(splits[s][0].sources) for s in SPLITS] == [38, 2, 3]


def test_directions_have_files_of_their_own(tmp_path, capsys):
  files = {
    EN_FR: [write(tmp_path / "fr.tsv", lines(40, "fr"))],
    Direction("en", "de"): [write(tmp_path / "de.tsv", lines(20, "de"))],
  }
  test = {EN_FR: [write(tmp_path / "test.tsv", lines(3, "test"))]}
  splits = pairs.open_pairs(files, {}, test, tmp_path / "tfds")
  leaks = "validation and test are carved out of the files of each direction"
  assert leaks in (said := capsys.readouterr().err) and "sentence in en" in said
  pairs.open_pairs(files, files, files, tmp_path / "tfds")
  assert leaks not in capsys.readouterr().err
  for split, counts in zip(SPLITS, [(38, 18), (2, 1), (3, 1)], strict=True):
    assert [str(part.direction) for part in splits[split]] == ["en-fr", "en-de"]
    assert tuple(len(part.sources) for part in splits[split]) == counts
  assert pairs.target_languages(splits["train"]) == ("de", "fr")
  assert pairs.target_languages(splits["train"][:1]) == ()


def test_both_directions(tmp_path):
  path = write(tmp_path / "a.tsv", lines(20))
  splits = opened(tmp_path, [path], both_directions=True)
  there, back = splits["train"]
  assert there.direction == PLAIN
  assert back.direction == Direction("target", "source")
  assert list(back.sources) == list(there.targets)
  assert list(back.targets) == list(there.sources)
  assert back.sources[0] == "ligne 0 line"
  assert pairs.target_languages(splits["train"]) == ("source", "target")
  assert sorted(pairs.texts([there, back])) == sorted(
    [*there.sources, *there.targets]
  )


def test_a_changed_file_is_prepared_anew(tmp_path):
  path = write(tmp_path / "a.tsv", lines(20))
  before = opened(tmp_path, [path])
  write(path, lines(20, "other"))
  after = opened(tmp_path, [path])
  assert before["test"][0].sources[0] == "line 19"
  assert after["test"][0].sources[0] == "other 19"


# -- bad lines ----------------------------------------------------------------

BAD = ["no tab", "a\tb\tc", " \tempty", "empty\t ", "", "\t"]


def test_bad_lines_are_left_out_and_counted(tmp_path, capfd):
  good = lines(30)
  path = write(tmp_path / "a.tsv", good[:10] + BAD + good[10:])
  for _ in range(2):
    splits = opened(tmp_path, [path])
    assert sum(len(splits[split][0].sources) for split in SPLITS) == 30
  said = capfd.readouterr().err
  assert said.count("left out") == 1
  assert (
    f"{path}: 5 of 36 lines left out: 2 without exactly one tab (lines 11, 12),"
    " 3 with an empty side (lines 13, 14, 16)\n"
  ) in said
  assert as_lines([pairs.read_pairs([path], PLAIN)]) == good
  assert "5 of 36 lines left out" in capfd.readouterr().err


def test_of_many_bad_lines_the_first_are_told(tmp_path, capfd):
  path = write(tmp_path / "a.tsv", ["a\tb", *["no tab"] * 2000, "\tempty"])
  pairs.read_pairs([path], PLAIN)
  assert capfd.readouterr().err == (
    f"{path}: 2,001 of 2,002 lines left out: 2,000 without exactly one tab"
    " (lines 2, 3, 4, ...), 1 with an empty side (line 2002)\n"
  )


@pytest.mark.parametrize(
  ("bad", "reason"),
  [
    ("no tab", "without exactly one tab"),
    ("a\tb\tc", "without exactly one tab"),
    ("\tempty", "with an empty side"),
  ],
)
def test_bad_lines_are_refused_on_request(tmp_path, bad, reason):
  path = write(tmp_path / "a.tsv", [*lines(20), bad])
  opened(tmp_path, [path])  # a copy without the line is no strict one
  message = f"a.tsv: line 21 is {reason}; mend it, or set .*strict=False"
  with pytest.raises(ValueError, match=message):
    opened(tmp_path, [path], strict=True)
  with pytest.raises(ValueError, match=message):
    pairs.read_pairs([path], PLAIN, strict=True)
  write(path, lines(20))
  assert len(opened(tmp_path, [path], strict=True)["train"][0].sources) == 18


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.tsv", b"", "a.tsv holds no pair; write a sentence, a tab and its"),
    ("a.tsv", b"no tab\n", "a.tsv holds no pair"),
    ("a.tsv", b"a\tb\nc\t\xe9d\n", "byte 3 of line 2 is 0xe9.*iconv"),
    ("a.tsv", b"\xef\xbb\xbfa\t\xe9\n", "byte 6 of line 1 is 0xe9"),
    ("a.gz", gzip.compress(b"a\tb\n" * 99, mtime=0)[:-9], "a.gz is cut short"),
    ("a.xz", b"plain\ttext", "a.xz is damaged, or not compressed as its name"),
    ("a.tsv", "a\tb\n".encode("utf-16-le"), "a.tsv is text in UTF-16LE"),
    ("a.tsv", b"a\tb\nc\td\0\n", "NUL bytes, one at byte 4 of line 2"),
    ("a.tsv", b"a\tb\n" * 19, "a.tsv: 19 lines are too few .* takes 20"),
  ],
)
def test_bad_files(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as caught:
    opened(tmp_path, [path])
  assert "\n" not in str(caught.value)
  assert not list((tmp_path / "tfds").glob("pair_files/*/*"))


def test_bad_paths(tmp_path):
  path = write(tmp_path / "a.tsv", lines(20))
  with pytest.raises(FileNotFoundError, match="nowhere.tsv does not exist"):
    opened(tmp_path, [tmp_path / "nowhere.tsv"])
  with pytest.raises(ValueError, match="is a directory"):
    pairs.read_pairs([tmp_path], PLAIN)
  with pytest.raises(ValueError, match="1 train file or more, got 0"):
    pairs.open_pairs({}, {}, {}, tmp_path)
  message = "test files for en-fr, but the train files are for source-target"
  with pytest.raises(ValueError, match=message):
    pairs.open_pairs({PLAIN: [path]}, {}, {EN_FR: [path]}, tmp_path)
  both = {EN_FR: [path], pairs.Direction("fr", "en"): [path]}
  message = "files for fr-en, and both_directions makes more of those for en-fr"
  with pytest.raises(ValueError, match=message):
    pairs.open_pairs(both, {}, {}, tmp_path, both_directions=True)


# -- WMT ----------------------------------------------------------------------

RECORDS = {
  split: [(f"the {split} {i}", f"le «{split}» {i}") for i in range(count)]
  for split, count in {"train": 30, "validation": 4, "test": 5}.items()
}


class Wmt14Translate(tfds.core.ShardBasedBuilder, skip_registration=True):
  """A small corpus of the name, version and features of the real one."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="fr-en")]

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.Translation(languages=("fr", "en")),
      disable_shuffling=True,
    )

  def _shard_iterators_per_split(self, dl_manager):
    def shard(split):
      return enumerate({"en": en, "fr": fr} for en, fr in RECORDS[split])

    return {split: [lambda split=split: shard(split)] for split in RECORDS}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp("tfds")
  with corpora.quiet():
    builder = Wmt14Translate(data_dir=data_dir, config="fr-en")
    builder.download_and_prepare(file_format="array_record")
  return data_dir


@pytest.mark.parametrize("pair", ["en-fr", "fr-en"])
def test_wmt14_has_its_own_splits(prepared, pair):
  splits = pairs.open_wmt14(pair, prepared)
  assert list(splits) == list(SPLITS)
  for split, (part,) in splits.items():
    assert (str(part.direction), part.split) == (pair, split)
    found = list(zip(part.sources, part.targets, strict=True))
    there = 1 if pair == "en-fr" else -1
    assert found == [record[::there] for record in RECORDS[split]]


def test_tensorflow_is_not_needed(prepared, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  (part,) = pairs.open_wmt14("en-fr", prepared)["train"]
  assert part.sources[29] == "the train 29"


def test_wmt14_that_is_not_there(prepared, monkeypatch):
  message = "wmt14_translate/de-en is not prepared in .*; prepare it by: pip"
  with pytest.raises(FileNotFoundError, match=message) as caught:
    pairs.open_wmt14("en-de", prepared)
  assert "\n" not in str(caught.value)
  (program,) = re.findall('python -c "(.*)"', str(caught.value))
  asked = []

  class Builder:
    def download_and_prepare(self, **options):
      asked.append(options)

  monkeypatch.setattr(
    tfds, "builder", lambda *args, **kw: asked.append((args, kw)) or Builder()
  )
  exec(program, {})
  assert asked == [
    (("wmt14_translate/de-en",), {"data_dir": str(prepared)}),
    {"file_format": "array_record"},
  ]


def test_a_pair_that_wmt14_has_not(tmp_path):
  for pair in ("en-es", "fr-de", "english", "en-fr-de"):
    with pytest.raises(
      ValueError, match="de-en and fr-en, either way.*neither"
    ):
      pairs.open_wmt14(pair, tmp_path)


def test_wmt14_files_for_tensorflow_only(prepared, tmp_path):
  folder = pathlib.Path("wmt14_translate", "fr-en", "1.0.0")
  (tmp_path / folder).mkdir(parents=True)
  for path in (prepared / folder).glob("*.json"):
    values = json.loads(path.read_text())
    if path.name == "dataset_info.json":
      values["fileFormat"] = "tfrecord"
    (tmp_path / folder / path.name).write_text(json.dumps(values))
  with pytest.raises(ValueError, match="1.0.0 as tfrecord files, .*remove"):
    pairs.open_wmt14("en-fr", tmp_path)
