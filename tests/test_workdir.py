"""What a run keeps: its vocabulary."""

import pytest
from ml_collections import ConfigDict

from moejax import workdir
from moejax.data.pieces import Pieces
from moejax.data.vocab import Vocabulary


@pytest.mark.parametrize("kind", [Vocabulary, Pieces])
def test_a_lost_vocabulary_is_told_from_a_broken_one(kind, tmp_path):
  with pytest.raises(FileNotFoundError, match=rf"{kind.FILE} is gone"):
    workdir.vocabulary(kind, tmp_path)
  (tmp_path / kind.FILE).write_text("a\n")
  with pytest.raises(ValueError, match=kind.FILE):
    workdir.vocabulary(kind, tmp_path)


def test_the_runs_own_vocabulary_and_no_other(tmp_path):
  own = Vocabulary.build(["a b a"], 1)
  workdir.remember(ConfigDict(), own, {}, tmp_path)
  assert workdir.vocabulary(Vocabulary, tmp_path).digest == own.digest
  Vocabulary.build(["a b a c"], 1).save(tmp_path / Vocabulary.FILE)
  with pytest.raises(ValueError, match=f"not the one.*{own.digest}; put"):
    workdir.vocabulary(Vocabulary, tmp_path)
