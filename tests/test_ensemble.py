"""Votes, weights and calibration against definitions and other libraries."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from dernet_utils.core.errors import DernetError
from dernet_utils.metrics.intervals import bootstrap_each_by_study
from dernet_utils.triage import ensemble


def drawn(seed: int, n: int = 300, spread: tuple = (0.6, 1.0, 2.0)) -> tuple:
    """Labels, and three networks' probabilities, the first the best."""
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.5
    logits = np.stack([(2 * y - 1) + rng.normal(0, s, n) for s in spread], axis=1)
    return y.astype(int), 1 / (1 + np.exp(-logits))


def test_a_vote_is_the_papers_sum():
    _, prob = drawn(1)
    by_hand = 0.42 * prob[:, 0] + 0.32 * prob[:, 1] + 0.26 * prob[:, 2]
    assert np.allclose(ensemble.soft_vote(prob, ensemble.PAPER_WEIGHTS), by_hand)


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_a_vote_lies_between_its_networks(seed, networks):
    rng = np.random.default_rng(seed)
    prob, weights = rng.random((7, networks)), rng.dirichlet(np.ones(networks))
    vote = ensemble.soft_vote(prob, weights)
    assert (vote >= prob.min(axis=1) - 1e-12).all() and (vote <= prob.max(axis=1) + 1e-12).all()


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_simplex_is_complete_and_each_point_once(steps):
    points = ensemble.simplex(3, steps)
    assert len(points) == (steps + 1) * (steps + 2) // 2 == len(np.unique(points, axis=0))
    assert np.allclose(points.sum(axis=1), 1) and (points >= 0).all()


def test_the_papers_weights_are_on_the_grid():
    gap = np.abs(ensemble.simplex() - ensemble.PAPER_WEIGHTS).max(axis=1)
    assert gap.min() < 1e-9


def test_fitted_weights_are_next_to_the_best():
    from scipy.optimize import minimize

    y, prob = drawn(2)
    fitted = ensemble.fit_weights(y, prob)
    best = minimize(
        lambda w: ensemble.log_loss(y, prob @ w), np.full(3, 1 / 3), bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, method="SLSQP",
    )  # fmt: skip
    assert ensemble.log_loss(y, prob @ fitted) == pytest.approx(best.fun, abs=1e-3)
    assert np.array_equal(fitted, ensemble.fit_weights(y, prob))


def test_a_network_that_guesses_gets_little_weight():
    y, prob = drawn(3)
    prob[:, 1] = np.random.default_rng(0).random(len(y))
    assert ensemble.fit_weights(y, prob)[1] <= 0.1


def test_equal_networks_get_equal_weights():
    y, prob = drawn(4)
    same = np.repeat(prob[:, :1], 3, axis=1)
    assert np.abs(ensemble.fit_weights(y, same) - 1 / 3).max() < 0.02


def mean_loss_by_grid(y, prob):
    """The least log loss of a vote, each point of the grid by sklearn's log loss."""
    points = ensemble.simplex(3, 10)
    return min(metrics.log_loss(y, np.clip(prob @ point, 1e-6, 1 - 1e-6)) for point in points)


@pytest.mark.parametrize("n", [15, 16, 33])
def test_the_fit_finds_the_grids_least_log_loss(n):
    y, prob = drawn(11, n)
    prob[0] = [0.0, 1e-9, 1e-7] if y[0] else [1.0, 1 - 1e-9, 1.0]  # certain, and wrong
    fitted = ensemble.fit_weights(y, prob, steps=10)
    assert ensemble.log_loss(y, prob @ fitted) == pytest.approx(mean_loss_by_grid(y, prob))


def test_a_calibrated_vote_by_hand():
    # Odds of 9 and of 1/4; their square roots are 3 and 1/2, so 0.75 and 1/3.
    vote = ensemble.calibrated_vote([[0.9, 0.2]], [2.0, 2.0], [0.6, 0.4])
    assert vote == pytest.approx([0.6 * 0.75 + 0.4 / 3])


@given(st.integers(0, 2**31))
def test_temperatures_of_one_change_no_vote(seed):
    rng = np.random.default_rng(seed)
    prob, weights = rng.uniform(1e-3, 1 - 1e-3, (7, 3)), rng.dirichlet(np.ones(3))
    same = ensemble.calibrated_vote(prob, np.ones(3), weights)
    assert np.allclose(same, ensemble.soft_vote(prob, weights))


def sharpened(prob, factors):
    """Probabilities whose logits are multiplied, a factor per network."""
    return ensemble.with_temperature(prob, 1 / np.asarray(factors))


def test_weights_after_calibration_do_not_depend_on_how_extreme_a_network_is():
    y, prob = drawn(12)
    temperatures, weights = ensemble.fit_calibrated_vote(y, prob)
    factors = np.array([0.5, 1.0, 1.7])
    scaled, same = ensemble.fit_calibrated_vote(y, sharpened(prob, factors))
    assert np.allclose(scaled, temperatures * factors, rtol=1e-3)
    assert np.abs(same - weights).max() < 0.03


def test_weights_without_calibration_depend_on_how_extreme_a_network_is():
    y, prob = drawn(12, spread=(1.0, 1.0, 1.0))
    plain = ensemble.fit_weights(y, prob)
    extreme = ensemble.fit_weights(y, sharpened(prob, [6, 1, 1]))
    assert np.abs(extreme - plain).max() > 0.1


