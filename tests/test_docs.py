"""The site is made without a warning; links lead somewhere; metadata are right."""

import importlib.util
import re
import subprocess
import sys

from markdown_table import cells
import pytest
import yaml

import insvp_jax
from insvp_jax.methods import METHODS


def load(root, name):
  """Returns docs/<name>.py as a module."""
  spec = importlib.util.spec_from_file_location(name, root / "docs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
  """The site, made with warnings as errors: also of a page that no list has."""
  pytest.importorskip("sphinx")
  pytest.importorskip("myst_nb")
  pytest.importorskip("sphinx_book_theme")
  folder = tmp_path_factory.mktemp("site")
  command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
  done = subprocess.run(
    [*command, "-d", folder / "doctrees", root / "docs", folder / "html"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return folder / "html"


def test_the_site_has_every_page_and_every_notebook(root, site):
  for path in (root / "docs").glob("*.md"):
    assert (site / f"{path.stem}.html").exists(), path
  for path in (root / "notebooks").glob("*.ipynb"):
    shown = (site / "project" / "notebooks" / f"{path.stem}.html").read_text()
    assert "cell_output" in shown, path
  assert not (root / "docs" / "project").exists()


def test_the_catalogue_has_every_method_and_its_count(root, site):
  text, _, _ = (root / "docs" / "methods.md").read_text().partition("\n## Which runs")
  titles, *rows = cells(text)
  counts = {row[0].strip("`"): row[titles.index("parameters")] for row in rows}
  page = (site / "catalogue.html").read_text()
  for name in METHODS:
    # A link of the table, not of the list of sections.
    row = rf'<td><p><a[^>]*href="#{name.replace("_", "[-_]")}"[^>]*>.*?</tr>'
    found = re.search(row, page, re.S)
    assert found and f">{counts[name]}<" in found[0], name
    assert f"<h2>{name}<" in page


def test_the_reference_has_every_public_name(site):
  page = (site / "api.html").read_text()
  for name in insvp_jax.__all__:
    assert re.search(rf'<h2><code[^>]*><span class="pre">insvp_jax.{name}<', page), name
  assert "Loads a run, wherever and on however many devices" in page
  assert "Raises" in page


def test_links_of_the_site_stay_on_it(site):
  page = (site / "start.html").read_text()
  assert 'href="project/notebooks/load_run.html"' in page
  page = (site / "project" / "launch" / "README.html").read_text()
  assert "<h1>On a cluster<" in page


def test_equations_are_those_of_the_methods(root):
  catalogue = load(root, "catalogue")
  assert list(catalogue.EQUATIONS) == list(METHODS)
  assert all(e.count("{") == e.count("}") for e in catalogue.EQUATIONS.values())


def test_the_catalogue_names_a_method_without_an_equation(root, monkeypatch):
  catalogue = load(root, "catalogue")
  monkeypatch.delitem(catalogue.EQUATIONS, "lora")
  with pytest.raises(LookupError, match="lora: not among EQUATIONS"):
    catalogue.catalogue()


def anchors(text):
  """Returns the anchors that GitHub gives the headings of a page."""
  text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
  headings = re.findall(r"^#+ (.*)$", text, re.M)
  plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
  return {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in plain}


def test_links_lead_somewhere(root):
  pages = [
    p for d in (".", "docs", "launch", "benchmarks") for p in root.glob(f"{d}/*.md")
  ]
  notebooks = list(root.glob("notebooks/*.ipynb"))
  assert len(pages) > 20 and len(notebooks) >= 5
  for page in [*pages, *notebooks]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for target, anchor in re.findall(
      r"\]\((?!\w+:)([^()#\s\"\\]*)(#[^()\s]*)?\)", text
    ):
      path = page.parent / target if target else page
      assert path.exists(), f"{page}: {target}"
      if anchor and path.suffix == ".md":
        assert anchor[1:] in anchors(path.read_text()), f"{page}: {target}{anchor}"


def test_the_newest_change_is_of_this_version(root):
  headings = re.findall(r"^## (.*)$", (root / "CHANGELOG.md").read_text(), re.M)
  assert headings[0] == "[Unreleased]"
  versions = [
    re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", line).groups()
    for line in headings[1:]
  ]
  assert versions[0][0] == insvp_jax.__version__
  assert versions == sorted(versions, reverse=True)
  citation = yaml.safe_load((root / "CITATION.cff").read_text())
  assert (citation["version"], str(citation["date-released"])) == versions[0]


def test_the_citation_has_what_its_format_asks_for(root):
  citation = yaml.safe_load((root / "CITATION.cff").read_text())
  assert citation["cff-version"] == "1.2.0"
  assert {"message", "title", "authors", "license"} <= set(citation)
  titles = []
  for reference in citation["references"]:
    assert {"type", "title", "authors", "year", "url"} <= set(reference)
    for author in reference["authors"]:
      assert set(author) in ({"name"}, {"family-names", "given-names"})
    titles.append(reference["title"])
  assert [title.split(":")[0] for title in titles] == ["InsVP", "Visual Prompt Tuning"]


def test_forms_of_issues_have_what_github_asks_for(root):
  forms = sorted((root / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
  assert [form.stem for form in forms] == ["bug", "config", "feature", "method"]
  for form in forms:
    content = yaml.safe_load(form.read_text())
    if form.stem == "config":
      continue
    assert {"name", "description", "body"} <= set(content)
    ids = [item["id"] for item in content["body"]]
    assert len(set(ids)) == len(ids)
    for item in content["body"]:
      assert item["type"] in ("input", "textarea", "dropdown")
      assert item["attributes"]["label"]
      assert item["type"] != "dropdown" or item["attributes"]["options"]


def test_the_site_is_made_with_the_extra_that_there_is(root):
  service = yaml.safe_load((root / ".readthedocs.yaml").read_text())
  (install,) = service["python"]["install"]
  assert service["sphinx"]["fail_on_warning"]
  assert (root / service["sphinx"]["configuration"]).exists()
  described = (root / "pyproject.toml").read_text()
  for extra in install["extra_requirements"]:
    assert f"\n{extra} = [" in described
    assert re.search(rf"\[.*\b{extra}\b.*\]", (root / "requirements.txt").read_text())
