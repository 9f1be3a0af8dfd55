# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# (chap:ensemble)=
# # 07 · The ensemble
#
# :::{admonition} In this chapter
# **You will be able to** explain when three networks are better than one, implement the paper's Eq. 2 and map the
# AUROC over a grid of its weights, choose weights, threshold and calibration out of fold, read a reliability diagram
# and a decision curve, evaluate by image and by study, and test whether the choice of weights matters.
#
# **You need** {ref}`chap:densenet121`, {ref}`chap:efficientnetv2-s` and {ref}`chap:resnet50`.
#
# **It takes** half an hour of reading.
# :::

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
at_least = 0.9  # least sensitivity at the cautious threshold

# %% tags=["hide-input"]
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.isotonic import IsotonicRegression

from dernet_utils.book import figures
from dernet_utils.book.classifier_chapter import glue_run_facts
from dernet_utils.book.figures import show_figure, show_radiograph
from dernet_utils.book.paper import TABLE_2, compare_with_table_2
from dernet_utils.book.progress import epoch_bars
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import NETWORK_NAMES, NETWORKS
from dernet_utils.dataset.prepared import read_images
from dernet_utils.imaging.enhance import load_cached
from dernet_utils.metrics import classification, intervals
from dernet_utils.triage import ensemble
from dernet_utils.triage.crossvalidation import (
    cross_validate,
    open_test_labels,
    triage_images,
    write_decision,
)

# %%
workspace = open_chapter(profile)
(workspace.tables / "decision.json").unlink(missing_ok=True)  # seals the test labels again
numbers = workspace.profile
images = triage_images(workspace)
train = images[images["split"] == "train"]
found = {name: cross_validate(workspace, name, epoch_bars(name, numbers)) for name in NETWORKS}

# %% [markdown]
# The last three chapters give one table: three probabilities for each training image, each by a network that was not
# trained on it.

# %%
scored = found["densenet121"].out_of_fold.drop(columns="prob")
prob = np.column_stack([found[name].out_of_fold["prob"] for name in NETWORKS])
y, studies = scored["label"].to_numpy(), scored["study_id"]
for name in NETWORKS:
    assert found[name].out_of_fold["image_id"].equals(scored["image_id"])
draws = {"resamples": numbers.bootstrap, "seed": numbers.seed}
spoken = [NETWORK_NAMES[name] for name in NETWORKS]
glue_run_facts("c07", workspace, train)
glue_values("c07", {"share": f"{y.mean():.0%}"})
pd.DataFrame(prob, columns=spoken).describe().loc[["mean", "std", "min", "max"]].round(3)

# %% [markdown]
# ## Three predictions, one number
#
# The paper takes a weighted sum of the three probabilities. Its Eq. 2 selects the class with the larger sum,
#
# $$
# \hat y = \arg\max_{c \in \{0, 1\}} \sum_{m=1}^{3} \omega_m \, P(y = c \mid \mathbf{x}; \theta_m), \qquad
# \omega_m \ge 0, \quad \sum_m \omega_m = 1 .
# $$ (eq:vote)
#
# The two sums add up to one, so the larger is the one above one half. An image is thus called abnormal where the
# score $\mathcal{S}(\mathbf{x}) = \sum_m \omega_m P(y = 1 \mid \mathbf{x}; \theta_m)$ exceeds 0.5. Lines 16 and 17 of
# the paper's Algorithm 1 instead compare $\mathcal{S}$ with a threshold $\tau_{optimal}$. We follow the algorithm,
# because a threshold can trade sensitivity for specificity. The weighted sum is called a *soft* vote because
# probabilities are averaged before any decision is made. The paper's weights are 0.42 for DenseNet121, 0.32 for
# EfficientNetV2-S and 0.26 for ResNet50: the largest for the network whose AUROC is the lowest of the three in its
# own Table 2.

# %%
omega_paper = np.array(ensemble.PAPER_WEIGHTS)
by_hand = 0.42 * prob[:, 0] + 0.32 * prob[:, 1] + 0.26 * prob[:, 2]
assert np.allclose(ensemble.soft_vote(prob, omega_paper), by_hand)
larger = np.argmax([(1 - prob) @ omega_paper, prob @ omega_paper], axis=0)
clear = np.abs(by_hand - 0.5) > 1e-9  # at exactly one half, rounding would decide
assert (larger == (by_hand > 0.5))[clear].all()
assert min(NETWORKS, key=TABLE_2.get) == "densenet121"  # by AUROC, the first of its numbers

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(7.2, 3))
ax.set(xlim=(0, 10), ylim=(0, 4.2))
ax.set_axis_off()

figures.draw_stage(ax, 0.1, 1.65, "enhanced\nradiograph", 1.5, "0.93")
for level, (name, weight) in enumerate(zip(spoken, omega_paper, strict=True)):
    bottom = 3.1 - 1.45 * level
    figures.draw_stage(ax, 2.6, bottom, name, 2.1)
    figures.draw_arrow(ax, (1.7, 2.1), (2.5, bottom + 0.45))
    figures.draw_arrow(ax, (4.8, bottom + 0.45), (6.3, 2.1), f"$\\omega$ = {weight}")
