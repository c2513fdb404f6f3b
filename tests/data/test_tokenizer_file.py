"""A given tokenizer.json: text comes back, and no text is a special token."""

import json

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from moejax.data.tokenizer_file import TokenizerFile

TEXTS = ["the cat sat on the mat", "hello then ran, 5% é 漢字 </s>"] * 20
ORDINARY = ["<s>", "</s>", "<unk>"]


def made(kind, special=ORDINARY):
  """Trains a tokenizer as `tokenizers` does; returns what is in its file."""
  size = dict(special_tokens=list(special), show_progress=False)
  if kind == "bytes":
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
      vocab_size=300, initial_alphabet=alphabet, **size
    )
  elif kind == "unigram":
    found = tokenizers.Tokenizer(models.Unigram())
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **size)
  else:
    found = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(**size)
  found.train_from_iterator(TEXTS, trainer)
  # What a file may ask for besides, and a language model has no use for.
  if "<s>" in special:
    ends = [(name, found.token_to_id(name)) for name in ("<s>", "</s>")]
    found.post_processor = processors.TemplateProcessing(
      single="<s> $A </s>", special_tokens=ends
    )
  found.enable_truncation(3)
  found.enable_padding(length=50)
  return found.to_str().encode()


@pytest.fixture(scope="module")
def spelt_in_bytes():
  return TokenizerFile(made("bytes"))


# -- encoding -----------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("<s> </s> <unk>")
@example(" two  spaces \n\n and a long one " * 20)
def test_text_comes_back(spelt_in_bytes, text):
  ids = spelt_in_bytes.encode(text)
  assert spelt_in_bytes.special.isdisjoint(ids)
  assert spelt_in_bytes.decode(ids) == text
  ends = [spelt_in_bytes.start, *ids, spelt_in_bytes.end]
  assert spelt_in_bytes.decode(ends) == text
  assert spelt_in_bytes.encode_all([text, "the"])[0] == ids


@pytest.mark.parametrize("kind", ["unigram", "word"])
def test_no_text_is_a_special_token(kind):
  found = TokenizerFile(made(kind))
  ids = found.encode("the </s> <s> the")
  assert found.unknown in ids and not {found.start, found.end} & {*ids}
  assert found.decode([found.start, *found.encode("the"), found.end]) == "the"
  # The library would, which has nothing else for it in its model.
  plain = tokenizers.Tokenizer.from_str(made(kind).decode())
  assert found.end in plain.encode("the </s>").ids


def test_a_text_that_cannot_be_spelt_is_refused():
  content = json.loads(made("word"))
  content["model"]["unk_token"] = "nowhere"
  found = TokenizerFile(json.dumps(content).encode())
  assert found.unknown == -1
  with pytest.raises(ValueError, match="reads '</s>' in 'the </s>' as its own"):
    found.encode("the </s>")


def test_tokens_can_be_looked_at(spelt_in_bytes):
  assert spelt_in_bytes.spelt(spelt_in_bytes.end) == "</s>"
  shown = [spelt_in_bytes.spelt(i) for i in spelt_in_bytes.encode("a the ë\n")]
  assert shown == ["a", "▁the", "▁", "<0xC3>", "<0xAB>", "\n"]
  words = TokenizerFile(made("word"))
  assert [words.spelt(i) for i in words.encode("the x")] == ["the", "<unk>"]


# -- the tokens around a text -------------------------------------------------


@pytest.mark.parametrize(
  "special, named, want",
  [
    (ORDINARY, {}, ("<s>", "</s>")),
    (["<|endoftext|>"], {}, ("<|endoftext|>", "<|endoftext|>")),
    (["<|im_end|>", "<|endoftext|>"], {}, ("<|endoftext|>", "<|endoftext|>")),
    (["<bos>", "<eos>"], {}, ("<bos>", "<eos>")),
    (["A", "B", "</s>"], {"start": "A", "end": "B"}, ("A", "B")),
    # An ordinary token that is named is special from then on.
    (["</s>"], {"end": "the"}, ("the", "the")),
  ],
)
def test_start_and_end(special, named, want):
  found = TokenizerFile(made("bytes", special), **named)
  assert (found.spelt(found.start), found.spelt(found.end)) == want
  assert {found.start, found.end} <= found.special
  assert found.unknown == -1


def test_ids_that_stand_for_nothing(spelt_in_bytes):
  """As of a model whose tables are larger than the tokenizer."""
  larger = TokenizerFile(made("bytes"), vocab_size=295)
  assert (len(spelt_in_bytes), len(larger)) == (289, 295)
  assert larger.special == spelt_in_bytes.special | {*range(289, 295)}
  assert larger.spelt(290) == larger.decode([290]) == ""
  assert larger.digest != spelt_in_bytes.digest


# -- files --------------------------------------------------------------------


def test_a_file_is_kept_as_it_is(tmp_path):
  content = made("unigram")
  (tmp_path / "own.json").write_bytes(content)
  found = TokenizerFile.load(tmp_path / "own.json", end="<s>")
  found.save(tmp_path / TokenizerFile.FILE)
  assert (tmp_path / "tokenizer.json").read_bytes() == content
  again = TokenizerFile.load(tmp_path / "tokenizer.json", end="<s>")
  assert again.digest == found.digest
  assert TokenizerFile.load(tmp_path / "own.json").digest != found.digest


@pytest.mark.parametrize(
  "content, fields, message",
  [
    (b"", {}, "no tokenizer.json of the library"),
    (made("bytes")[:4000], {}, "no tokenizer.json of the library"),
    (b'{"eos_token": "</s>"}', {}, "no tokenizer.json .*'model'.*beside"),
    (b"[1]", {}, "no tokenizer.json"),
    (b'{"model": {"type": "BPE"}}', {}, "no tokenizer.json"),
    (b"\xff", {}, "no tokenizer.json"),
    (made("bytes", []), {}, "has none of </s>, .*tokens.end .*tokens are none"),
    (
      made("bytes"),
      {"end": "END"},
      "no 'END' for .*tokens.end; its .*<s>, </s",
    ),
    (made("bytes"), {"start": "BEG"}, "no 'BEG' for config.data.tokens.start"),
    (made("bytes"), {"vocab_size": 288}, "ids up to 288, .* is 288; give 289"),
  ],
)
def test_files_that_cannot_be(tmp_path, content, fields, message):
  path = tmp_path / "tokenizer.json"
  path.write_bytes(content)
  with pytest.raises(
    ValueError, match=f"tokenizer.json: .*{message}"
  ) as caught:
    TokenizerFile.load(path, **fields)
  assert "\n" not in str(caught.value)
