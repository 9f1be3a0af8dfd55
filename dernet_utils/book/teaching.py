"""The start of a chapter, and the values that its sentences quote."""

from collections.abc import Mapping

from myst_nb import glue

from dernet_utils.book.figures import use_style
from dernet_utils.book.prepare import ensure_prepared
from dernet_utils.core.workspace import Workspace, open_workspace


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


def glue_values(prefix: str, values: Mapping[str, object]) -> None:
    """Store values for a chapter's sentences, which quote them as ``{glue:text}`prefix-name```.

    Args:
        prefix: The chapter's prefix, such as ``c03``.
        values: Numbers and words by name.
    """
    for name, value in values.items():
        glue(f"{prefix}-{name}", value, display=False)
