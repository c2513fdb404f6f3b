"""Pairs of several languages: what one of them tests, no other trains on."""

from experiments import multilingual
from moejax.data.packing import Direction


def test_held_out_english_is_so_in_all_languages(tmp_path):
  english = [f"sentence {i}" for i in range(400)]
  found, lines = {}, {}
  for name, some in (("fr", english), ("de", english[::-1])):
    lines[name] = [f"{line}\t{name} {line}" for line in some]
    path = tmp_path / f"{name}.tsv"
    path.write_text("".join(f"{line}\n" for line in lines[name]))
    found[Direction("en", name)] = [path]
  splits = multilingual.carve(found, tmp_path / "pairs")
  assert set(splits) == {"train", "validation", "test"}
  sources = {split: set() for split in splits}
  for name in lines:
    written = []
    for split in splits:
      path = tmp_path / "pairs" / f"{split}_en-{name}.tsv"
      assert f"en-{name}={path}" in splits[split].split(",")
      own = path.read_text().splitlines()
      sources[split] |= {line.split("\t")[0] for line in own}
      written += own
    assert sorted(written) == sorted(lines[name])
  assert sum(map(len, sources.values())) == len(english)
  assert len(sources["test"]) == len(sources["validation"]) == 20