figures.draw_stage(ax, 6.4, 1.65, "$\\mathcal{S} = \\sum \\omega P$", 1.3, "#fbe3c8")
figures.draw_arrow(ax, (7.8, 2.1), (8.4, 2.1))
figures.draw_stage(ax, 8.5, 1.65, "abnormal if\n$\\mathcal{S} > \\tau$", 1.3, "#fbe3c8")
show_figure("c07-fig-ensemble", fig)

# %% [markdown]
# ```{glue:figure} c07-fig-ensemble
# :name: fig:ensemble
# :alt: One radiograph goes to three networks; their probabilities are weighted, added, and compared with a threshold.
# The ensemble, after the paper's Fig. 3, with the paper's weights. The design does not depend on data or profile.
# ```
#
# ## Why it can help
#
# If three networks err on the same radiographs, their mean errs there too. Averaging helps only as far as their
# errors *differ*. Let $e_m = P_m - y$ be the error of network $m$. If all three errors have variance $v$ and each
# pair has correlation $r$, the error of the mean has variance $v (1 + 2r) / 3$: a third of $v$ at $r = 0$, and $v$ at
# $r = 1$.

# %%
errors = prob - y[:, None]
correlation = np.corrcoef(errors.T)
mean_error = errors.mean(axis=1)
covariance = np.cov(errors.T, bias=True)
assert np.isclose(mean_error.var(), covariance.sum() / 9)  # the rule, without equal variances
pd.DataFrame(correlation, spoken, spoken).round(2)

# %% [markdown]
# Part of these correlations does not depend on the networks: the error is negative on every abnormal radiograph and
# positive on every normal one, for all three alike. The correlation within each label shows how far the same
# radiographs are difficult for all networks.

# %%
within = {
    word: np.corrcoef(prob[y == label].T)[np.triu_indices(3, 1)]
    for word, label in (("normal radiographs", False), ("abnormal radiographs", True))
}
pairs = [f"{spoken[a]} and {spoken[b]}" for a, b in zip(*np.triu_indices(3, 1), strict=True)]
pd.DataFrame(within, pairs).round(2)

# %% tags=["hide-input", "remove-output"]
gap = prob.max(axis=1) - prob.min(axis=1)
rows = [int(np.argmax(np.where(y == label, gap, -1))) for label in (False, True)]
fig, axes = plt.subplots(1, 2, figsize=(6.4, 4.4))
for ax, row, word in zip(axes, rows, ("normal", "abnormal"), strict=True):
    predictions = "\n".join(f"{name} {p:.2f}" for name, p in zip(spoken, prob[row], strict=True))
    show_radiograph(ax, load_cached(train["cached_path"].iloc[row]), f"{word}\n{predictions}")
show_figure("c07-fig-disagree", fig)
glue_values("c07", {
    "r": f"{correlation[np.triu_indices(3, 1)].mean():.2f}",
    "r-within": f"{np.mean(list(within.values())):.2f}",
})

# %% [markdown]
# ```{glue:figure} c07-fig-disagree
# :name: fig:disagree
# :alt: A normal and an abnormal radiograph with the three networks' probabilities above each.
# The normal and the abnormal radiograph on which the three networks disagree most, out of fold. Out of n =
# {glue:text}`c07-n` {glue:text}`c07-kind`, profile {glue:text}`c07-profile`.
# ```
#
# The mean correlation of errors is {glue:text}`c07-r`, within a label {glue:text}`c07-r-within`. On radiographs like
# those of {numref}`fig:disagree` a vote can correct a single network; where all three agree, right or wrong, it
# changes little.

# %% [markdown]
# ## Calibrate each network first
#
# A threshold uses only the order of the scores. A radiologist who sees "0.7" expects more: that seven of ten
# radiographs with 0.7 are abnormal. This is the aim of *calibration*. Temperature scaling divides the logit by one
# number $T$ {cite}`guo2017`,
#
# $$
# \mathcal{S}_T = \sigma\big(\sigma^{-1}(\mathcal{S}) / T\big),
# $$ (eq:temperature)
#
# which does not change the order. The paper does not calibrate. But weights that are fitted to uncalibrated
# probabilities depend on two things: how well a network separates the classes, and how extreme its probabilities are.
# An extreme probability moves the sum more and costs more where it is wrong, so that the weight of a network which is
# too confident may come out too large or too small. So this run's DERNet gives each network a temperature $T_m$ of its
# own before it votes,
#
# $$
# \mathcal{S}(\mathbf{x}) = \sum_{m=1}^{3} \omega_m \,
# \sigma\big(\sigma^{-1}(P(y = 1 \mid \mathbf{x}; \theta_m)) / T_m\big) .
# $$ (eq:calibrated-vote)
#
# With $T_m = 1$ this is Eq. 2. The paper's own vote, its weights on uncalibrated probabilities, is kept beside it
# below. The change is ours, and a row of {ref}`page:deviations`.

