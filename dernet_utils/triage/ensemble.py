"""The ensemble: weights, thresholds and calibration, chosen on out-of-fold probabilities.

Pure functions of labels and probabilities. Every choice is made on images of the training split
that the networks were not trained on; the test split is not involved.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

from dernet_utils.core.errors import DernetError

PAPER_WEIGHTS = (0.42, 0.32, 0.26)  # paper, section 3.2: DenseNet121, EfficientNetV2-S, ResNet50
STEPS = 50  # of the grid search: weights are multiples of 0.02, as the paper's three are
FACTORS = 16  # probabilities multiplied before a logarithm is taken: at least 1e-96, no underflow
PROB_MARGIN = 1e-6  # least distance of a probability from 0 and 1 before a logarithm is taken


@dataclass(frozen=True)
class Decision:
    """All that is chosen out of fold, before any test label is read.

    Attributes:
        networks: Names, in the order of the weights.
        weights: Of the networks' calibrated probabilities; at least 0, with sum 1.
        network_temperatures: Each divides its network's logits before the vote; above 0.
        temperature: Divides the vote's logits, above 0.
        thresholds: Of calibrated probabilities, by name, such as ``youden``.
        fitted_on: Number of images.

    Raises:
        ValueError: The numbers of networks, weights and network temperatures differ, or a
            temperature is not above 0.
    """

    networks: tuple[str, ...]
    weights: tuple[float, ...]
    network_temperatures: tuple[float, ...]
    temperature: float
    thresholds: dict[str, float]
    fitted_on: int

    def __post_init__(self) -> None:
        for name in ("networks", "weights", "network_temperatures"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists only
        numbers = len(self.networks), len(self.weights), len(self.network_temperatures)
        if len(set(numbers)) > 1:
            raise ValueError("{} networks, {} weights and {} temperatures".format(*numbers))
        for temperature in (*self.network_temperatures, self.temperature):
            if not temperature > 0:
                raise ValueError(f"a temperature of {temperature}")

    def prob(self, prob: np.ndarray) -> np.ndarray:
        """Return the vote's calibrated probabilities.

        Args:
            prob: As in `soft_vote`.

        Returns:
            Shape (n,), in [0, 1].

        Raises:
            DernetError: As `calibrated_vote` raises.
        """
        vote = calibrated_vote(prob, self.network_temperatures, self.weights)
        return with_temperature(vote, self.temperature)


def soft_vote(prob: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean of several networks' probabilities (paper, Eq. 2).

    Args:
        prob: Probability of abnormal by each network, shape (n, networks), in [0, 1].
        weights: One weight per network, at least 0, with sum 1, shape (networks,).

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
            f"A vote needs one weight per network: got {weights.size} for {prob.shape[1]} networks."
        )
    if (weights < 0).any() or not np.isclose(weights.sum(), 1.0, atol=1e-6):
        raise DernetError(
            f"The weights of a vote are at least 0 and sum to 1; got {weights.tolist()}."
        )
    return prob @ weights


def calibrated_vote(prob: np.ndarray, temperatures: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean of calibrated probabilities: `soft_vote`, each network calibrated.

    Args:
        prob, weights: As in `soft_vote`.
        temperatures: One per network, as `fit_temperature` returns it, shape (networks,).

    Returns:
        Shape (n,), in [0, 1].

    Raises:
        DernetError: As `soft_vote` raises, or there is not one temperature per network.

    >>> calibrated_vote([[0.9, 0.5]], [2.0, 1.0], [0.5, 0.5]).round(3).tolist()
    [0.625]
    """
    prob, temperatures = _columns(prob), np.asarray(temperatures, float)
    if temperatures.shape != prob.shape[1:]:
        raise DernetError(
            f"Calibration needs one temperature per network: got {temperatures.size} for "
            f"{prob.shape[1]} networks."
        )
    return soft_vote(with_temperature(prob, temperatures), weights)


