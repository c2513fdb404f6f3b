"""Pairs out of catalogues: what is read, cleaned, left out and written."""

import collections
import io
import json
import os
import zipfile

import pytest
from babel.messages import catalog, mofile

from experiments import package_pairs
from experiments.package_pairs import clean

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


def compiled(*pairs):
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
  tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
  own = {"METADATA": about, "WHEEL": tags, "RECORD": ""}
  contents = contents | {f"{stem}.dist-info/{n}": x for n, x in own.items()}
  path = folder / f"{stem}-py3-none-any.whl"
  with zipfile.ZipFile(path, "w") as archive:
    for file, content in contents.items():
      archive.writestr(file, content)
  return path


def kept(*messages):
  left_out = collections.Counter()
  found = list(package_pairs.kept(messages, set(), left_out))
  return found, dict(left_out)


def test_a_wheel_is_read_in_the_order_of_names_one_language_only(tmp_path):
  other = compiled(("Other", "Anders"))
  days = ("{n} day", "{n} days"), ("{n} jour", "{n} jours")
  english = {"a": {"title": "Name", "data": {"x": "Key"}}, "b": "Only here"}
  french = {"a": {"data": {"x": "Clé"}, "title": "Nom"}, "c": "Sans anglais"}
  contents = {
    "p/locale/fr_FR/LC_MESSAGES/z.mo": compiled(days),
    "p/locale/fr/LC_MESSAGES/a.po": PO,
    "fr/LC_MESSAGES/a.mo": compiled(("First", "Premier")),
    "p/locale/fr_CA/LC_MESSAGES/a.mo": other,
    "p/locale/de/LC_MESSAGES/a.mo": other,
    "p/translations/fr.json": json.dumps(french),
    "p/translations/de.json": '{"a": "Anders"}',
    "p/translations/en.json": json.dumps(english),
    "p/readme.txt": "fr",
  }
  path = wheel(tmp_path, "some", "1.0", contents)
  assert list(package_pairs.read(path, "fr")) == [
    ("First", "Premier"),
    *READ,
    ("{n} days", "{n} jours"),
    ("Name", "Nom"),
    ("Key", "Clé"),
    ("Only here", ""),
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
  assert kept((source, target)) == ([], {f"with {reason}": 1})


def test_paragraphs_are_pairs_where_both_sides_have_as_many():
  found = clean("One.\n\nTwo\nthree {a}.", "Un.\n \nDeux trois {a}.")
  assert [*found] == [("One.", "Un."), ("Two three {1}.", "Deux trois {1}.")]
  found = clean("One.\n\nTwo.", "Un et deux.")
  assert [*found] == [("One. Two.", "Un et deux.")]


def test_no_source_twice_and_the_first_wins():
  pairs, left_out = kept(
    ("Phase 1", "Phase un"),
    ("Failed to connect", "Échec"),
    ("Failed to connect.", "Raté."),
    ("phase {number}", "phase {number}e"),
    ("Phases", ""),
    ("Name", "Name"),
    ("12:30", "12 h 30"),
  )
  assert pairs == [("Phase 1", "Phase un"), ("Failed to connect", "Échec")]
  assert left_out == {
    "seen before": 2,
    "without a translation": 1,
    "the same in both languages": 2,
  }


def test_whole_command(tmp_path, monkeypatch, capsys):
  index, out = tmp_path / "index", tmp_path / "new" / "runs"
  index.mkdir()
  # All that pip finds packages in.
  monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(index))
  only = package_pairs.Package("some-program", "1.0", "MIT", 0.1)
  monkeypatch.setattr(package_pairs, "PACKAGES", (only,))
  with pytest.raises(SystemExit, match="could not download some-program==1.0"):
    package_pairs.main([f"--out={out}"])
  assert not list(out.iterdir())
  with pytest.raises(SystemExit):
    package_pairs.main(["--languages=fr,xx", f"--out={out}"])
  assert "no language 'xx'; there are de, es, fr" in capsys.readouterr().err

  po = PO.replace("fichier", "datei")
  contents = {f"{x}/LC_MESSAGES/a.po": y for x, y in (("fr", PO), ("de", po))}
  wheel(index, "some-program", "1.0", contents)
  for language in ("fr", "de"):
    name = f"jupyterlab-language-pack-{language}-{language.upper()}"
    lines = compiled(("Open", "other"), (f"In {language}", "Ja. Oui."))
    wheel(index, name, "4.5.post3", {f"{language}/LC_MESSAGES/a.mo": lines})
  package_pairs.main(["--languages=fr,de", f"--out={out}"])
  assert (out / "en_fr.tsv").read_text(encoding="utf-8") == (
    "The file was saved.\tLe fichier a été enregistré.\n"
    "{1} files\t{1} fichiers\nOpen\tOuvrir\nIn fr\tJa. Oui.\n"
  )
  assert "{1} dateis\n" in (out / "en_de.tsv").read_text(encoding="utf-8")
  assert len(list(out.iterdir())) == 2
  said = capsys.readouterr().out
  assert said.count("downloading some-program==1.0 (0.1 MB)") == 1
  assert "some-program 1.0, MIT: 3\n" in said
  assert "1 without a translation" in said
  assert "en_fr.tsv: 4 pairs, 9 English words" in said