# %%
temperatures, omega = ensemble.fit_calibrated_vote(y, prob)
scaled = ensemble.with_temperature(prob, temperatures)
odds = np.clip(prob, 1e-6, 1 - 1e-6)
odds = (odds / (1 - odds)) ** (1 / temperatures)
assert np.allclose(scaled, odds / (1 + odds))  # dividing a logit by T is taking the T-th root of the odds
assert np.allclose(ensemble.calibrated_vote(prob, temperatures, omega), scaled @ omega)
for m in range(3):
    before, after = (ensemble.log_loss(y, p[:, m]) for p in (prob, scaled))
    assert after <= before + 1e-6

# %% [markdown]
# ## Every choice of weights
#
# Three weights that sum to one are a point in a triangle whose corners are the single networks. In steps of 0.02
# there are 1,326 such points, so we can evaluate them all. The paper chose its weights "empirically" and does not say
# on which images. We take the weights with the least *log loss* out of fold. Log loss is smooth and convex in the
# weights, so the best point of the grid is close to the optimum; AUROC changes in steps and rewards chance.
#
# How well do the data determine them? We resample the studies and repeat the whole fit on each resample: temperatures,
# weights, and the temperature of the vote, which is explained further down.


# %%
def refit(rows):
    """Networks' temperatures, weights, and the temperature of their vote, of some images."""
    t, w = ensemble.fit_calibrated_vote(y[rows], prob[rows])
    return np.array([*t, *w, ensemble.fit_temperature(y[rows], ensemble.calibrated_vote(prob[rows], t, w))])


def refit_uncalibrated(rows):
    """Weights of some images, fitted to uncalibrated probabilities."""
    return ensemble.fit_weights(y[rows], prob[rows])


fitted = intervals.bootstrap_each_by_study(refit, studies, **draws)
uncalibrated = intervals.bootstrap_each_by_study(refit_uncalibrated, studies, **draws)
chosen = {"temperature": fitted[:3], "weight": fitted[3:6], "weight without calibration": uncalibrated}
pd.DataFrame(chosen, spoken).map("{:.2f}".format).assign(paper=omega_paper)

# %% tags=["remove-cell"]
sides = [
    f"that of {name} lies {'above' if weight.low > 1 / 3 else 'below'} it"
    for name, weight in zip(spoken, fitted[3:6], strict=True)
    if not weight.low <= 1 / 3 <= weight.high
]
decided = "All three intervals contain one third, so these data do not decide between the networks."
if sides:
    decided = f"Not every interval contains one third: {' and '.join(sides)}."
glue_values("c07", {"decided": decided, "resamples": f"{numbers.bootstrap:,}"})

# %% [markdown]
# The table gives 95 % intervals from {glue:text}`c07-resamples` resamples, n = {glue:text}`c07-n`
# {glue:text}`c07-kind` of {glue:text}`c07-n-studies` studies, profile {glue:text}`c07-profile`. A wide interval means
# that other studies of the same kind would have given quite different weights. {glue:text}`c07-decided`

# %%
points = ensemble.simplex(3)
area = np.array([classification.auroc(y, scaled @ point) for point in points])
equal = np.full(3, 1 / 3)
least = ensemble.log_loss(y, scaled @ omega)
assert len(points) == 51 * 52 // 2
assert least <= ensemble.log_loss(y, scaled @ omega_paper) + 1e-6  # the paper's weights are on the grid

# %% tags=["hide-input", "remove-output"]
corners = np.array([[0, 0], [1, 0], [0.5, 3**0.5 / 2]])
positions = points @ corners
fig, ax = plt.subplots(figsize=(6.2, 5))
surface = ax.tricontourf(*positions.T, area, levels=14, cmap="viridis")
ax.tricontour(*positions.T, area, levels=14, colors="white", linewidths=0.3)
marks = {"paper": (omega_paper, "*"), "equal": (equal, "o"), "least log loss": (omega, "D")}
for name, (weights, mark) in marks.items():
    ax.plot(*(weights @ corners), mark, ms=11, mfc="white", mec="black", label=name)
for name, corner, side in zip(spoken, corners, ("left", "right", "center"), strict=True):
    above = corner[1] > 0
    ax.text(corner[0], corner[1] + (0.03 if above else -0.06), f"only {name}", ha=side, fontsize=9)
ax.set(aspect="equal", xlim=(-0.08, 1.08), ylim=(-0.1, 0.96))
ax.set_axis_off()
ax.legend(fontsize=8, loc="upper left")
fig.colorbar(surface, ax=ax, shrink=0.7, label="AUROC, out of fold")
show_figure("c07-fig-simplex", fig)
within_one = (area > area.max() - 0.01).mean()
glue_values("c07", {
    "omega": " / ".join(f"{weight:.2f}" for weight in omega),
    "flat": f"{within_one:.0%}",
    "best": f"{area.max():.3f}",
})

