"""A checked dataset on the terminal: its fingerprint as a table, the notes, then every problem."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from dernet_utils.dataset.check import DatasetReport

NAMED_FILES = 5  # of those that share a note


def print_report(report: DatasetReport) -> None:
    """Print the fingerprint, one column per split, the notes, and each problem and their number."""
    console = Console(soft_wrap=True)
    table = Table("", *report.fingerprint, title="Fingerprint", title_justify="left")
    rows: dict[str, dict[str, str]] = {}
    for split, facts in report.fingerprint.items():
        for name, value in _flat(facts):
            rows.setdefault(name, {})[split] = value
    for name, values in rows.items():
        table.add_row(name, *(values.get(split, "–") for split in report.fingerprint))
    console.print(table)
    for note in _notes(report):
        console.print(note, markup=False, highlight=False)
    for problem in report.problems:
        console.print(str(problem), markup=False, highlight=False)
    count = len(report.problems)
    summary = f"{count} problem{'s' * (count > 1)}." if count else "No problem."
    console.print(summary, highlight=False)


def _notes(report: DatasetReport) -> Iterator[str]:
    """Yield one line for each different note, with the number of its files and some names."""
    files: dict[str, list[str]] = {}
    for note in report.notes:
        files.setdefault(note.message, []).append(note.file)
    for message, named in files.items():
        more = len(named) - NAMED_FILES
        names = ", ".join(named[:NAMED_FILES]) + (f" and {more:,} more" if more > 0 else "")
        count = "" if len(named) == 1 else f"{len(named):,} files, "
        yield f"Note: {count}{names}: {message}"


def _flat(facts: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the label and the formatted value of each fact; nested facts have a prefix."""
    for name, value in facts.items():
        label = f"{prefix}{str(name).replace('_', ' ')}"
        if isinstance(value, dict):
            yield from _flat(value, f"{label}: ")
        elif isinstance(value, float):
            yield label, f"{value:,.1f}"
        else:
            yield label, f"{value:,}" if isinstance(value, int) else str(value)
