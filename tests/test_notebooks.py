"""Chapters: pairs in step, a common frame, and execution at `smoke`."""

import re
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml

from dernet_utils.book.graph import chapter_names
from dernet_utils.core.files import PROJECT

NOTEBOOKS = PROJECT / "notebooks"
CHAPTERS = chapter_names()
# The template, as book/chapter_template.md explains it.
MOST_CODE_CELLS = 35
MOST_CELL_LINES, MOST_HIDDEN_CELL_LINES = 25, 30
WORDS = (1500, 3300)  # of Markdown
MOST_COLUMNS = 120  # of a source line


def toc_files() -> list[str]:
    toc = yaml.safe_load((PROJECT / "_toc.yml").read_text())
    return [toc["root"], *(page["file"] for part in toc["parts"] for page in part["chapters"])]


def read(name: str) -> nbformat.NotebookNode:
    return jupytext.read(NOTEBOOKS / f"{name}.py")


def code_cells(notebook: nbformat.NotebookNode) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown_of(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_every_chapter_has_its_pair_and_every_pair_its_chapter():
    assert CHAPTERS
    assert [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))] == CHAPTERS


@pytest.mark.parametrize("name", CHAPTERS)
def test_pair_is_in_step_and_without_outputs(name: str):
    written = read(name)
    paired = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    for one, other in zip(written.cells, paired.cells, strict=True):
        assert (one.cell_type, one.source) == (other.cell_type, other.source)
        assert one.metadata.get("tags", []) == other.metadata.get("tags", [])
    for cell in code_cells(paired):
        assert cell.outputs == [] and cell.execution_count is None
    for notebook in (written, paired):
        assert notebook.metadata.kernelspec.name == "python3"
        assert notebook.metadata.jupytext.formats == "ipynb,py:percent"


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_keeps_the_frame(name: str):
    notebook = read(name)
    number, _, topic = name.partition("_")
    opening = notebook.cells[0]
    assert opening.cell_type == "markdown"
    label, title = opening.source.splitlines()[:2]
    assert label == f"(chap:{topic.replace('_', '-')})="
    assert title.startswith(f"# {number} · ")
    head = "\n".join(cell.source for cell in notebook.cells[:3])
    assert "In this chapter" in head

    parameters = [c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", [])]
    assert len(parameters) == 1
    assert re.search(r'^profile = ""', parameters[0].source, re.MULTILINE)

    markdown = markdown_of(notebook)
    assert 3 <= len(re.findall(r"^[`:]{3,}\{exercise(?:-start)?\}", markdown, re.MULTILINE)) <= 5
    assert len(re.findall(r"^[`:]{3,}\{solution(?:-start)?\}", markdown, re.MULTILINE)) >= 3


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_keeps_the_template(name: str):
    notebook = read(name)
    markdown = markdown_of(notebook)
    for part in ("You will be able to", "\n## Exercises", "\n## Takeaways"):
        assert part in markdown
    assert WORDS[0] <= len(markdown.split()) <= WORDS[1]
    cells = code_cells(notebook)
    assert len(cells) <= MOST_CODE_CELLS
    too_long = []
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        hidden = any("hide-input" in tag or "remove-" in tag for tag in tags)
        lines = cell.source.splitlines()
        if len(lines) > (MOST_HIDDEN_CELL_LINES if hidden else MOST_CELL_LINES):
            too_long.append((len(lines), lines[0]))
    assert too_long == []
    source = (NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert [n for n, line in enumerate(source, 1) if len(line) > MOST_COLUMNS] == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_figures_have_a_label_and_alternative_text(name: str):
    markdown = markdown_of(read(name))
    fences = re.findall(r"^([`:]{3,})\{(?:glue:)?figure\}(.*?)^\1", markdown, re.M | re.S)
    assert fences
    for _, figure in fences:
        # Options are lines of `:key: value`, or a block of YAML.
        assert re.search(r"^:?name: fig:[\w-]+$", figure, re.M), figure
        assert re.search(r"^:?alt: (?:.{20,}|[>|]-?\n +.{20,})", figure, re.M), figure


def test_toc_holds_what_exists_and_all_of_it():
    files = toc_files()
    assert len(files) == len(set(files))
    pages = [f"book/{path.stem}" for path in (PROJECT / "book").glob("*.md")]
    assert sorted(files) == sorted(pages + [f"notebooks/{name}" for name in CHAPTERS])


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_was_executed_whole(name: str, smoke_book: Path):
    path = smoke_book / "runs" / "smoke" / "chapters" / f"{name}.ipynb"
    executed = nbformat.read(path, as_version=4)
    cells = code_cells(executed)
    assert all(cell.execution_count for cell in cells if cell.source.strip())
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    injected = [c for c in cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert len(injected) == 1 and 'profile = "smoke"' in injected[0].source
    # What a reader downloads names no folder of the machine that made it.
    assert str(smoke_book) not in path.read_text()
