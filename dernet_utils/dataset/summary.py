"""A checked dataset on the terminal: its fingerprint as a table, then every problem."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from dernet_utils.dataset.check import DatasetReport


def print_report(report: DatasetReport) -> None:
    """Print the fingerprint, one column per split, then each problem and their number."""
    console = Console(soft_wrap=True)
    table = Table("", *report.fingerprint, title="Fingerprint", title_justify="left")
    rows: dict[str, dict[str, str]] = {}
    for split, facts in report.fingerprint.items():
        for name, value in _flat(facts):
            rows.setdefault(name, {})[split] = value
    for name, values in rows.items():
        table.add_row(name, *(values.get(split, "–") for split in report.fingerprint))
    console.print(table)
    for problem in report.problems:
        console.print(str(problem), markup=False, highlight=False)
    count = len(report.problems)
    summary = f"{count} problem{'s' * (count > 1)}." if count else "No problem."
    console.print(summary, highlight=False)


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
