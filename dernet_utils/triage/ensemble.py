"""One answer from several networks: weights, a threshold and calibration, from out-of-fold images.

Everything here is a pure function of labels and probabilities. What is chosen is chosen on images
that the networks did not learn from, of the training split; the test split has no say.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

from dernet_utils.core.errors import DernetError

PAPER_WEIGHTS = (0.42, 0.32, 0.26)  # paper, section 3.2: DenseNet121, EfficientNetV2-S, ResNet50
STEPS = 50  # of the search over weights: each is a multiple of 0.02, as the paper's three are
PROB_MARGIN = 1e-6  # probabilities closer to 0 or 1 are moved here before a logarithm is taken


@dataclass(frozen=True)
class Decision:
    """All that is chosen out of fold, before a test label is read.

    Attributes:
        networks: Names, in the order of the weights.
        weights: On the simplex.
        temperature: Of the vote's logits; the thresholds are of probabilities after it.
        thresholds: A name each, such as ``youden``.
        fitted_on: Number of images.
    """

    networks: tuple[str, ...]
    weights: tuple[float, ...]
    temperature: float
    thresholds: dict[str, float]
    fitted_on: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "networks", tuple(self.networks))  # JSON has lists only
        object.__setattr__(self, "weights", tuple(self.weights))
        if len(self.networks) != len(self.weights):
            raise ValueError(f"{len(self.networks)} networks and {len(self.weights)} weights")
        if not self.temperature > 0:
            raise ValueError(f"a temperature of {self.temperature}")

    def prob(self, prob: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities of the vote, shape (n,), from shape (n, networks)."""
        return with_temperature(soft_vote(prob, np.array(self.weights)), self.temperature)


