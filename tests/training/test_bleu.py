"""BLEU and chrF: what the sacrebleu command prints for the same lines."""

import collections
import importlib.metadata
import json
import math
import subprocess
import sys

import pytest
from sacrebleu import __version__ as version

from moejax.training import bleu

REFERENCES = [
  "The commission wants 1,000 more houses by 2010.",
  "That is not (yet) what we had agreed upon, Mr. President!",
  "",
  "Déjà vu, they said - and left.  ",
]
HYPOTHESES = [
  "The commission asks for 1,000 more houses by 2010.",
  "This is not what we had agreed upon, Mr President!",
  "nothing",
  "They said déjà vu - and left.",
]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
  folder = tmp_path_factory.mktemp("lines")
  for name, lines in (("out", HYPOTHESES), ("ref", REFERENCES)):
    text = "".join(f"{line}\n" for line in lines)
    (folder / name).write_text(text, encoding="utf-8")
  flags = ["ref", "-i", "out", "--metrics", "bleu", "chrf", "--width", "14"]
  result = subprocess.run(
    [sys.executable, "-m", "sacrebleu", *flags],
    cwd=folder,
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(result.stdout)


def test_scores_are_those_of_the_command(printed):
  found = bleu.scores(HYPOTHESES, REFERENCES)
  for metric, score, signature in zip(
    printed, (found.bleu, found.chrf), found[2:4], strict=True
  ):
    assert score == pytest.approx(metric["score"], abs=1e-12)
    assert signature == metric["signature"]
  assert 20 < found.bleu < 80
  assert "tok:13a" in found.bleu_signature


def bleu_by_hand(hypotheses, references):
  """Of lines of tokens: Papineni et al. 2002, one reference, unsmoothed."""

  def grams(line, n):
    words = line.split(" ")
    ends = range(n, len(words) + 1)
    return collections.Counter(tuple(words[end - n : end]) for end in ends)

  pairs = list(zip(hypotheses, references, strict=True))
  log_p = 0.0
  for n in range(1, 5):
    same = sum((grams(h, n) & grams(r, n)).total() for h, r in pairs)
    log_p += math.log(same / sum(grams(h, n).total() for h, _ in pairs)) / 4
  sides = zip(*pairs, strict=True)
  made, wanted = (sum(len(line.split(" ")) for line in side) for side in sides)
  return 100 * math.exp(log_p + min(0, 1 - wanted / made))


def test_the_papers_bleu_is_of_moses_tokens():
  """An apostrophe goes with the word before it in French."""
  lines = "L'homme n'est pas là, Mme. X.", "Il part (ici) !"
  wanted = "L'homme n'est pas ici, Mme. X.", "Il part : ici !"
  cut = (
    "L&apos; homme n&apos; est pas {} , Mme. X .",
    "Il part {} ici{} !",
  )
  found = [cut[0].format("là"), cut[1].format("(", " )")]
  other = [cut[0].format("ici"), cut[1].format(":", "")]
  got = bleu.scores(lines, wanted, "fr_CA")
  assert got.moses_bleu == pytest.approx(bleu_by_hand(found, other))
  assert got.moses_bleu_signature == (
    f"nrefs:1|case:mixed|eff:no|tok:none|smooth:none|version:{version}"
    f" on sacremoses {importlib.metadata.version('sacremoses')}, 'fr'"
  )
  # As English, whose apostrophes go with what comes after.
  assert bleu.scores(lines, wanted).moses_bleu != got.moses_bleu
  # Nothing is smoothed: no four words agree.
  none = bleu.scores(["a b c d e"], ["a b c x e"], "en")
  assert none.moses_bleu == 0 < none.bleu


def test_moses_tokens_that_are_not_to_be_had(monkeypatch):
  chinese = bleu.scores(
    ["我住在一座大城市裡。"], ["我住在一座大城市裡。"], "zh"
  )
  assert chinese.moses_bleu is None
  assert "by spaces" in chinese.moses_bleu_signature
  monkeypatch.setitem(sys.modules, "sacremoses", None)
  found = bleu.scores(HYPOTHESES, REFERENCES)
  assert found.moses_bleu is None and found.bleu > 20
  assert "sacremoses is not installed" in found.moses_bleu_signature


@pytest.mark.parametrize(
  "line, tokenizer",
  [
    ("我住在一座大城市裡。", "zh"),
    ("私は東京に住んでいます。", "char"),
    ("แมวนั่งอยู่บนเสื่อเก่า", "char"),
    ("ຂ້ອຍອາໄສຢູ່ໃນເມືອງໃຫຍ່", "char"),
    ("ខ្ញុំរស់នៅក្នុងទីក្រុងធំ", "char"),
    ("ကျွန်တော်မြို့ကြီးမှာနေတယ်", "char"),
    ("བོད་སྐད་ནི་བོད་ཀྱི་སྐད་ཡིག", "char"),
    ("Aku manggon ing kutha gedhe.", "13a"),
    ("고양이 마리가 낡은 매트 위에", "13a"),
  ],
)
def test_languages_without_spaces_are_cut_their_own_way(line, tokenizer):
  found = bleu.scores([line] * 2, [line] * 2)
  assert found.bleu == pytest.approx(100)
  assert f"tok:{tokenizer}|" in found.bleu_signature


@pytest.mark.parametrize(
  "lines, references, message",
  [
    (HYPOTHESES[:3], REFERENCES, "3 translations .* against 4 references"),
    ([], [], "0 translations"),
  ],
)
def test_every_line_needs_its_reference(lines, references, message):
  with pytest.raises(ValueError, match=message):
    bleu.scores(lines, references)
