"""Pairs out of catalogues: what is read, cleaned, left out and written."""

import io
import json
import os
import zipfile

import pytest
from babel.messages import catalog, mofile

from experiments import package_pairs
from experiments.package_pairs import Package, Pairs, clean, messages

PO = """
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\\n"

#. Of two lines.
msgid "The file "
"was saved."
msgstr "Le fichier a été enregistré."

#, python-format
msgid "%(count)s file"
msgid_plural "%(count)s files"
msgstr[0] "%(count)s fichier"
msgstr[1] "%(count)s fichiers"

#, fuzzy
msgid "Not looked at"
msgstr "Pas vu"

msgctxt "verb"
msgid "Open"
msgstr "Ouvrir"

msgid "Not translated"
msgstr ""

#~ msgid "Obsolete"
#~ msgstr "Obsolète"
"""
READ = [
  ("The file was saved.", "Le fichier a été enregistré."),
  ("%(count)s files", "%(count)s fichiers"),
  ("Open", "Ouvrir"),
  ("Not translated", ""),
]


def compiled(pairs):
  """A catalogue as .mo."""
  catalogue = catalog.Catalog(locale="fr")
  for source, target in pairs:
    catalogue.add(source, target)
  file = io.BytesIO()
  mofile.write_mo(file, catalogue)
  return file.getvalue()


def wheel(folder, name, version, contents):
  """Makes a wheel of those files."""
  stem = f"{name.replace('-', '_')}-{version}"
  about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
  path = folder / f"{stem}-py3-none-any.whl"
  with zipfile.ZipFile(path, "w") as archive:
    for file, content in contents.items():
      archive.writestr(file, content)
    archive.writestr(f"{stem}.dist-info/METADATA", about)
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    archive.writestr(f"{stem}.dist-info/WHEEL", tags)
    archive.writestr(f"{stem}.dist-info/RECORD", "")
  return path


def test_po():
  assert list(messages(PO.encode(), "a.po")) == READ


def test_mo():
  pairs = [
    ("Quit", "Quitter"),
    (("{n} day", "{n} days"), ("{n} jour", "{n} jours")),
  ]
  expected = {("Quit", "Quitter"), ("{n} days", "{n} jours")}
  assert set(messages(compiled(pairs), "a.mo")) == expected


def test_json():
  english = {"a": {"title": "Name", "data": {"x": "Key"}}, "b": "Only here"}
  french = {"a": {"data": {"x": "Clé"}, "title": "Nom"}, "c": "Sans anglais"}
  found = package_pairs.parallel(
    json.dumps(english).encode(), json.dumps(french).encode()
  )
  assert list(found) == [("Name", "Nom"), ("Key", "Clé"), ("Only here", "")]


def test_a_wheel_is_read_in_the_order_of_names_one_language_only(tmp_path):
  other = compiled([("Other", "Anders")])
  contents = {
    "p/locale/fr_FR/LC_MESSAGES/z.mo": compiled([("Last", "Dernier")]),
    "p/locale/fr/LC_MESSAGES/a.po": PO,
    "fr/LC_MESSAGES/a.mo": compiled([("First", "Premier")]),
    "p/locale/fr_CA/LC_MESSAGES/a.mo": other,
    "p/locale/de/LC_MESSAGES/a.mo": other,
    "p/translations/fr.json": '{"a": "Dernier de tous"}',
    "p/translations/de.json": '{"a": "Anders"}',
    "p/translations/en.json": '{"a": "Last of all"}',
    "p/readme.txt": "fr",
  }
  path = wheel(tmp_path, "some", "1.0", contents)
  assert list(package_pairs.read(path, "fr")) == [
    ("First", "Premier"),
    *READ,
    ("Last", "Dernier"),
    ("Last of all", "Dernier de tous"),
  ]


@pytest.mark.parametrize(
  ("source", "target", "expected"),
  [
    ("A\tb\n c.", "A\xa0b\u202fd.", ("A b c.", "A b d.")),
    ("%s of %s", "%s sur %s", ("{1} of {2}", "{1} sur {2}")),
    (
      "{name} in %(place)s",
      "Dans %(place)s : {name}",
      ("{1} in {2}", "Dans {2} : {1}"),
    ),
    ("%1 at 50% of {{ a.b }}", "{{ a.b }}%1", ("{1} at 50% of {2}", "{2}{1}")),
    ("100 % done", "100 % de fait", ("100 % done", "100 % de fait")),
    ("A <b>big</b><br/>dog", "Un **gros**\nX", ("A big dog", "Un gros X")),
    (
      'Read [the page]({url}) or <a href="x">this</a>',
      "Lisez [la page]({url}) ou <a>ceci</a>",
      ("Read the page or this", "Lisez la page ou ceci"),
    ),
    ("See [1:this].", "Voir [1:ceci].", ("See this.", "Voir ceci.")),
    ("`a` &amp; ''b''", "a &amp; b !", ("a & b", "a & b !")),
  ],
)
def test_one_line(source, target, expected):
  assert list(clean(source, target)) == [expected]


