"""What the numbers of a printed table imply about one another."""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.stats import norm

from dernet_utils.core.errors import DernetError

HALF = 0.005  # per cent: largest rounding error of a number printed with two decimals


@dataclass(frozen=True)
class Range:
    """The values that a quantity may have, given rounded numbers.

    Attributes:
        low: The smallest; nan where none is possible.
        high: The largest; nan where none is possible.
    """

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Return whether a value lies in the range, its ends included."""
        return bool(self.low <= value <= self.high)


def f1_of(sensitivity: float, specificity: float, prevalence: float) -> float:
    """Return F1 from sensitivity, specificity and the fraction of abnormal images, all in [0, 1].

    F1 is 2 TP / (2 TP + FN + FP): true positives, false negatives and false positives, each as a
    fraction of all images.

    >>> f1_of(0.5, 1.0, 0.5)
    0.6666666666666666
    """
    true_positives = sensitivity * prevalence
    false_positives = (1 - specificity) * (1 - prevalence)
    return 2 * true_positives / (true_positives + false_positives + prevalence)


def prevalence_of(f1: float, sensitivity: float, specificity: float) -> float:
    """Return the fraction of abnormal images at which `f1_of` gives this F1, all in [0, 1].

    nan if there is none, or if the specificity is 1, where F1 does not depend on the prevalence.

    >>> round(prevalence_of(2 / 3, 0.5, 0.9), 3)
    1.0
    >>> round(prevalence_of(f1_of(0.8, 0.7, 0.3), 0.8, 0.7), 3)
    0.3
    """
    false_positive_rate = 1 - specificity
    rest = 2 * sensitivity - f1 * (sensitivity + specificity)
    if not false_positive_rate or not rest:
        return float("nan")
    prevalence = f1 * false_positive_rate / rest
    return prevalence if 0 <= prevalence <= 1 + 1e-12 else float("nan")


def implied_prevalence(f1: float, sensitivity: float, specificity: float) -> Range:
    """Return the fractions of abnormal images, in per cent, that a printed row allows.

    Args:
        f1, sensitivity, specificity: In per cent, each rounded to two decimals.
    """
    corners = product(*((value - HALF, value + HALF) for value in (f1, sensitivity, specificity)))
    values = np.array([prevalence_of(*(v / 100 for v in corner)) for corner in corners]) * 100
    return Range(float(values.min()), float(values.max()))


def possible_counts(images: int, f1: float, sensitivity: float, specificity: float) -> list[int]:
    """Return the numbers of abnormal images for which whole counts give a row's decimals.

    A sensitivity, for example, is a whole number of true positives over a whole number of abnormal
    images (compare Brown and Heathers' GRIM test, Social Psychological and Personality Science 8,
    2017).

    Args:
        images: Number of images in the test split.
        f1, sensitivity, specificity: In per cent, each rounded to two decimals.

    >>> possible_counts(10, 66.67, 50.0, 100.0)
    [2, 4, 6, 8]
    """
    abnormal = np.arange(1, images)
    normal = images - abnormal
    # At most one whole number lies within half an image of the printed fraction.
    true_positives = np.round(sensitivity / 100 * abnormal)
    true_negatives = np.round(specificity / 100 * normal)
    f1_found = 2 * true_positives / (true_positives + normal - true_negatives + abnormal)
    found = 100 * np.stack([f1_found, true_positives / abnormal, true_negatives / normal])
    printed = np.array([[f1], [sensitivity], [specificity]])
    return abnormal[(np.abs(found - printed) <= HALF + 1e-9).all(axis=0)].tolist()


def largest_agreement(ranges: dict[str, Range]) -> tuple[list[str], Range]:
    """Return the largest set of rows that one value can satisfy, and the values that do.

    Of several equally large sets, the first is returned.

    Raises:
        DernetError: There are no ranges.

    >>> largest_agreement({"a": Range(0, 2), "b": Range(1, 3), "c": Range(4, 5)})
    (['a', 'b'], Range(low=1, high=2))
    """
    if not ranges:
        raise DernetError("An agreement needs at least one range.")
    best: list[str] = []
    for low in (own.low for own in ranges.values()):
        together = [name for name, own in ranges.items() if own.holds(low)]
        if len(together) > len(best):
            best = together
    chosen = [ranges[name] for name in best]
    return best, Range(max(own.low for own in chosen), min(own.high for own in chosen))


def implied_mean(values: tuple[float, ...]) -> Range:
    """Return the range of a printed mean of printed values, all rounded to two decimals.

    >>> implied_mean((1.0, 2.0))
    Range(low=1.49, high=1.51)
    """
    mean = float(np.mean(values))
    return Range(round(mean - 2 * HALF, 10), round(mean + 2 * HALF, 10))


def hanley_mcneil(auroc: float, abnormal: int, normal: int) -> float:
    """Return the standard error of an AUROC from its value and the numbers of images.

    Hanley and McNeil, Radiology 143, 1982, Eqs. 1 and 2: exact for exponentially distributed
    scores and close for others; images are treated as independent.

    Args:
        auroc: In [0, 1].
        abnormal, normal: Numbers of images, at least 1.

    Raises:
        DernetError: A number is outside its range.

    >>> round(hanley_mcneil(0.5, 50, 50), 3)
    0.058
    """
    if not 0 <= auroc <= 1 or abnormal < 1 or normal < 1:
        raise DernetError(
            "An AUROC lies between 0 and 1 and needs an image of each class: "
            f"not {auroc}, {abnormal} and {normal}."
        )
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    spread = auroc * (1 - auroc)
    spread += (abnormal - 1) * (q1 - auroc**2) + (normal - 1) * (q2 - auroc**2)
    return float(np.sqrt(spread / (abnormal * normal)))


def difference_p(first: float, second: float, error: float) -> float:
    """Return the two-sided p-value of a difference under a normal distribution.

    Args:
        first, second: The two values.
        error: Standard error of their difference, above 0.
    """
    return float(2 * norm.sf(abs(first - second) / error))
