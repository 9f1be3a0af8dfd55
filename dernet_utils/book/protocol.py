"""The edition's protocol, which is frozen before any of its test patients is rendered."""

import subprocess
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT

PROTOCOL = PROJECT / "book" / "edition_protocol.md"
DRAFT = "Status: draft"  # in the protocol, until it is frozen


@dataclass(frozen=True)
class Frozen:
    """The protocol's state in git.

    Attributes:
        commit: Of the last change of the page.
        date: Of that commit.
    """

    commit: str
    date: datetime


def frozen_protocol(protocol: Path = PROTOCOL) -> Frozen:
    """Return the commit of the frozen protocol.

    Raises:
        DernetError: The protocol is still a draft, has uncommitted changes, or there is no git.
    """
    if DRAFT in protocol.read_text(encoding="utf-8"):
        raise DernetError(
            f"{protocol.name} is a draft: no test patient of the edition may be rendered before it "
            "is frozen. Fill in what is open, and commit it."
        )

    def git(*words: str) -> str:
        command = ["git", "-C", str(protocol.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", protocol.name)
        found, date = git("log", "-1", "--format=%H %cI", "--", protocol.name).split()
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise DernetError(f"{protocol.name} is in no git repository: commit it first.") from error
    if changed:
        raise DernetError(f"{protocol.name} has changes that are not committed: commit them first.")
    return Frozen(found, datetime.fromisoformat(date))
