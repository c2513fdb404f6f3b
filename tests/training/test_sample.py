"""Samples: what is drawn, that it is what the model says, and by which seed."""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import program
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moejax import experts, moe, router, sharding
from moejax.data import vocab
from moejax.data.pieces import Pieces
from moejax.data.tokenizer_file import TokenizerFile
from moejax.main import main
from moejax.models import layers, lstm_lm, transformer
from moejax.training import sample

V, D, END, LENGTH = 7, 4, 0, 6
LOG_P = jnp.log(jnp.array([0.05, 0.4, 0.1, 0.25, 0.05, 0.15, 0.0]))


@pytest.mark.parametrize(
  "options, chances",
  [
    ({}, [0.05, 0.4, 0.1, 0.25, 0.05, 0.15, 0]),
    ({"temperature": 0.5}, np.array([25, 1600, 100, 625, 25, 225, 0]) / 2600),
    ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0, 0, 0]),
    # 0.4 + 0.25 have less than 0.7, so the next one is needed too.
    ({"top_p": 0.7}, [0, 0.5, 0, 0.3125, 0, 0.1875, 0]),
    ({"top_p": 1e-9}, [0, 1, 0, 0, 0, 0, 0]),
    # The chance counts among those that top_k leaves.
    ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0, 0, 0, 0]),
    ({"temperature": 0.0}, [0, 1, 0, 0, 0, 0, 0]),
  ],
)
def test_tokens_are_drawn_by_their_chances(options, chances):
  draws = 4000
  keys = jax.random.split(jax.random.key(0), draws)
  ids = jax.vmap(lambda key: sample.choose(key, LOG_P, **options))(keys)
  found = np.bincount(ids, minlength=V) / draws
  np.testing.assert_allclose(found, chances, atol=0.03)
  assert not found[np.asarray(chances) == 0].any()


def mixture():
  return moe.MoE(router.NoisyTopK(4, k=2), experts.FeedForward(4, 6))


@functools.cache
def model_of(kind):
  if kind == "lstm":
    stack = (layers.LSTM(D), mixture(), layers.LSTM(D, 6))
    return lstm_lm.LSTMLM(V, D, stack, vocab_multiple=8)
  attention = transformer.MultiHeadAttention
  blocks = transformer.Blocks(2, lambda: attention(2), (mixture,))
  return transformer.Transformer(V, D, blocks, vocab_multiple=8)


@functools.cache
def params_of(model):
  ids = jnp.zeros((1, LENGTH), jnp.int32)
  batch = {"inputs": ids, "targets": ids, "mask": ids == 0, "start": ids == 0}
  params = jax.eval_shape(
    lambda: model.init(jax.random.key(0), batch, method="loss")["params"]
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda a: kinds.to_device(rng.normal(size=a.shape), a.dtype),
    nn.unbox(params),
  )


@functools.cache
def sampler_of(model, devices, **options):
  """Compiles once for the same options."""
  layout = sharding.LAYOUTS["expert"]
  mesh = sharding.make_mesh(layout, jax.devices()[:devices])
  return sample.Sampler(model.for_decoding(), layout, mesh, **options)


def texts(model, params, num, seed=0, prompt=(1,), devices=1, **options):
  sampler = sampler_of(model, devices, **options)
  found = sampler.texts(params, prompt, LENGTH, END, seed)
  return [list(text) for text in itertools.islice(found, num)]


def ids(found):
  return [[token.id for token in text] for text in found]


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_greedy_texts_are_those_of_the_whole_pass(kind):
  model = model_of(kind)
  params = params_of(model)
  (text,) = ids(texts(model, params, 1, temperature=0.0, prompt=(1, 3)))
  # What comes after a token changes nothing before it.
  run = jax.jit(model.for_decoding().apply)
  known = [1, 3]
  while len(known) <= LENGTH and known[-1] != END:
    rest = LENGTH - len(known)
    given = {
      "inputs": jnp.array([known + rest * [END]]),
      "mask": jnp.ones((1, LENGTH), bool),
      "start": jnp.arange(LENGTH)[None] == 0,
    }
    h = run({"params": params}, given)
    scores = h[0, len(known) - 1] @ params["head"]["table"][:V].T
    known.append(int(scores.argmax()))
  assert text == known


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_seed_alone_decides(kind):
  model = model_of(kind)
  params = params_of(model)
  first = texts(model, params, 6)
  # Neither who is shown, nor how many devices draw at once.
  shown = texts(model, params, 6, show_experts=True)
  assert ids(first) == ids(shown)
  assert ids(texts(model, params, 6, devices=4)) == ids(first)
  assert ids(texts(model, params, 6, seed=1)) != ids(first)
  assert len({tuple(text) for text in ids(first)}) > 1
  for text in ids(first):
    assert text[0] == 1 and len(text) <= LENGTH + 1
    assert END not in text[:-1] and (text[-1] == END or len(text) == LENGTH + 1)
  mixtures = 1 if kind == "lstm" else 2
  for text in shown:
    *read, last = text
    assert last.experts == []
    for token in read:
      assert len(token.experts) == mixtures
      for of_layer in token.experts:
        assert len({expert for expert, _ in of_layer}) == 2
        assert sum(gate for _, gate in of_layer) == pytest.approx(1)


def test_never_and_prompt():
  model = model_of("lstm")
  params = params_of(model)
  found = ids(texts(model, params, 20, never=(2, 5), prompt=(1, 5, 5)))
  assert all(text[:3] == [1, 5, 5] for text in found)
  assert not {2, 5} & {token for text in found for token in text[3:]}