# %% [markdown]
# ```{glue:figure} c07-fig-simplex
# :name: fig:simplex
# :alt: A triangle whose corners are the three networks, coloured by the AUROC of the vote, with the paper's, equal
# :  and fitted weights marked.
# AUROC of the vote of calibrated networks for every choice of weights, out of fold: a star marks the paper's weights,
# a disc equal weights, a diamond those with the least log loss, {glue:text}`c07-omega` for DenseNet121,
# EfficientNetV2-S and ResNet50. n = {glue:text}`c07-n` {glue:text}`c07-kind`, profile {glue:text}`c07-profile`.
# ```
#
# Look at the colour bar of {numref}`fig:simplex` before the colours. Of all points, {glue:text}`c07-flat` are within
# 0.01 of the best AUROC, {glue:text}`c07-best`. The flatter the map, the less the exact position of a mark matters.
#
# Evaluated on the images that they were fitted to, temperatures and weights would look too good. So for each fold
# they are fitted on the other folds and evaluated on this one. The paper's vote needs no fit.

# %%
fold = scored["fold"].to_numpy()
fits = [ensemble.fit_calibrated_vote(y[fold != out], prob[fold != out]) for out in range(numbers.folds)]
votes = {"paper's vote": prob @ omega_paper, "not calibrated": np.empty(len(y)), "calibrated": np.empty(len(y))}
for out, fit in enumerate(fits):
    rest, held = fold != out, fold == out
    votes["not calibrated"][held] = prob[held] @ ensemble.fit_weights(y[rest], prob[rest])
    votes["calibrated"][held] = ensemble.calibrated_vote(prob[held], *fit)


def measure(y, probs, studies):
    """Log loss, Brier score, calibration error and AUROC, a column for each set of probabilities."""

    def scores(p, rows):
        y_, p = y[rows], p[rows]
        calibration = ensemble.log_loss(y_, p), np.mean((p - y_) ** 2), ensemble.calibration_error(y_, p)
        return np.array([*calibration, classification.auroc(y_, p)])

    names = ["log loss", "Brier score", "expected calibration error", "AUROC"]
    found = {n: intervals.bootstrap_each_by_study(partial(scores, p), studies, **draws) for n, p in probs.items()}
    return pd.DataFrame(found, names).map("{:.3f}".format)


measure(y, votes, studies)

# %% tags=["remove-cell"]
true_class = {name: np.where(y, vote, 1 - vote).clip(1e-6) for name, vote in votes.items()}
more = np.log(true_class["not calibrated"]) - np.log(true_class["calibrated"])  # log loss of each image
gain = intervals.bootstrap(lambda w: w @ more / w.sum(axis=1), studies, **draws)
helps = "The interval includes zero: whether calibration before the fit changes the vote is not decided."
if gain.high < 0:
    helps = "Calibration before the fit lowers it."
if gain.low > 0:
    helps = "Calibration before the fit raises it."
glue_values("c07", {"gain": f"{gain:+.4f}", "gain-verdict": helps})

# %% [markdown]
# The log loss with calibrated networks minus that without, on the same held-out images, is {glue:text}`c07-gain`.
# {glue:text}`c07-gain-verdict` We chose {eq}`eq:calibrated-vote` for the reason given above, and not by this
# comparison. All intervals are 95 % intervals by study, of the images of {numref}`fig:simplex`. A calibration error is
# never negative, so chance raises it, in a resample more than in the sample: its intervals lie too high.

# %% [markdown]
# ## What a probability means
#
# A mean of calibrated probabilities need not be calibrated. Averaging tends to make probabilities underconfident,
# since a network that disagrees pulls the mean towards the middle. So the vote gets a temperature too, by
# {eq}`eq:temperature`. *Isotonic* regression instead fits a non-decreasing step function. Again, both are fitted on the
# other folds.

# %%
calibrated = {"none": votes["calibrated"]} | {name: np.empty(len(y)) for name in ("temperature", "isotonic")}
for out, fit in enumerate(fits):
    rest, held = fold != out, fold == out
    ours, theirs = (ensemble.calibrated_vote(prob[rows], *fit) for rows in (rest, held))
    t = ensemble.fit_temperature(y[rest], ours)
    steps = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(ours, y[rest])
    calibrated["temperature"][held] = ensemble.with_temperature(theirs, t)
    calibrated["isotonic"][held] = steps.predict(theirs)
measure(y, calibrated, studies)

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(4.8, 4.6))
ax.plot([0, 1], [0, 1], color="0.4", lw=0.8, ls=":")
for (name, p), mark in zip(calibrated.items(), ("o-", "s--", "^-."), strict=True):
    predicted, observed, _ = ensemble.reliability(y, p).T
    error = ensemble.calibration_error(y, p)
    ax.plot(predicted, observed, mark, ms=4, label=f"{name}, error {error:.3f}")
ax.set(xlabel="mean probability", ylabel="fraction abnormal", xlim=(0, 1), ylim=(0, 1))
ax.set_aspect("equal")
ax.legend(fontsize=8)
show_figure("c07-fig-reliability", fig)