def soft_vote(prob: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean of several networks' probabilities (paper, Eq. 2).

    Args:
        prob: Probability of abnormal by each network, shape (n, networks), in [0, 1].
        weights: One weight a network, at least 0, with sum 1, shape (networks,).

    Returns:
        Shape (n,), in [0, 1].

    Raises:
        DernetError: Shapes do not fit, or the weights are not on the simplex.

    >>> soft_vote([[0.9, 0.5, 0.1]], PAPER_WEIGHTS).round(3).tolist()
    [0.564]
    """
    prob, weights = _columns(prob), np.asarray(weights, float)
    if weights.shape != prob.shape[1:]:
        raise DernetError(
            f"A vote needs one weight for each of {prob.shape[1]} networks: {weights.size} came."
        )
    if (weights < 0).any() or not np.isclose(weights.sum(), 1.0, atol=1e-6):
        raise DernetError(
            f"Weights of a vote are at least 0 and sum to 1, and these are {weights.tolist()}."
        )
    return prob @ weights


def simplex(networks: int = 3, steps: int = STEPS) -> np.ndarray:
    """Return all weights that are multiples of 1 / steps, shape (points, networks).

    >>> simplex(2, 2).tolist()
    [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    >>> simplex(1).tolist()
    [[1.0]]
    """
    free = networks - 1
    counts = np.indices((steps + 1,) * free).reshape(free, (steps + 1) ** free).T
    counts = counts[counts.sum(axis=1) <= steps]
    return np.column_stack([counts, steps - counts.sum(axis=1)]) / steps


def fit_weights(y: np.ndarray, prob: np.ndarray, steps: int = STEPS) -> np.ndarray:
    """Return the weights with the least mean log loss, of all on a grid.

    The log loss of a vote is convex in its weights, so that the grid's best point is next to the
    best there is; an AUROC is flat in steps and would reward chance. Of equal points the one
    nearest to equal weights is taken.

    Args:
        y: Labels of out-of-fold images, shape (n,), 0 or 1.
        prob: As in `soft_vote`, from networks that did not learn from these images.
        steps: As in `simplex`.

    Returns:
        Shape (networks,), on the simplex.

    Raises:
        DernetError: Labels are of one class, or shapes do not fit.
    """
    prob = _columns(prob)
    y = _labels(y, len(prob))
    points = simplex(prob.shape[1], steps)
    loss = np.array([log_loss(y, prob @ point) for point in points])
    away = ((points - 1 / prob.shape[1]) ** 2).sum(axis=1)
    return points[np.lexsort([away, loss.round(12)])[0]]


def log_loss(y: np.ndarray, prob: np.ndarray) -> float:
    """Return the mean negative logarithm of the probability given to what was true."""
    prob = np.clip(prob, PROB_MARGIN, 1 - PROB_MARGIN)
    return float(-np.mean(np.where(np.asarray(y, bool), np.log(prob), np.log1p(-prob))))


# Calibration: does 0.7 mean seven of ten?


def fit_temperature(y: np.ndarray, prob: np.ndarray) -> float:
    """Return the temperature that makes out-of-fold probabilities fit best (Guo et al., ICML 2017).

    Logits are divided by it: above 1 it takes certainty back, below 1 it adds some.

    Args:
        y: Labels, shape (n,), 0 or 1, of both classes.
        prob: Probabilities of abnormal, shape (n,).

    Returns:
        A number between 0.05 and 20, with the least log loss.
    """
    from scipy.optimize import minimize_scalar  # here, not above: a server that starts fits nothing

    y = _labels(y, len(prob))
    found = minimize_scalar(
        lambda t: log_loss(y, with_temperature(prob, np.exp(t))),
        bounds=(np.log(0.05), np.log(20.0)), method="bounded",
    )  # fmt: skip
    return float(np.exp(found.x))


def with_temperature(prob: np.ndarray, temperature: float) -> np.ndarray:
    """Return probabilities whose logits were divided by a temperature.

    No order is turned round; those closer to 0 or 1 than `SUREST` become equal.

    >>> with_temperature([0.5, 0.9], 2.0).round(2).tolist()
    [0.5, 0.75]
    """
    return expit(logit(np.clip(prob, PROB_MARGIN, 1 - PROB_MARGIN)) / temperature)


def reliability(y: np.ndarray, prob: np.ndarray, bins: int = 10) -> np.ndarray:
    """Return mean probability, share of abnormal images and their number, in bins of equal number.

    Equal probabilities stay in one bin, which then may hold more.

    Args:
        y: Labels, shape (n,), 0 or 1.
        prob: Probabilities, shape (n,).
        bins: At most so many.

    Returns:
        Shape (bins, 3), by rising probability.
    """
    from scipy.stats import rankdata  # likewise

    y, prob = np.asarray(y, float), np.asarray(prob, float)
    place = np.minimum((rankdata(prob) - 0.5) / len(prob) * bins, bins - 1).astype(int)
    parts = [np.flatnonzero(place == number) for number in np.unique(place)]
    return np.array([[prob[rows].mean(), y[rows].mean(), len(rows)] for rows in parts])


def calibration_error(y: np.ndarray, prob: np.ndarray, bins: int = 10) -> float:
    """Return the expected calibration error: the mean gap in `reliability`, weighted by number."""
    said, was, number = reliability(y, prob, bins).T
    return float(np.average(np.abs(said - was), weights=number))


def net_benefit(y: np.ndarray, prob: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the net benefit of calling abnormal what lies above each threshold.

    Hits less false alarms, these weighted by the threshold's odds, an image (Vickers and Elkin,
    Medical Decision Making 26, 2006).

    Args:
        y: Labels, shape (n,), 0 or 1.
        prob: Calibrated probabilities, shape (n,).
        thresholds: Shape (k,), in [0, 1).

    Returns:
        Shape (k,), at most the share of abnormal images.
    """
    y, thresholds = np.asarray(y, bool), np.asarray(thresholds, float)
    called = np.asarray(prob)[None, :] > thresholds[:, None]
    hits, false_alarms = called[:, y].sum(axis=1), called[:, ~y].sum(axis=1)
    return (hits - false_alarms * thresholds / (1 - thresholds)) / len(y)


def _columns(prob: np.ndarray) -> np.ndarray:
    prob = np.asarray(prob, float)
    if prob.ndim != 2 or not prob.size:
        raise DernetError(
            f"A vote takes probabilities of shape (images, networks), not {prob.shape}."
        )
    if not ((prob >= 0) & (prob <= 1)).all():
        raise DernetError("A vote takes probabilities, and some are not between 0 and 1.")
    return prob


def _labels(y: np.ndarray, n: int) -> np.ndarray:
    y = np.asarray(y)
    if y.shape != (n,) or not np.isin(y, (0, 1)).all():
        raise DernetError(f"Each of {n} images needs a label, 0 or 1: labels of {y.shape} came.")
    if len(np.unique(y)) < 2:
        raise DernetError("A choice needs normal and abnormal images: these are of one class.")
    return y.astype(bool)
