"""What documents and configuration say is true of the tree: files, links, variables, pins."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("fastrnn", "benchmarks", "examples", "tests", "csrc", "scripts")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")])
PATH_IN_TEXT = re.compile(
    r"(?<![\w./-])((?:[\w.-]+/)*[\w-]+\.(?:py|cc|h|md|toml|txt|sh|map|yml|in))\b"
)


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _code() -> Iterator[Path]:
    yield ROOT / "setup.py"
    for folder in CODE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cc", ".h", ".cu", ".cuh", ".sh"}:
                yield path


def _prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def _anchors(document: Path) -> set[str]:
    """The fragments that a rendered document offers: its headings, in GitHub's spelling."""
    headings = re.findall(r"^#+ (.+)$", _prose(document.read_text()), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("document", DOCUMENTS, ids=_id)
def test_links_lead_somewhere(document):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(document.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (
            fragment and file.suffix == ".md" and fragment not in _anchors(file)
        ):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=_id)
def test_named_files_exist(document):
    """A path is looked up from the root and from the document; a bare name, anywhere."""
    names = {path.name for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*")}
    names |= {path.name for path in [*ROOT.iterdir(), *(ROOT / "docs").rglob("*")]}
    missing = [
        found
        for found in set(PATH_IN_TEXT.findall(re.sub(r"https?://\S+", "", document.read_text())))
        if not ((ROOT / found).exists() or (document.parent / found).exists() or found in names)
    ]
    assert missing == []


def test_documents_named_in_comments_exist():
    named = {
        (found, _id(path))
        for path in _code()
        for found in re.findall(r"\b(docs/[\w/-]+\.md|[A-Z]{4,}\.md)\b", path.read_text())
    }
    assert [pair for pair in sorted(named) if not (ROOT / pair[0]).exists()] == []


def test_make_targets_named_in_documents_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):(?!=)", makefile, re.MULTILINE))
    named = {
        (target, _id(document))
        for document in DOCUMENTS
        for target in re.findall(
            r"(?:`|^|&& )make ([a-z][a-z0-9-]*)", document.read_text(), re.MULTILINE
        )
    }
    assert [pair for pair in sorted(named) if pair[0] not in targets] == []


def test_every_environment_variable_is_documented():
    read: set[str] = set()
    for path in _code():
        text = path.read_text()
        if path.suffix == ".py":
            strings = (n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant))
            read |= {
                s for s in strings if isinstance(s, str) and re.fullmatch(r"FASTRNN_[A-Z_]+", s)
            }
        else:
            read |= set(re.findall(r'"(FASTRNN_[A-Z_]+)"', text))
    table = (ROOT / "docs" / "environment.md").read_text()
    assert set(re.findall(r"^\| `(FASTRNN_[A-Z_]+)`", table, re.MULTILINE)) == read


def test_changelog_has_a_heading_for_the_version():
    text = (ROOT / "fastrnn" / "_version.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version in headings


def _pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_constraints_pin_exactly_one_version_for_each_python():
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        here = [
            p for p in _pins() if p.marker is None or p.marker.evaluate({"python_version": python})
        ]
        names = [canonicalize_name(pin.name) for pin in here]
        assert sorted(names) == sorted(set(names))
        assert [str(p) for p in here if not re.fullmatch(r"==[\d.]+", str(p.specifier))] == []


def test_every_declared_requirement_is_pinned():
    text = (ROOT / "pyproject.toml").read_text()
    pinned = {canonicalize_name(pin.name): pin for pin in _pins()}
    extras = "requires|dependencies|bench|docs|models|onnx|triton|test|dev"
    lists = re.findall(rf"^(?:{extras}) = (\[.*\])$", text, re.MULTILINE)
    assert len(lists) == 9
    for requirement in (Requirement(line) for found in lists for line in ast.literal_eval(found)):
        if requirement.name == "fastrnn":
            continue
        pin = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(str(pin.specifier).removeprefix("==")), requirement


def test_workflow_actions_are_pinned_by_commit():
    for workflow in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        for action in re.findall(r"uses: (\S+)", workflow.read_text()):
            assert re.search(r"@[0-9a-f]{40}$", action), f"{workflow.name}: {action}"
