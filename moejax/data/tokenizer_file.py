"""Tokens of a given file, a tokenizer.json of the library `tokenizers`."""

import json
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import pre_tokenizers

from moejax import files, terminal
from moejax.data import cache

# What files call the tokens around a text; the first that a file has counts.
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>")
_STARTS = ("<s>", "<|startoftext|>", "<|begin_of_text|>", "<bos>")


class TokenizerFile:
  """Tokens as a tokenizer.json has them, and their ids.

  No text turns into a special token: "</s>" in a text is spelt like any other
  word or, where the file cannot do that, unknown. What the file would put
  around a text, or cut off it, is left out.

  Attributes:
    end: id of the token that ends a sentence.
    start: id of the token before a sentence; where there is none, that of end.
    unknown: id of what the file has no token for; -1 where it spells all.
    special: ids that no text becomes.
    digest: a short name that another tokenizer would not have.
  """

  FILE = "tokenizer.json"
  UNIT = "token"
  languages = ()  # tags, as pieces may have

  def __init__(
    self, content: bytes, start: str = "", end: str = "", vocab_size: int = 0
  ):
    """Takes what is in a file.

    Args:
      content: JSON.
      start, end: names of these tokens; "" looks for the usual ones.
      vocab_size: how many ids there are; 0 is as many as the file has. A model
        may have more, which stand for nothing.

    Raises:
      ValueError: it is no tokenizer.json, lacks the tokens named, or all usual
        ends, or has more ids.
    """
    try:
      parsed = json.loads(content)
      model = parsed["model"]
      self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    # The library raises what has no class of its own.
    except Exception as error:
      raise ValueError(
        f"this is no tokenizer.json of the library tokenizers"
        f" ({terminal.brief(error)}); give the file of this name"
        " that lies beside a model's tokenizer_config.json, or one that"
        " Tokenizer.save wrote"
      ) from None
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    ids = self._tokenizer.get_vocab(with_added_tokens=True)

    def named(field, name, usual):
      if name and name not in ids:
        raise ValueError(
          f"this tokenizer of {len(ids):,} tokens has no {name!r} for"
          f" config.data.tokens.{field}; {told}"
        )
      return next((ids[n] for n in (name, *usual) if n in ids), None)

    added = self._tokenizer.get_added_tokens_decoder()
    special = [token.content for token in added.values() if token.special]
    told = f"its special tokens are {', '.join(special[:20]) or 'none'}"
    self.end = named("end", end, _ENDS)
    if self.end is None:
      raise ValueError(
        f"this tokenizer of {len(ids):,} tokens has none of {', '.join(_ENDS)}"
        " to end a sentence; name the token that does by config.data.tokens.end"
        f" ({told})"
      )
    self.start = named("start", start, _STARTS)
    if self.start is None:
      self.start = self.end
    unknown = ids.get(model.get("unk_token"), model.get("unk_id"))
    if unknown in (None, self.start, self.end):
      unknown = -1
    self.unknown = unknown
    most = max(ids.values())
    self._size = vocab_size or most + 1
    if most >= self._size:
      raise ValueError(
        f"this tokenizer has ids up to {most}, but"
        f" config.data.tokens.vocab_size is {vocab_size}; give {most + 1} or"
        " more, or leave it out"
      )
    self.special = frozenset(
      {i for i, token in added.items() if token.special}
      | {self.start, self.end}
      | set(range(self._size)).difference(ids.values())
    ).difference([unknown])
    self._content = content
    names = start, end, vocab_size
    self.digest = cache.joined([cache.digest(content), *names])
    # Letters that stand for a byte each: those that can be seen for their own,
    # others, in their order, for what is left.
    self._bytes = {}
    if "ByteLevel" in json.dumps(parsed.get("decoder")):
      letters = sorted(pre_tokenizers.ByteLevel.alphabet())
      self._bytes = {c: ord(c) for c in letters if ord(c) < 256}
      rest = sorted({*range(256)} - {*self._bytes.values()})
      self._bytes |= zip(letters[-len(rest) :], rest, strict=True)

  @classmethod
  def load(
    cls, path: files.Path, start: str = "", end: str = "", vocab_size: int = 0
  ) -> "TokenizerFile":
    """Reads a file; arguments and errors as of the class."""
    try:
      return cls(files.read(path), start, end, vocab_size)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from None

  def save(self, path: files.Path) -> None:
    """Writes the file as it was read, whole or not at all."""
    files.write_whole(path, self._content)

  def __len__(self) -> int:
    return self._size

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text; no special one is among them.

    ValueError where the text holds what the file can only read as one.
    """
    return self.encode_all([text])[0]

  def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns what `encode` does for each text, by all cores."""
    found = []
    encoded = self._tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    for text, each in zip(texts, encoded, strict=True):
      ids = each.ids
      if not self.special.isdisjoint(ids):
        if self.unknown < 0:
          (first, *_) = self.special.intersection(ids)
          raise ValueError(
            f"the tokenizer reads {self.spelt(first)!r} in {text[:80]!r} as its"
            " own token, and has none for what is unknown; take it out of the"
            " text"
          )
        ids = [self.unknown if i in self.special else i for i in ids]
      found.append(ids)
    return found

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids; special ones are left out."""
    shown = [int(i) for i in ids if int(i) not in self.special]
    return self._tokenizer.decode(shown, skip_special_tokens=False)

  def spelt(self, id: int) -> str:
    """Returns what stands for a token: "▁" for a space, "<0xE2>" for bytes."""
    name = self._tokenizer.id_to_token(id) or ""
    if not self._bytes or id in self.special or set(name) - {*self._bytes}:
      return name
    content = bytes(self._bytes[letter] for letter in name)
    try:
      return content.decode().replace(" ", "▁")
    except UnicodeDecodeError:
      return "".join(f"<0x{byte:02X}>" for byte in content)
