"""lm1b: TFDS downloads and prepares it from loopback; read without TensorFlow.

The archive is a small one of the real layout.
"""

import functools
import glob
import http.server
import importlib.util
import io
import json
import pathlib
import re
import runpy
import shutil
import sys
import tarfile
import threading
import types

import pytest
from ml_collections import ConfigDict
from tensorflow_datasets.core.download import downloader, extractor
from tensorflow_datasets.datasets.lm1b import lm1b_dataset_builder

from moejax import config as config_lib
from moejax.data import corpora, kept, lm1b, text, vocab
from moejax.training import loop, run

TOP = "1-billion-word-language-modeling-benchmark-r13output"
TRAIN = "training-monolingual.tokenized.shuffled/news.en-{:05}-of-00100"
HELD_OUT = (
  "heldout-monolingual.tokenized.shuffled/news.en.heldout-{:05}-of-00050"
)
# The few functions that TFDS takes of TensorFlow to prepare little data.
FILES_ONLY = types.SimpleNamespace(
  io=types.SimpleNamespace(
    gfile=types.SimpleNamespace(glob=glob.glob, GFile=open)
  ),
  compat=types.SimpleNamespace(as_text=str),
  errors=types.SimpleNamespace(UnimplementedError=NotImplementedError),
)


@pytest.fixture(scope="module")
def files(corpus):
  """The archive's files, a tokenised sentence a line."""
  lines = corpus.read_text(encoding="utf-8").splitlines()
  sentences = list(dict.fromkeys(" ".join(vocab.words(li)) for li in lines))
  sentences[0] += " 5\xa0%"
  sentences[800] += " neverseen"
  return {
    TRAIN.format(1): sentences[:400],
    TRAIN.format(2): sentences[400:800],
    HELD_OUT.format(0): sentences[800:900],
    HELD_OUT.format(1): sentences[900:1000],
  }


@pytest.fixture(scope="module")
def vocab_file(files, tmp_path_factory):
  path = tmp_path_factory.mktemp("vocab") / "vocab-2016-09-10.txt"
  train = files[TRAIN.format(1)] + files[TRAIN.format(2)]
  words = sorted({word for sentence in train for word in sentence.split(" ")})
  entries = ["</S>", "<S>", "<UNK>", *words]
  path.write_text("\n".join(entries) + "\n", encoding="utf-8")
  return path


@pytest.fixture(scope="module")
def url(files, tmp_path_factory):
  """Where the archive can be downloaded."""
  folder = tmp_path_factory.mktemp("served")
  with tarfile.open(folder / f"{TOP}.tar.gz", "w:gz") as archive:
    for name, sentences in files.items():
      content = "".join(f"{sentence}\n" for sentence in sentences).encode()
      member = tarfile.TarInfo(f"{TOP}/{name}")
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      pass

  handler = functools.partial(Quiet, directory=folder)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/{TOP}.tar.gz"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def prepared(url, tmp_path_factory):
  """A data_dir with lm1b, prepared by what the error message says."""
  data_dir = tmp_path_factory.mktemp("tfds")
  with pytest.raises(FileNotFoundError, match="lm1b is not prepared") as caught:
    lm1b.open_lm1b(data_dir)
  assert "\n" not in str(caught.value)
  (program,) = re.findall('python -c "(.*)"', str(caught.value))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setattr(lm1b_dataset_builder, "_DOWNLOAD_URL", url)
    if importlib.util.find_spec("tensorflow") is None:
      for module in (lm1b_dataset_builder, downloader, extractor):
        patch.setattr(module, "tf", FILES_ONLY)
    with corpora.quiet():
      exec(program, {})
  return data_dir


@pytest.fixture(scope="module")
def section(prepared, vocab_file):
  """The section `data` of a config."""
  return {
    "kind": "lm1b",
    "data_dir": str(prepared),
    "vocab_file": str(vocab_file),
    "vocab_size": len(vocab_file.read_text(encoding="utf-8").splitlines()),
    "row_length": 32,
    "batch_size": 16,
  }


def data_of(section, tmp_path, **fields):
  return config_lib.data(ConfigDict({"data": section | fields}), tmp_path)


# -- reading ------------------------------------------------------------------


def test_every_sentence_is_in_its_split(prepared, files):
  texts = lm1b.open_lm1b(prepared)
  train = files[TRAIN.format(1)] + files[TRAIN.format(2)]
  held_out = files[HELD_OUT.format(0)] + files[HELD_OUT.format(1)]
  assert sorted(texts["train"]) == sorted(train)
  assert len(texts["validation"]) == 4
  assert sorted([*texts["validation"], *texts["test"]]) == sorted(held_out)