# %% [markdown]
# ```{glue:figure} c07-fig-reliability
# :name: fig:reliability
# :alt: Fraction of abnormal radiographs against mean probability in ten bins, without calibration and with two kinds
# :  of it, beside the diagonal.
# Reliability of the vote in ten bins of equal number (fewer where probabilities are equal), before and after a
# calibration that was fitted on other folds. n = {glue:text}`c07-n` {glue:text}`c07-kind`, profile
# {glue:text}`c07-profile`.
# ```
#
# Below the diagonal of {numref}`fig:reliability` the predicted probability is too high, above it too low. Isotonic
# regression fits many steps, which with few images can follow chance; we had decided beforehand on the temperature,
# which is a single number. For the test split, weights and temperatures are fitted on all folds.
#
# All of this holds for the fraction of abnormal radiographs here, {glue:text}`c07-share`. Where another fraction is
# abnormal, 0.7 no longer means seven of ten: calibrate on radiographs from the site where the network is used.

# %%
vote = ensemble.calibrated_vote(prob, temperatures, omega)
temperature = ensemble.fit_temperature(y, vote)
final = ensemble.with_temperature(vote, temperature)
distinct = np.unique(vote.round(9))  # votes closer than this may differ by rounding only
assert (np.diff(ensemble.with_temperature(distinct, temperature)) >= 0).all()  # the order is kept
assert np.isclose(fitted[6].value, temperature)
f"temperature of the vote: {fitted[6]:.2f}"

# %% [markdown]
# ## Thresholds, and what they trade
#
# Three aims lead to three thresholds. Youden's maximises the sum of sensitivity and specificity. F1 sets true
# positives against false negatives and false positives, and does not count true negatives. A cautious department
# fixes the sensitivity and accepts the specificity that results.
#
# All of them decide about an image. Algorithm 1 of the paper speaks of a *normal study*, but the numbers that the
# paper gives, 8,389 and 2,078, count images, and so do we: sensitivity and specificity are fractions of images,
# although their intervals are by study. A decision by study has other values; those of the test split are
# {ref}`below <sec:by-study>`.

# %%
thresholds = {
    "youden": classification.youden_threshold(y, final),
    "f1": classification.f1_threshold(y, final),
    "cautious": classification.sensitivity_threshold(y, final, at_least),
}
trade = {name: classification.operating_point(y, final, tau) for name, tau in thresholds.items()}
assert trade["cautious"]["sensitivity"] >= at_least
pd.DataFrame(trade).T.assign(threshold=thresholds).round(3)

# %% tags=["hide-input", "remove-output"]
grid = np.linspace(0.02, 0.9, 89)
evaluated = calibrated["temperature"]  # by weights and temperature of the other folds
benefit = {
    "DERNet": ensemble.net_benefit(y, evaluated, grid),
    "call all abnormal": ensemble.net_benefit(y, np.ones(len(y)), grid),
    "call none": np.zeros(len(grid)),
}
resampled = [
    ensemble.net_benefit(y[rows], evaluated[rows], grid)
    for rows in intervals.resample_by_study(studies, **draws)
]
fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.6))
at = [classification.operating_point(y, final, tau) for tau in grid]
left.plot(grid, [point["sensitivity"] for point in at], label="sensitivity")
left.plot(grid, [point["specificity"] for point in at], "--", label="specificity")
for (name, tau), dash in zip(thresholds.items(), ("-", "--", ":"), strict=True):
    left.axvline(tau, color="0.3", lw=1, ls=dash, label=f"{name} {tau:.2f}")
left.set(xlabel="threshold", ylabel="sensitivity, specificity", ylim=(0, 1.01))
left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
right.fill_between(grid, *np.quantile(resampled, [0.025, 0.975], axis=0), alpha=0.25, lw=0)
for (name, values), dash in zip(benefit.items(), ("-", "--", ":"), strict=True):
    right.plot(grid, values, dash, label=name)
right.set(xlabel="threshold", ylabel="net benefit", ylim=(-0.1, max(0.6, y.mean() + 0.05)))
right.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
show_figure("c07-fig-trade", fig)

# %% [markdown]
# ```{glue:figure} c07-fig-trade
# :name: fig:trade
# :alt: Left, sensitivity falls and specificity rises with the threshold, with three thresholds marked. Right, net
# :  benefit of the ensemble, of calling all abnormal and of calling none.
# Left: sensitivity and specificity by threshold. Right: decision curve of the vote, weighted and calibrated on the
# other folds, with a 95 % band from resampled studies. Out of fold, n = {glue:text}`c07-n` {glue:text}`c07-kind`,
# profile {glue:text}`c07-profile`.
# ```
#
# The right panel of {numref}`fig:trade` shows whether the network is useful at all {cite}`vickers2006`. A threshold
# of $p$ implies that one false negative weighs as much as $(1 - p) / p$ false positives. *Net benefit* is the number
# of true positives minus $p / (1 - p)$ times the number of false positives, per image. The network is useful where
# its curve lies above both alternatives: calling every radiograph abnormal, and calling none abnormal.

