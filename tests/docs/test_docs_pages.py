"""The pages of the documentation: links lead somewhere, every page is in the index."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_headings_that_exist(page):
    missing = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            text = re.sub(
                r"^```.*?^```",
                "",
                ((page.parent / target) if target else page).read_text(),
                flags=re.S | re.M,
            )
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            # As GitHub makes them.
            if anchor not in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}:
                missing.append(f"{target}#{anchor}")
    assert not missing


def test_the_pages_stay_short():
    assert sum(len(page.read_text().split()) for page in (ROOT / "docs").glob("*.md")) <= 20_000


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not {name for name in pages if f"({name})" not in index}


def test_the_citation_names_paper_and_software():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    import slimfit_ds

    assert citation["version"] == slimfit_ds.__version__
    paper = citation["preferred-citation"]
    assert "2305.18513" in paper["url"]
    assert paper["authors"][0]["family-names"] == "Ardakani"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_compile(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_names_that_are_mentioned_exist(page):
    if page.name in {"LOG.md", "CHANGELOG.md", "extending.md"}:
        pytest.skip("speaks of what was, or of what a reader will write")
    text = page.read_text()
    rooms = "slimfit_ds|tests|benchmarks|recipes|ds_configs|launch|examples|docker"
    files = {name.partition("::")[0] for name in re.findall(rf"`((?:{rooms})/[\w./-]+)`", text)}
    files |= set(re.findall(rf"\b((?:{rooms})/[\w/-]+\.(?:py|json|yaml|md))\b", text))
    assert not {name for name in files if not (ROOT / name).exists() and "/slimfit_ds" not in name}
    names = set(re.findall(r"\bslimfit_ds(?:\.\w+)+", text))
    assert not {name for name in names if not _resolves(name.removesuffix("."))}


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            item = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(item, part):
                return False
            item = getattr(item, part)
        return True
    return False
