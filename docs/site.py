"""What the site has besides docs/: the README, figures, the API reference.

Links are written as they work in the repository. The site has those files
under other names, and a page for every module of moejax.
"""

import pathlib

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
FIGURES = "experiments/results/"
# Files of the repository -> of the site.
PAGES = {
  "README.md": "index.md",
  "CHANGELOG.md": "changelog.md",
  "CITATION.cff": "CITATION.cff",
  "LICENSE": "LICENSE",
  "CONTRIBUTING.md": "contributing.md",
}
# The modules of the layer, in the order in which they are best read.
MIXTURE = [
  "moe",
  "router",
  "gating",
  "routing",
  "experts",
  "losses",
  "dispatch",
  "slots",
  "ragged",
  "grouped",
  "sharding",
  "partition",
  "testing",
]


def modules(folder):
  """Names the modules of a folder of moejax, but for those of the mixture."""
  return [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(folder.glob("*.py"))
    if path.stat().st_size and not path.stem.startswith("__")
    if folder.name != "moejax" or path.stem not in MIXTURE
  ]


PACKAGE = ROOT / "moejax"
REFERENCE = {
  "The mixture": [
    f"moejax.{name}"
    for name in MIXTURE
    if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()
  ],
  **{
    init.parent.name.capitalize(): modules(init.parent)
    for init in sorted(PACKAGE.glob("*/__init__.py"))
  },
  "Config, command line": modules(PACKAGE),
}


def on_config(config):
  """Adds the API reference to the navigation."""
  pages = [{"Public names": "api.md"}]
  for title, names in REFERENCE.items():
    pages.append({title: [{name: f"api/{name}.md"} for name in names]})
  config.nav.append({"API reference": pages})
  return config


def on_files(files, config):
  """Adds what lies outside docs/, and the pages of modules."""

  def add(name, **content):
    files.append(File.generated(config, name, **content))

  for source, name in PAGES.items():
    if name in ("index.md", "changelog.md"):
      text = (ROOT / source).read_text(encoding="utf-8")
      add(name, content=_relink(text, root="").replace("](docs/", "]("))
    elif source in ("LICENSE", "CITATION.cff"):
      add(name, abs_src_path=str(ROOT / source))
  for path in sorted((ROOT / FIGURES).glob("*.png")):
    add(f"figures/{path.name}", abs_src_path=str(path))
  for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
    add(f"notebooks/{path.name}", abs_src_path=str(path))
  for name in sum(REFERENCE.values(), []):
    add(f"api/{name}.md", content=f"# `{name}`\n\n::: {name}\n")
  return files


def on_page_markdown(markdown, **_):
  """Makes links of a page in docs/ those of the site."""
  return _relink(markdown, root="../")


def _relink(text, root):
  """Makes links to files outside docs/, which `root` leads to, the site's."""
  text = text.replace(f"]({root}{FIGURES}", "](figures/")
  for source, name in PAGES.items():
    text = text.replace(f"]({root}{source}", f"]({name}")
  return text
