"""What README, CONTRIBUTING and the pages of docs/ name is there: files, modules, functions, studies and links."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def names_something(dotted: str) -> bool:
    """Whether a dotted name is a module, or is found in one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            if find_spec(".".join(parts[:count])) is None:
                continue
        except ModuleNotFoundError:
            continue
        if count == len(parts):
            return True  # not imported: it may need an extra
        found = import_module(".".join(parts[:count]))
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_every_path_exists(page: Path) -> None:
    named = re.findall(r"(?<![\w/.])((?:edge_ft|export|bench|tests|docs)/[\w/.-]*\w)", page.read_text(encoding="utf-8"))
    # A decision may be named by its number alone.
    assert [path for path in named if not (ROOT / path).exists() and not list(ROOT.glob(f"{path}-*.md"))] == []


@pages
def test_every_function_of_a_file_is_in_it(page: Path) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8"))
    assert [f"{file}::{name}" for file, name in named if not re.search(rf"\b{name}\b", (ROOT / file).read_text())] == []


@pages
def test_every_dotted_name_can_be_imported(page: Path) -> None:
    named = set(re.findall(r"\bedge_ft(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8")))
    assert sorted(name for name in named if not names_something(name)) == []


@pages
def test_every_study_exists(page: Path) -> None:
    named = set(re.findall(r"edge_ft\.bench\.studies ([a-z]+)", page.read_text(encoding="utf-8")))
    assert sorted(name for name in named if not names_something(f"edge_ft.bench.studies.{name}")) == []


@pytest.mark.parametrize("page", [*PAGES, *DECISIONS], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_generated_pages_have_the_text_of_their_writers() -> None:
    from edge_ft.bench.studies.claim_tables import INTRODUCTION
    from edge_ft.bench.studies.models import FOOT, HEAD

    models, claims = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("models.md", "claims.md"))
    assert models.startswith(HEAD) and models.endswith(FOOT)
    assert claims.startswith(INTRODUCTION.format(cores=2))


def test_the_changelog_names_modules_by_their_new_names() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    renames = changelog.partition("### Renamed Python modules")[2].partition("\n##")[0]
    targets = re.findall(r"→\s+((?:`[\w.]+`(?:,| and)?\s*)+)", renames)
    new = {f"edge_ft.{name}" for target in targets for name in re.findall(r"`([\w.]+)`", re.split(r",\s", target)[0])}
    assert len(new) > 40
    assert sorted(name for name in new if not names_something(name)) == []


def test_the_navigation_of_the_site_names_pages_that_are_there() -> None:
    """Decisions, and pages that it does not name, are added while the site is built."""
    named = set(re.findall(r": ([\w/-]+)\.(?:md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    docs = ROOT / "docs"
    written = {page.relative_to(docs).with_suffix("").as_posix() for page in docs.rglob("*.md")}
    written |= {f"tutorials/{script.stem}" for script in (docs / "tutorials").glob("*.sh")} | {"cli"}
    assert named and named - written == set()