# %% [markdown]
# ## Writing the decision down
#
# Weights, temperatures and thresholds are fixed from here on. Writing them unseals the test labels, which
# `open_test_labels` has refused to return until now. If the chapter is run again, its set-up deletes the earlier
# decision and so seals the labels again; but this cannot undo what a person has already seen.

# %%
try:
    open_test_labels(workspace)
    sealed = False
except DernetError:
    sealed = True
assert sealed

decision = ensemble.Decision(
    NETWORKS, tuple(omega.tolist()), tuple(temperatures.tolist()), temperature, thresholds, fitted_on=len(y)
)
write_decision(workspace, decision)
assert np.allclose(decision.prob(prob), final)
of_network = {"weight": decision.weights, "temperature": decision.network_temperatures}
chosen = {f"{what}, {name}": x for what, xs in of_network.items() for name, x in zip(spoken, xs, strict=True)}
chosen |= {"temperature, vote": decision.temperature} | decision.thresholds
pd.Series(chosen, name="chosen").round(3).to_frame()

# %% [markdown]
# ## The test split
#
# A test image is scored by the networks of all {glue:text}`c07-folds` folds, since none of them was trained on it,
# and we take the mean. Each single network gets its own Youden threshold, also chosen out of fold. Out of fold, a
# score is that of one network; the mean over several varies less, so threshold and temperatures may not fit it equally
# well. The tables below show how well they do.
#
# No choice of this run was made on the test split. The recipe of `laptop` and `night` was changed after scores on their
# first test patients were known. The present test patients come from a new seed, drawn after the recipe was
# frozen, and nothing may be chosen on them ({ref}`sec:test-split`).

# %%
test = found["densenet121"].test.drop(columns="prob")
prob_test = np.column_stack([found[name].test["prob"] for name in NETWORKS])
y_test = open_test_labels(workspace)
assert all(found[name].test["image_id"].equals(test["image_id"]) for name in NETWORKS)
columns = {name: (prob[:, m], prob_test[:, m]) for m, name in enumerate(NETWORKS)}
columns["DERNet"] = (final, decision.prob(prob_test))
tables = {"out of fold": {}, "test": {}}
for name, (ours, on_test) in columns.items():
    own = classification.youden_threshold(y, ours)
    tau = decision.thresholds["youden"] if name == "DERNet" else own
    scores = classification.classification_table
    tables["out of fold"][name] = scores(y, ours, studies, tau, **draws)
    tables["test"][name] = scores(y_test, on_test, test["study_id"], tau, **draws)

# %% [markdown]
# Does the calibration hold on radiographs that were not used to fit it?

# %%
scaled_test = ensemble.with_temperature(prob_test, temperatures)
probs_test = {
    "paper's vote": prob_test @ omega_paper,
    "vote of calibrated networks": scaled_test @ omega,
    "the same, calibrated": decision.prob(prob_test),
}
measure(y_test, probs_test, test["study_id"])

# %% [markdown]
# ### Paper beside ours: Table 2
#
# All numbers are in per cent, ours with 95 % intervals. The first column is the paper's, on its 2,078 test images of
# people (HealNNet's AUROC is of 468, {ref}`chap:audit`). The others are this run's, out of fold and on the test
# split. Thresholds and weights were chosen out of fold, so the results there look slightly too good and their
# intervals are slightly too narrow. The columns are from different images and cannot be compared with each other.

# %% tags=["hide-input"]
compare_with_table_2(workspace, tables, tuple(TABLE_2))

# %% tags=["hide-input", "remove-output"]
bands = {}
for name, (_, on_test) in reversed(columns.items()):
    value = tables["test"][name].loc["auroc", "value"]
    label = f"{NETWORK_NAMES.get(name, name)} {value:.2f}"
    bands[label] = classification.roc_band(y_test, on_test, test["study_id"], **draws)
point = tables["test"]["DERNet"]["value"]
star = {"DERNet's threshold": (point["sensitivity"], point["specificity"])}
show_figure("c07-fig-roc", figures.draw_roc(bands, star))
area_test = intervals.Interval(**tables["test"]["DERNet"].loc["auroc"])
glue_values("c07", {
    "auroc": f"{area_test:.2f}",
    "n-test": int(area_test.n_images),
    "n-test-studies": int(area_test.n_studies),
})

# %% [markdown]
# ```{glue:figure} c07-fig-roc
# :name: fig:ensemble-roc
# :alt: Receiver operating characteristics of DERNet and three networks on the test split, a band around DERNet's, and
# :  a star at its threshold.
# Receiver operating characteristics on the test split, a 95 % band from resampled studies around DERNet's. n =
# {glue:text}`c07-n-test` {glue:text}`c07-kind` of {glue:text}`c07-n-test-studies` studies, profile
# {glue:text}`c07-profile`.
# ```
#
# DERNet's AUROC in {numref}`fig:ensemble-roc` is {glue:text}`c07-auroc`. Note how wide the band is before you compare
# curves. It reflects the choice of radiographs only; other seeds would have given other networks
# ({ref}`chap:densenet121`).
#
# (sec:by-study)=
# ### By study
#
# Line 21 of Algorithm 1 returns a normal *study*. A study counts as abnormal if any of its images is, and is called
# normal only if all of its images are. So its score is the largest of its images' scores.