@pytest.mark.parametrize(
  ("source", "target", "reason"),
  [
    ("Hello {name}", "Bonjour", "other placeholders"),
    ("%s", "%s %s", "other placeholders"),
    ("See https://a.b", "Voir https://a.b", "addresses or markup"),
    ("Type <name>", "Entrez <nom>", "addresses or markup"),
    ("An open { brace", "Une accolade { ouverte", "addresses or markup"),
  ],
)
def test_left_out(source, target, reason):
  pairs = Pairs()
  pairs.add(source, target)
  assert pairs.pairs == []
  assert dict(pairs.left_out) == {f"with {reason}": 1}


def test_paragraphs_are_pairs_where_both_sides_have_as_many():
  assert list(clean("One.\n\nTwo\nthree {a}.", "Un.\n \nDeux trois {a}.")) == [
    ("One.", "Un."),
    ("Two three {1}.", "Deux trois {1}."),
  ]
  assert list(clean("One.\n\nTwo.", "Un et deux.")) == [
    ("One. Two.", "Un et deux.")
  ]


def test_no_source_twice_and_the_first_wins():
  pairs = Pairs()
  for source, target in [
    ("Phase 1", "Phase un"),
    ("Failed to connect", "Échec"),
    ("Failed to connect.", "Raté."),
    ("phase {number}", "phase {number}e"),
    ("Phases", ""),
    ("Name", "Name"),
    ("12:30", "12 h 30"),
  ]:
    pairs.add(source, target)
  assert pairs.pairs == [
    ("Phase 1", "Phase un"),
    ("Failed to connect", "Échec"),
  ]
  assert dict(pairs.left_out) == {
    "seen before": 2,
    "without a translation": 1,
    "the same in both languages": 2,
  }


@pytest.fixture
def index(tmp_path, monkeypatch):
  """A folder that is all that pip finds packages in."""
  folder = tmp_path / "index"
  folder.mkdir()
  monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
  only = Package("some-program", "1.0", "MIT", 0.1)
  monkeypatch.setattr(package_pairs, "PACKAGES", (only,))
  return folder


def test_whole_command(index, tmp_path, capsys):
  po = PO.replace("fichier", "datei")
  contents = {f"{x}/LC_MESSAGES/a.po": y for x, y in (("fr", PO), ("de", po))}
  wheel(index, "some-program", "1.0", contents)
  for language in ("fr", "de"):
    name = f"jupyterlab-language-pack-{language}-{language.upper()}"
    lines = compiled([("Open", "other"), (f"In {language}", "Ja. Oui.")])
    wheel(index, name, "4.5.post3", {f"{language}/LC_MESSAGES/a.mo": lines})
  out = tmp_path / "new" / "runs"
  package_pairs.main(["--languages=fr,de", f"--out={out}"])
  assert (out / "en_fr.tsv").read_text(encoding="utf-8") == (
    "The file was saved.\tLe fichier a été enregistré.\n"
    "{1} files\t{1} fichiers\nOpen\tOuvrir\nIn fr\tJa. Oui.\n"
  )
  assert "{1} dateis\n" in (out / "en_de.tsv").read_text(encoding="utf-8")
  assert sorted(path.name for path in out.iterdir()) == [
    "en_de.tsv",
    "en_fr.tsv",
  ]
  said = capsys.readouterr().out
  assert said.count("downloading some-program==1.0 (0.1 MB)") == 1
  assert "some-program 1.0, MIT: 3\n" in said
  assert "1 without a translation" in said
  assert "en_fr.tsv: 4 pairs, 9 English words" in said


def test_failed_download_names_the_package(index, tmp_path):
  assert not list(index.iterdir())
  with pytest.raises(SystemExit, match="could not download some-program==1.0"):
    package_pairs.main([f"--out={tmp_path / 'out'}"])
  assert not list((tmp_path / "out").iterdir())


def test_unknown_language(tmp_path, capsys):
  with pytest.raises(SystemExit):
    package_pairs.main(["--languages=fr,xx", f"--out={tmp_path / 'out'}"])
  assert "no language 'xx'; there are de, es, fr" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
