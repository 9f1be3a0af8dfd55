"""What every chapter begins with."""

from dernet_utils.book.figures import glue_values, use_style
from dernet_utils.book.prepare import ensure_prepared
from dernet_utils.core.workspace import Workspace, open_workspace

__all__ = ["glue_values", "open_chapter"]


def open_chapter(profile: str = "") -> Workspace:
    """Return a run's workspace with its data prepared, and set the style of all figures.

    Args:
        profile: A name as `profiles.get_profile` takes it.

    Raises:
        DernetError: As `prepare.ensure_prepared` raises.
    """
    use_style()
    workspace = open_workspace(profile)
    ensure_prepared(workspace, print)
    return workspace