def test_a_networks_temperature_is_that_of_logistic_regression():
    from scipy.special import logit
    from sklearn.linear_model import LogisticRegression

    y, prob = drawn(13)
    temperatures, _ = ensemble.fit_calibrated_vote(y, prob)
    for column, temperature in zip(prob.T, temperatures, strict=True):
        slope = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8)
        slope.fit(logit(column)[:, None], y)
        assert 1 / temperature == pytest.approx(slope.coef_[0, 0], rel=1e-3)


def test_a_decision_calibrates_networks_and_vote():
    y, prob = drawn(14)
    temperatures, weights = ensemble.fit_calibrated_vote(y, prob)
    decision = ensemble.Decision(("a", "b", "c"), weights, temperatures, 1.5, {"youden": 0.5}, 300)
    mended = np.column_stack(
        [ensemble.with_temperature(prob[:, m], temperatures[m]) for m in range(3)]
    )
    assert np.allclose(decision.prob(prob), ensemble.with_temperature(mended @ weights, 1.5))
    for wrong in ((1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 1.0, float("nan"))):
        with pytest.raises(ValueError, match="temperature"):
            ensemble.Decision(("a", "b", "c"), weights, wrong, 1.5, {}, 300)


def test_more_studies_leave_less_choice_of_weights():
    def width(n):
        y, prob = drawn(16, n)
        found = bootstrap_each_by_study(
            lambda rows: ensemble.fit_calibrated_vote(y[rows], prob[rows])[1], np.arange(n) // 2, 20
        )
        assert sum(one.value for one in found) == pytest.approx(1)
        return np.mean([one.high - one.low for one in found])

    assert width(2000) < width(60) / 2


def test_log_loss_is_sklearns():
    y, prob = drawn(5)
    assert ensemble.log_loss(y, prob[:, 0]) == pytest.approx(metrics.log_loss(y, prob[:, 0]))
    assert np.isfinite(ensemble.log_loss([0, 1], np.array([1.0, 0.0])))


@pytest.mark.parametrize("factor", [0.4, 3.0])
def test_a_temperature_is_found_again(factor):
    rng = np.random.default_rng(6)
    honest = rng.normal(0, 1.5, 20_000)
    y = rng.random(len(honest)) < 1 / (1 + np.exp(-honest))
    said = 1 / (1 + np.exp(-honest * factor))
    found = ensemble.fit_temperature(y, said)
    assert found == pytest.approx(factor, rel=0.06)
    mended = ensemble.with_temperature(said, found)
    assert (np.diff(mended[np.argsort(said)]) >= 0).all()
    assert ensemble.calibration_error(y, mended) < ensemble.calibration_error(y, said) / 2


def test_calibration_error_by_hand():
    y, prob = np.array([0, 1, 1, 1]), np.array([0.2, 0.4, 0.6, 0.8])
    assert ensemble.calibration_error(y, prob, bins=2) == pytest.approx(
        (abs(0.3 - 0.5) + abs(0.7 - 1.0)) / 2
    )


def test_bins_hold_all_images_and_equal_numbers():
    y, prob = drawn(7, n=103)
    table = ensemble.reliability(y, prob[:, 0])
    assert table[:, 2].sum() == 103 and np.ptp(table[:, 2]) <= 1
    assert (np.diff(table[:, 0]) >= 0).all()
    assert np.average(table[:, 1], weights=table[:, 2]) == pytest.approx(y.mean())


def test_equal_probabilities_are_in_one_bin():
    y = np.array([1, 0, 0, 0, 1, 1])
    table = ensemble.reliability(y, np.array([0.2, 0.2, 0.2, 0.2, 0.8, 0.9]), bins=3)
    assert table[0].tolist() == pytest.approx([0.2, 0.25, 4])
    assert table[:, 2].sum() == 6 and len(table) == 2


def test_net_benefit_of_calling_all_abnormal_and_of_the_truth():
    y, _ = drawn(8)
    at = np.array([0.1, 0.5, 0.8])
    everybody = ensemble.net_benefit(y, np.ones(len(y)), at)
    assert np.allclose(everybody, y.mean() - (1 - y.mean()) * at / (1 - at))
    assert np.allclose(ensemble.net_benefit(y, y.astype(float), at), y.mean())
    assert np.allclose(ensemble.net_benefit(y, np.zeros(len(y)), at), 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ensemble.soft_vote([[0.1, 0.2]], [1.0]), "one weight per network"),
        (lambda: ensemble.soft_vote([[0.1, 0.2]], [0.7, 0.7]), "sum to 1"),
        (lambda: ensemble.soft_vote([[0.1, 0.2]], [1.5, -0.5]), "at least 0"),
        (lambda: ensemble.soft_vote([0.1, 0.2], [0.5, 0.5]), "shape"),
        (lambda: ensemble.soft_vote([[0.1, 1.2]], [0.5, 0.5]), "between 0 and 1"),
        (lambda: ensemble.soft_vote([[0.1, np.nan]], [0.5, 0.5]), "between 0 and 1"),
        (lambda: ensemble.calibrated_vote([[0.1, 0.2]], [1.0], [0.5, 0.5]), "one temperature"),
        (lambda: ensemble.calibrated_vote([[0.1, 1.2]], [1, 1], [0.5, 0.5]), "between 0 and 1"),
        (lambda: ensemble.fit_calibrated_vote([1, 1], [[0.1], [0.2]]), "one class"),
        (lambda: ensemble.fit_weights([1, 1], [[0.1], [0.2]]), "one class"),
        (lambda: ensemble.fit_weights([1, 0, 1], [[0.1], [0.2]]), "needs a label"),
        (lambda: ensemble.fit_temperature([0, 2], [0.1, 0.2]), "0 or 1"),
    ],
)
def test_bad_input_gets_one_sentence(call, words):
    with pytest.raises(DernetError, match=words):
        call()