# %%
score_test = decision.prob(prob_test)
held = classification.scores_by_study(y, final, studies)
of_test = classification.scores_by_study(y_test, score_test, test["study_id"])
taus = {
    "by study, same threshold": decision.thresholds["youden"],
    "by study, its own threshold": classification.youden_threshold(held["label"], held["prob"]),
}
level = {"by image": tables["test"]["DERNet"]} | {
    name: classification.classification_table(of_test["label"], of_test["prob"], of_test.index, tau, **draws)
    for name, tau in taus.items()
}
assert (of_test["prob"].to_numpy() >= test.assign(s=score_test).groupby("study_id")["s"].mean() - 1e-12).all()
shown = {name: [f"{intervals.Interval(**row):.2f}" for _, row in part.iterrows()] for name, part in level.items()}
pd.DataFrame(shown, tables["test"]["DERNet"].index).drop("f1")

# %% tags=["remove-cell"]
glue_values("c07", {
    "mixed": int(of_test["mixed"].sum()), "per-study": f"{of_test['images'].mean():.1f}",
    "tau": f"{decision.thresholds['youden']:.2f}",
    "tau-study": f"{taus['by study, its own threshold']:.2f}",
})  # fmt: skip

# %% [markdown]
# Test split, 95 % intervals by study: n = {glue:text}`c07-n-test` {glue:text}`c07-kind` in the first column,
# {glue:text}`c07-n-test-studies` studies in the others, profile {glue:text}`c07-profile`. A study has
# {glue:text}`c07-per-study` images on average, and {glue:text}`c07-mixed` studies have both normal and abnormal images.
# The threshold of the first two columns, {glue:text}`c07-tau`, was chosen for images, that of the last,
# {glue:text}`c07-tau-study`, by Youden's index for studies, both out of fold. At one threshold, the largest of several
# scores exceeds it more often than each of them, so as a rule sensitivity rises and specificity falls.
#
# ### Findings too faint for a label
#
# A normal image of the virtual cohort may hold a finding below the visibility limit ({ref}`sec:ground-truth`). Its
# manifest says which do. To leave out such cases makes a test look better than it is: *spectrum bias*
# {cite}`ransohoff1978`.

# %%
every = read_images(workspace)
faint = every.loc[every["faint"], "image_id"]
rows = {}
for split, part, label, score in (("out of fold", scored, y, final), ("test", test, y_test, score_test)):
    hidden, of_image = part["image_id"].isin(faint).to_numpy(), part["study_id"].to_numpy()
    assert not label[hidden].any()
    everything = np.ones(len(label), bool)
    cases = {
        "counted as normal": (label, everything), "left out": (label, ~hidden),
        "counted as abnormal": (label | hidden, everything),
    }  # fmt: skip
    for name, (truth, kept) in cases.items():
        area_kept = classification.weighted_auroc(truth[kept], score[kept])
        interval = intervals.bootstrap(area_kept, of_image[kept], **draws)
        rows.setdefault(name, {})[f"{split}: AUROC"] = f"{interval:.3f}"
        rows[name][f"{split}: n"] = interval.n_images
pd.DataFrame.from_dict(rows, orient="index").rename_axis("images whose findings are all too faint")

# %% tags=["remove-cell"]
glue_values("c07", {"faint": int(hidden.sum()), "n-normal": int((~y_test).sum())})

# %% [markdown]
# Such images are {glue:text}`c07-faint` of the {glue:text}`c07-n-normal` normal images of the test split; profile
# {glue:text}`c07-profile`, intervals by study. All other results in this book count them as normal, as their labels
# do. For real radiographs nobody knows which they are, and the three rows are equal.

# %% [markdown]
# ## Do the weights matter?
#
# Two claims of the paper can be tested on the same images: that the vote is better than single networks, and that
# *these* weights are needed. Both methods of a comparison score the same radiographs, so their AUROCs vary together;
# therefore we compute an interval of their *difference*, resampled by study.


# %%
def difference(first, second):
    """AUROC of the first minus that of the second, with its interval by study."""

    def statistic(rows):
        labels = y_test[rows]
        return classification.auroc(labels, first[rows]) - classification.auroc(labels, second[rows])

    return intervals.bootstrap_by_study(statistic, test["study_id"], **draws)