def simplex(networks: int = 3, steps: int = STEPS) -> np.ndarray:
    """Return all weights on the simplex that are multiples of 1 / steps.

    Args:
        networks: Number of weights per point, at least 1.
        steps: Steps of the grid along each weight.

    Returns:
        Shape (points, networks); each row is at least 0 and sums to 1.

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
    """Return the weights on a grid that minimise the mean log loss.

    The log loss of a vote is convex in its weights, so the grid's best point lies near the minimum.
    AUROC is piecewise constant in them, and its maximum would depend more on chance. Ties go to the
    point nearest to equal weights.

    Args:
        y: Labels of out-of-fold images, shape (n,), 0 or 1.
        prob: As in `soft_vote`, from networks that were not trained on these images.
        steps: As in `simplex`.

    Returns:
        Shape (networks,), on the simplex.

    Raises:
        DernetError: Labels are of one class, or shapes do not fit.
    """
    prob = _columns(prob)
    y = _labels(y, len(prob))
    points = simplex(prob.shape[1], steps)
    loss = _losses(np.where(y[:, None], prob, 1 - prob), points)
    away = ((points - 1 / prob.shape[1]) ** 2).sum(axis=1)
    return points[np.lexsort([away, loss.round(12)])[0]]


def _losses(prob: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the mean log loss of the vote with each point's weights.

    Args:
        prob: Probability of the true class by each network, shape (n, networks).
        points: Weights, shape (points, networks).
    """
    filled = np.vstack([prob, np.ones((-len(prob) % FACTORS, prob.shape[1]))])
    product = np.ones((len(points), len(filled) // FACTORS))
    for part in filled.reshape(FACTORS, -1, prob.shape[1]):
        product = product * np.maximum(points @ part.T, PROB_MARGIN)
    return -np.log(product).sum(axis=1) / len(prob)


def fit_calibrated_vote(y: np.ndarray, prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each network's temperature, then the weights of the calibrated probabilities.

    Weights fitted to uncalibrated probabilities depend on two things: how well a network separates
    the classes, and how extreme its probabilities are. Calibration removes the second: dividing a
    network's logits by any number changes its temperature, but not the weights.

    Args:
        y, prob: As in `fit_weights`.

    Returns:
        Temperatures and weights, as `calibrated_vote` takes them, each of shape (networks,).

    Raises:
        DernetError: As `fit_weights` raises.
    """
    prob = _columns(prob)
    temperatures = np.array([fit_temperature(y, column) for column in prob.T])
    return temperatures, fit_weights(y, with_temperature(prob, temperatures))


def log_loss(y: np.ndarray, prob: np.ndarray) -> float:
    """Return the mean log loss: the mean of minus the logarithm of the true class's probability.

    Args:
        y: Labels, shape (n,), 0 or 1.
        prob: Probabilities of abnormal, shape (n,).
    """
    prob = np.clip(prob, PROB_MARGIN, 1 - PROB_MARGIN)
    return float(-np.mean(np.where(np.asarray(y, bool), np.log(prob), np.log1p(-prob))))


# Calibration: are seven in ten of the images with probability 0.7 abnormal?


def fit_temperature(y: np.ndarray, prob: np.ndarray) -> float:
    """Return the temperature that calibrates out-of-fold probabilities (Guo et al., ICML 2017).

    Logits are divided by it: above 1 it makes probabilities less extreme, below 1 more.

    Args:
        y: Labels, shape (n,), 0 or 1, of both classes.
        prob: Probabilities of abnormal, shape (n,).

    Returns:
        A number between 0.05 and 20, with the least log loss.

    Raises:
        DernetError: Labels are of one class, or shapes do not fit.
    """
    from scipy.optimize import minimize_scalar  # here, not above: a server never fits

    y = _labels(y, len(prob))
    z = logit(np.clip(prob, PROB_MARGIN, 1 - PROB_MARGIN))
    margin = np.where(y, -z, z)  # an image's log loss is log(1 + exp(margin / T))
    found = minimize_scalar(
        lambda t: np.logaddexp(0.0, margin / np.exp(t)).mean(),
        bounds=(np.log(0.05), np.log(20.0)), method="bounded",
    )  # fmt: skip
    return float(np.exp(found.x))


def with_temperature(prob: np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    """Return probabilities whose logits were divided by a temperature.

    Their order stays, except that those closer to 0 or 1 than `PROB_MARGIN` become equal.

    Args:
        prob: Any shape, in [0, 1].
        temperature: Above 0; one for all, or one for each column.

    Returns:
        The same shape.

    >>> with_temperature([0.5, 0.9], 2.0).round(2).tolist()
    [0.5, 0.75]
    """
    return expit(logit(np.clip(prob, PROB_MARGIN, 1 - PROB_MARGIN)) / temperature)


def reliability(y: np.ndarray, prob: np.ndarray, bins: int = 10) -> np.ndarray:
    """Return a reliability diagram's points, from bins with equal numbers of images.

    Equal probabilities stay in one bin, which may then hold more images than the others.

    Args:
        y: Labels, shape (n,), 0 or 1.
        prob: Probabilities, shape (n,).
        bins: Largest number of bins.

    Returns:
        Shape (bins, 3), by rising probability: mean probability, fraction of abnormal images, and
        number of images.
    """
    from scipy.stats import rankdata  # here, not above: see `fit_temperature`

    y, prob = np.asarray(y, float), np.asarray(prob, float)
    number_of_bin = np.minimum((rankdata(prob) - 0.5) / len(prob) * bins, bins - 1).astype(int)
    parts = [np.flatnonzero(number_of_bin == number) for number in np.unique(number_of_bin)]
    return np.array([[prob[rows].mean(), y[rows].mean(), len(rows)] for rows in parts])


def calibration_error(y: np.ndarray, prob: np.ndarray, bins: int = 10) -> float:
    """Return the expected calibration error: `reliability`'s mean gap, weighted by images.

    Args:
        y, prob, bins: As `reliability` takes them.

    Returns:
        A number in [0, 1].
    """
    predicted, observed, number = reliability(y, prob, bins).T
    return float(np.average(np.abs(predicted - observed), weights=number))


def net_benefit(y: np.ndarray, prob: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the net benefit of calling images above each threshold abnormal.

    Per image: true positives minus false positives, the latter weighted by the threshold's odds
    (Vickers and Elkin, Medical Decision Making 26, 2006).

    Args:
        y: Labels, shape (n,), 0 or 1.
        prob: Calibrated probabilities, shape (n,).
        thresholds: Shape (k,), in [0, 1).

    Returns:
        Shape (k,), at most the fraction of abnormal images.
    """
    y, thresholds = np.asarray(y, bool), np.asarray(thresholds, float)
    called = np.asarray(prob)[None, :] > thresholds[:, None]
    true_positives, false_positives = called[:, y].sum(axis=1), called[:, ~y].sum(axis=1)
    return (true_positives - false_positives * thresholds / (1 - thresholds)) / len(y)


def _columns(prob: np.ndarray) -> np.ndarray:
    prob = np.asarray(prob, float)
    if prob.ndim != 2 or not prob.size:
        raise DernetError(
            f"A vote takes probabilities of shape (images, networks), not {prob.shape}."
        )
    if not ((prob >= 0) & (prob <= 1)).all():
        raise DernetError("A vote takes probabilities; some are not between 0 and 1.")
    return prob


def _labels(y: np.ndarray, n: int) -> np.ndarray:
    y = np.asarray(y)
    if y.shape != (n,) or not np.isin(y, (0, 1)).all():
        raise DernetError(
            f"Each of {n} images needs a label, 0 or 1: got labels of shape {y.shape}."
        )
    if len(np.unique(y)) < 2:
        raise DernetError("A fit needs normal and abnormal images: these are of one class.")
    return y.astype(bool)