@pytest.mark.parametrize(
  "options, message",
  [
    ({"temperature": -1.0}, "temperature must be 0 or more"),
    ({"temperature": float("inf")}, "and finite, got inf"),
    ({"top_k": -1}, "top_k must be 0"),
    ({"top_p": 0.0}, "top_p must be above 0"),
    ({"top_p": 1.1}, "top_p must be above 0"),
    ({"prompt": [1] * (LENGTH + 1)}, "the prompt has 6 tokens"),
  ],
)
def test_refused(options, message):
  model = model_of("lstm")
  with pytest.raises(ValueError, match=message):
    texts(model, params_of(model), 1, **options)


def test_a_cache_too_short_is_refused():
  model = model_of("transformer")
  params = params_of(model)
  state = model.begin(1, 3)
  two = jnp.zeros((1, 2), jnp.int32)
  read = functools.partial(model.apply, {"params": params}, method="read")
  state, _ = jax.jit(read)(state, two)
  with pytest.raises(ValueError, match="room for 3 tokens, and 4"):
    read(state, two)


@functools.cache
def tokenizer_of(kind):
  lines = ["the cat ▁ sat, on the mat é 漢字 \ufffd", "then  ran"] * 20
  if kind == "pieces":
    return Pieces.train(lines, 290)
  if kind == "words":
    return vocab.Vocabulary.build(lines, 1)
  own = tokenizers.Tokenizer(tokenizers.models.BPE())
  own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
  own.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=290,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=alphabet,
    show_progress=False,
  )
  own.train_from_iterator(lines, trainer)
  return TokenizerFile(own.to_str().encode())


@pytest.mark.parametrize("kind", ["words", "pieces", "file"])
@given(data=st.data())
def test_parts_of_a_text_join_to_it(kind, data):
  """Whatever the tokens: half a letter, the start as the end, no token."""
  own = tokenizer_of(kind)
  ordinary = st.integers(0, len(own) - 1).filter(lambda i: i not in own.special)
  letters = st.sampled_from(own.encode_all(["é漢 ▁  the \ufffd"])[0])
  ids = data.draw(st.lists(ordinary | letters, max_size=30))
  text = [own.start, *ids, own.end]
  tokens = [sample.Token(i, [[(i, 0.5)]]) for i in text]
  parts = list(sample.written(iter(tokens), own))
  whole = own.decode(ids)
  joined = whole if isinstance(whole, str) else " ".join(whole)
  assert "".join(said for said, _ in parts) == joined
  for said, read_by in parts[:-1]:
    assert not said.endswith("\ufffd") and len(read_by) == 1
  shown = list(sample.spelt(iter(tokens), own))
  assert [read_by for _, read_by in shown] == [t.experts for t in tokens]
  assert all(said for said, _ in shown)


def test_a_text_may_start_with_its_end():
  """As of files that have one token for both."""
  model = model_of("lstm")
  found = ids(texts(model, params_of(model), 9, prompt=(END, 3)))
  assert all(text[:2] == [END, 3] and len(text) > 2 for text in found)
  assert any(END not in text[2:-1] and text[-1] == END for text in found)


@pytest.fixture
def alone():
  """One device: eight would take longer."""
  with program.first_devices(1):
    yield


def sampled(capsys, workdir, *flags):
  status = main(["moejax", "sample", f"--workdir={workdir}", *flags])
  out, err = capsys.readouterr()
  return status, out, err


@pytest.mark.usefixtures("alone")
def test_a_run_goes_on_with_a_text(whole, capsys):
  flags = ("--prompt=The people", "--length=9", "--num=2", "--seed=3")
  status, out, _ = sampled(capsys, whole[0], *flags)
  lines = out.splitlines()
  assert status == 0 and len(lines) == 2
  assert all(line.startswith("The people ") for line in lines)
  assert all(len(line.split()) <= 9 for line in lines)
  assert sampled(capsys, whole[0], *flags)[1] == out
  assert sampled(capsys, whole[0], *flags[:-1])[1] != out
  # A line a token, with the mixture's experts; the last was not read.
  shown = sampled(capsys, whole[0], *flags, "--show_experts")[1]
  texts = [text.splitlines() for text in shown.strip().split("\n\n")]
  for line, text in zip(lines, texts, strict=True):
    words = [row.split()[0] for row in text if row[0] != "<"]
    assert " ".join(words) == line
    assert all(
      re.fullmatch(r"\S+ +\d+ \(0\.\d\d\).*", row) for row in text[:-1]
    )


@pytest.mark.parametrize(
  "flags, said",
  [
    (("--top_p=2",), "top_p must be above 0 and at most 1, got 2"),
    (("--num=0",), "--num is 0; give 1 or more"),
    (("--prompt=The people of", "--length=4"), ""),
    (("--prompt=The people of", "--length=3"), "prompt has 3 tokens"),
    (("--prompt=Qwxyz of",), "1 of the prompt's 2 words are unknown"),
    (("--prompt= ",), "the prompt ' ' has no words; give one with letters"),
  ],
)
@pytest.mark.usefixtures("alone")
def test_what_a_sample_says(whole, capsys, flags, said):
  status, out, err = sampled(capsys, whole[0], *flags)
  assert said in err
  assert bool(status) == (not out) == (said != "" and "unknown" not in said)