ours = scaled_test @ omega
areas = {name: tables["out of fold"][name].loc["auroc", "value"] for name in NETWORKS}
_, median, best = sorted(NETWORKS, key=areas.get)  # chosen before any test label is read
against = {
    "equal weights": scaled_test @ equal,
    "the paper's vote": prob_test @ omega_paper,
    "those fitted to uncalibrated networks": prob_test @ ensemble.fit_weights(y, prob),
    f"the best network out of fold, {NETWORK_NAMES[best]}": prob_test[:, NETWORKS.index(best)],
    f"the median network out of fold, {NETWORK_NAMES[median]}": prob_test[:, NETWORKS.index(median)],
}
differences = {name: difference(ours, other) for name, other in against.items()}
shown = {name: f"{d:+.3f}" for name, d in differences.items()}
pd.DataFrame({"AUROC of fitted weights minus that of": shown})


# %% tags=["remove-cell"]
def verdict(d, other):
    """Describe in a sentence what the interval of a difference shows."""
    if d.low > 0:
        return f"On this run's test radiographs fitted weights rank images better than {other}."
    if d.high < 0:
        return f"On this run's test radiographs fitted weights rank images worse than {other}."
    return f"The interval includes zero: this run gives no reason to prefer fitted weights to {other}."


keys = "weights", "paper", "uncalibrated", "top", "median"
for key, (name, d) in zip(keys, differences.items(), strict=True):
    sentence = verdict(d, name.split(" out of fold")[0])
    glue_values("c07", {key: f"{d:+.3f}", f"{key}-verdict": sentence})

# %% [markdown]
# The AUROC of fitted weights minus that of equal weights, both of calibrated networks, is {glue:text}`c07-weights`.
# {glue:text}`c07-weights-verdict` Minus that of the paper's vote, it is {glue:text}`c07-paper`.
# {glue:text}`c07-paper-verdict` Minus that of weights fitted to uncalibrated networks, it is
# {glue:text}`c07-uncalibrated`. {glue:text}`c07-uncalibrated-verdict` Minus that of the network that was best out of
# fold, the strongest baseline, it is {glue:text}`c07-top`. {glue:text}`c07-top-verdict` Minus that of the median
# network, it is {glue:text}`c07-median`. {glue:text}`c07-median-verdict`
#
# The paper prints three weights with two decimals and no comparison with equal weights of 1/3; the map of
# {numref}`fig:simplex` shows how little such decimals may matter.

# %% [markdown]
# ## Exercises
#
# First change the chapter: set `at_least = 0.95` and run all cells. How much specificity does the cautious threshold
# cost?
#
# ```{exercise}
# :label: ex:ensemble-correlation
#
# By hand: the errors of three networks have equal variance $v$. At which correlation $r$ does their mean have half
# the error variance of one?
# ```

# %% [markdown]
# ````{solution-start} ex:ensemble-correlation
# :class: dropdown
# ````
# $(1 + 2r)/3 = 1/2$ gives $r = 1/4$.

# %%
r = 0.25
three = np.full((3, 3), r) + (1 - r) * np.eye(3)
assert np.isclose(three.sum() / 9, 0.5)

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:ensemble-hard
#
# In code: apply its own threshold to each network and take the majority. How does this *hard* vote compare out of
# fold with the soft one at Youden's threshold?
# ```

# %% [markdown]
# ````{solution-start} ex:ensemble-hard
# :class: dropdown
# ````
# A hard vote discards the confidence of each network and gives one operating point instead of a curve.

# %%
taus = [classification.youden_threshold(y, prob[:, m]) for m in range(3)]
majority = (prob > taus).sum(axis=1) >= 2
hard = classification.operating_point(y, majority.astype(float), 0.5)
both = pd.DataFrame({"hard": hard, "soft": trade["youden"]})
assert both.loc[["sensitivity", "specificity"]].notna().all(axis=None)
both.round(3)

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:ensemble-luck
#
# A question about the method: choose the weights with the best AUROC *on the test split*. How much better does the
# AUROC look than with weights chosen out of fold, and why is this gain not evidence of better weights?
# ```

# %% [markdown]
# ````{solution-start} ex:ensemble-luck
# :class: dropdown
# ````
# The best of 1,326 numbers is at least as large as the one that was fixed beforehand, however good or bad the
# networks are. On new radiographs the gain would not be expected to last.

# %%
best_on_test = max(classification.auroc(y_test, scaled_test @ point) for point in points)
gain = best_on_test - classification.auroc(y_test, ours)
assert gain >= -1e-12
round(gain, 3)

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - A vote helps only as far as errors differ; measure their correlation first.
# - Calibrate networks before weights are fitted, or weights also depend on how extreme a network's probabilities are.
# - Weights from out-of-fold log loss: {glue:text}`c07-omega`. {glue:text}`c07-decided`
# - Calibration aims to make 0.7 mean seven of ten; whether it succeeds is evaluated on radiographs that were not used
#   to fit it.
# - Sensitivity and specificity by study differ from those by image: say which you report, and for which the threshold
#   was chosen.
# - Within a run, weights, temperatures and thresholds are written down before any test label is read. DERNet's test
#   AUROC: {glue:text}`c07-auroc`, n = {glue:text}`c07-n-test` {glue:text}`c07-kind`.