def test_the_published_test_is_one_file(prepared, files):
  extracted = prepared / "downloads" / "extracted"
  (path,) = extracted.glob(f"*/{TOP}/{HELD_OUT.format(0)}")
  texts = lm1b.open_lm1b(prepared, str(path))
  assert texts["test"] == files[HELD_OUT.format(0)]
  few = list(lm1b.open_lm1b(prepared)["validation"])
  want = [line for line in few if line in files[HELD_OUT.format(1)]]
  assert texts["validation"] == want != few


def test_ids_are_those_of_the_vocabulary_file(section, vocab_file, tmp_path):
  data = data_of(section, tmp_path)
  entries = vocab_file.read_text(encoding="utf-8").splitlines()
  line = {entry: number for number, entry in enumerate(entries)}
  for split, texts in data.texts.items():
    want = []
    for sentence in texts:
      words = sentence.split(" ")
      want += [line.get(word, line["<UNK>"]) for word in words]
      want.append(line["</S>"])
    assert data.tokens(split).ids.tolist() == want
  assert "5\xa0%" in line and "neverseen" not in line


def test_tensorflow_is_not_needed(section, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  data = data_of(section, tmp_path)
  assert all(data.texts["test"])
  assert len(data.rows("test")) > 10


# -- bad input ----------------------------------------------------------------


def test_a_vocabulary_that_is_not_there(section, tmp_path):
  for name in ("", str(tmp_path), str(tmp_path / "nowhere.txt")):
    message = f"config.data.vocab_file is '{name}', which is no file.*entries"
    with pytest.raises(FileNotFoundError, match=message) as caught:
      data_of(section, tmp_path, vocab_file=name)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_of_another_size(section, tmp_path):
  message = r"vocab-2016-09-10.txt has [\d,]+ entries, but .* is 793,471"
  with pytest.raises(ValueError, match=message):
    data_of(section, tmp_path, vocab_size=793_471)
  message = r"is 1,000; give its first 1,000 lines \(head -n 1000\), or"
  with pytest.raises(ValueError, match=message):
    data_of(section, tmp_path, vocab_size=1000)


def test_files_for_tensorflow_only(prepared, tmp_path):
  folder = shutil.copytree(prepared / "lm1b", tmp_path / "lm1b") / "1.1.0"
  for path in folder.glob("*.array_record-*"):
    path.rename(folder / path.name.replace("array_record", "tfrecord"))
  description = folder / "dataset_info.json"
  values = json.loads(description.read_text())
  description.write_text(json.dumps(values | {"fileFormat": "tfrecord"}))
  message = "1.1.0 as tfrecord files, .*file_format='array_record'"
  with pytest.raises(ValueError, match=message) as caught:
    lm1b.open_lm1b(tmp_path)
  assert "\n" not in str(caught.value)


def test_a_field_of_another_kind(section, tmp_path):
  with pytest.raises(ValueError, match="config.data.min_count does not exist"):
    data_of(section, tmp_path, min_count=3)


# -- training -----------------------------------------------------------------


def test_a_model_trains(
  section, files, tmp_path, standard_promotion, monkeypatch
):
  del standard_promotion
  tiny = pathlib.Path(__file__).parents[2] / "configs" / "tiny.py"
  values = runpy.run_path(str(tiny))["get_config"]().to_dict()
  values["data"] = section
  values["model"] |= {"width": 8, "num_samples": 16}
  values["model"]["moe"] |= {"group_size": 32}
  values["train"] |= {"steps": 4, "eval_every": 4, "log_every": 2}
  values["train"]["microbatches"] = 2
  config = ConfigDict(values)
  workdir = tmp_path / "run"
  evaluated = sizes_of_evaluation(monkeypatch)
  result = loop.train(config, workdir)
  monkeypatch.setattr(kept, "_make", None)  # nothing is left to make
  data = config_lib.data(config, workdir)
  assert result["test"]["words"] == len(data.tokens("test").ids)
  assert result["test"]["perplexity"] < 2 * len(data.vocabulary)

  held_out = tmp_path / "held_out.txt"
  held_out.write_text("\n".join(files[HELD_OUT.format(0)]), encoding="utf-8")
  own = run.evaluate_run(workdir, "test", [str(held_out)])
  sentences = files[HELD_OUT.format(0)]
  assert own["words"] == sum(len(s.split(" ")) + 1 for s in sentences)
  # Validation, test, and the file of one's own: by rows of a microbatch.
  assert evaluated == [section["batch_size"] // 2] * 3


def sizes_of_evaluation(monkeypatch):
  """The rows that every evaluation reads at once."""
  sizes = []
  batches = text.eval_batches

  def seen(rows, batch_size, *rest):
    sizes.append(batch_size)
    return batches(rows, batch_size, *rest)

  monkeypatch.setattr(text, "eval_batches", seen)
  return sizes
