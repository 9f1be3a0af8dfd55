"""Training and out-of-fold metrics of one triage network, as chapters 04, 05 and 06 show them.

Chapter 04 also computes these numbers step by step and asserts that they are equal.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from dernet_utils.book.figures import (
    draw_learning_curves,
    draw_most_confident,
    draw_roc,
    glue_values,
    show_figure,
)
from dernet_utils.book.paper import compare_with_table_2
from dernet_utils.book.progress import epoch_bars
from dernet_utils.core.weights import starting_weights
from dernet_utils.core.workspace import Workspace
from dernet_utils.metrics.classification import classification_table, roc_band, youden_threshold
from dernet_utils.metrics.intervals import Interval
from dernet_utils.triage.crossvalidation import CrossValidated, cross_validate
from dernet_utils.triage.networks import starting_sentence


@dataclass(frozen=True)
class OutOfFoldResults:
    """A network's out-of-fold predictions on the training images, and their metrics.

    Attributes:
        y: Labels, bool, shape (n,).
        prob: Probabilities of abnormal, shape (n,), in [0, 1].
        threshold: Youden's, chosen on these images, in [0, 1].
        scores: As `classification_table` returns them, at that threshold.
        beside_paper: The network's rows of the paper's Table 2, with these scores beside them.
    """

    y: np.ndarray
    prob: np.ndarray
    threshold: float
    scores: pd.DataFrame
    beside_paper: pd.DataFrame


def glue_run_facts(prefix: str, workspace: Workspace, train: pd.DataFrame) -> None:
    """Glue the facts ``profile``, ``kind``, ``px``, ``folds``, ``n`` and ``n-studies`` of a run.

    Args:
        prefix: The chapter's prefix, such as ``c05``; a key is ``<prefix>-<name>``.
        workspace: The run.
        train: The training images, as `triage_images` returns them.
    """
    profile = workspace.profile
    facts = {
        "profile": profile.name,
        "kind": workspace.image_kind,
        "px": profile.triage_px,
        "folds": profile.folds,
        "n": len(train),
        "n-studies": train["study_id"].nunique(),
    }
    glue_values(prefix, facts)


def show_training(
    prefix: str, workspace: Workspace, network: str
) -> tuple[CrossValidated, pd.DataFrame]:
    """Cross-validate a network, training what is missing, and show its learning curves.

    Glues the figure ``fig-curve``, the sentence ``start`` about the initial weights, and
    ``train-minutes``.

    Args:
        prefix: As in `glue_run_facts`.
        workspace: The run.
        network: One of `NETWORKS`.

    Returns:
        What `cross_validate` returns, and the last row of each fold's learning curve.

    Raises:
        DernetError: As `cross_validate` raises.
    """
    found = cross_validate(workspace, network, epoch_bars(network, workspace.profile))
    show_figure(f"{prefix}-fig-curve", draw_learning_curves(found.curves))
    values = {
        "start": starting_sentence(network, starting_weights(network)),
        "train-minutes": f"{found.curves['seconds'].sum() / 60:.1f}",
    }
    glue_values(prefix, values)
    last = found.curves.groupby("fold").tail(1).set_index("fold").drop(columns="seconds")
    return found, last.round(5)


def show_out_of_fold(
    prefix: str, workspace: Workspace, found: CrossValidated, train: pd.DataFrame
) -> OutOfFoldResults:
    """Compute a network's out-of-fold metrics; show its ROC curve and most confident predictions.

    Glues the figures ``fig-roc`` (with a band and the operating point) and ``fig-examples``, and
    ``auroc`` with its interval.

    Args:
        prefix, workspace, train: As in `glue_run_facts`.
        found: As `show_training` returns it.

    Returns:
        Labels, predictions and metrics.

    Raises:
        AssertionError: A training image was not scored exactly once.
    """
    scored = found.out_of_fold
    assert scored["image_id"].tolist() == train["image_id"].tolist()
    y, prob, studies = scored["label"].to_numpy(), scored["prob"].to_numpy(), scored["study_id"]
    profile = workspace.profile
    draws = {"resamples": profile.bootstrap, "seed": profile.seed}
    threshold = youden_threshold(y, prob)
    scores = classification_table(y, prob, studies, threshold, **draws)
    auroc, point = Interval(**scores.loc["auroc"]), scores["value"]
    assert auroc.n_images == len(train) and auroc.low <= auroc.value <= auroc.high
    bands = {f"AUROC {auroc.value:.2f}": roc_band(y, prob, studies, **draws)}
    star = {f"threshold {threshold:.2f}": (point["sensitivity"], point["specificity"])}
    show_figure(f"{prefix}-fig-roc", draw_roc(bands, star))
    examples = scored.assign(cached_path=train["cached_path"], lesions=train["lesions"])
    show_figure(f"{prefix}-fig-examples", draw_most_confident(examples, threshold))
    glue_values(prefix, {"auroc": f"{auroc:.2f}"})
    columns = {"out of fold": {found.network: scores}}
    beside_paper = compare_with_table_2(workspace, columns, (found.network,))
    return OutOfFoldResults(y, prob, threshold, scores, beside_paper)
