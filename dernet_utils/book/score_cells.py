"""Cells of tables of average precision, in which rare lesion types have counts instead."""

import pandas as pd

from dernet_utils.metrics.detection import LEAST_BOXES, supported
from dernet_utils.metrics.intervals import Interval
from dernet_utils.metrics.proportions import Proportion

NOT_REPORTED = "–"


def precision_cells(scores: pd.DataFrame, factor: float = 1, spec: str = ".3f") -> pd.Series:
    """Return each row's average precision with its interval, or a dash where boxes are too few.

    Args:
        scores: What `metrics.detection.detection_table` returns.
        factor: 100 for per cent.
        spec: Format of a number.

    Returns:
        Text by `scores`' index. A type with fewer than `LEAST_BOXES` true boxes has a dash. The
        mean is always given; with such a type, its interval is followed by ``not supported``.
    """
    ends = ["value", "low", "high"]
    numbers = scores.assign(**(scores[ends].astype(float) * factor)).drop(columns="boxes")
    cells = pd.Series({name: format(Interval(**row), spec) for name, row in numbers.iterrows()})
    enough = supported(scores)
    cells[~enough & (cells.index != "mAP")] = NOT_REPORTED
    if not enough["mAP"]:
        cells["mAP"] += ", not supported"
    return cells


def found_cells(found: pd.DataFrame, spec: str = ".2f") -> pd.Series:
    """Return each lesion type's boxes found, as ``k of n`` with the exact interval.

    Args:
        found: What `metrics.froc.found_table` returns.
        spec: Format of the interval's ends.
    """
    rows = found.drop(columns="score").to_dict("index")
    return pd.Series(
        {name: format(Proportion(**row), spec) for name, row in rows.items()}, dtype=str
    )


def mean_sentence(scores: pd.DataFrame) -> str:
    """Return a sentence that says how many types a mean is of, and how far its interval counts.

    Chapter A2 shows by simulation what it says.

    Args:
        scores: What `metrics.detection.detection_table` returns.
    """
    boxes = scores["boxes"].drop("mAP")
    types, rare = int((boxes > 0).sum()), int(boxes.between(1, LEAST_BOXES - 1).sum())
    text = f"The mean is over {types} lesion types, "
    if types and not rare:
        return (
            text
            + f"each with at least {LEAST_BOXES} true boxes; its interval tends to lie too high."
        )
    text += f"of which {rare} have fewer than {LEAST_BOXES} true boxes; "
    return text + "its interval is therefore not supported."
