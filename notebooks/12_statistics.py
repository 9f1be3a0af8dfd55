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
# (chap:statistics)=
# # 12 · Statistics
#
# :::{admonition} In this chapter
# **You will be able to** state what should count as one observation in an AUROC's confidence interval, compute the
# interval by resampling and by DeLong's formula, choose a test for two networks on the same images, measure how often
# each test gives a false positive, correct for multiple comparisons, and estimate how many studies it takes to detect
# a difference of two points.
#
# **You need** {ref}`chap:protocol` for studies and folds and {ref}`chap:ensemble` for AUROC and thresholds.
#
# **It takes** half an hour of reading, and under a minute to run: nothing is trained.
# :::
#
# The paper states how it tested: 1,000 bootstrap resamples, 95 % intervals, paired t-tests at $p < 0.05$, five folds.
# Its tables print no interval and no p-value. This chapter applies each of these tools to simulated data whose truth
# is known, to see when it can be trusted. It then makes those comparisons of the paper's Tables 2 and 3 that this run
# allows, and some of our own.

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
simulations = 1000  # simulated datasets, whose truth is known, in each experiment
power = 0.8  # chance of detecting a difference that exists

# %%
import time
from math import comb

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.special import logit
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from dernet_utils.book.figures import show_figure
from dernet_utils.book.paper import TABLE_2
from dernet_utils.book.score_cells import mean_sentence
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.vocabulary import NETWORK_NAMES, NETWORKS
from dernet_utils.detection.baselines import BASELINES
from dernet_utils.detection.images import detection_images
from dernet_utils.metrics import classification, detection, significance
from dernet_utils.metrics.classification import auroc, weighted_auroc
from dernet_utils.metrics.intervals import bootstrap, draw_weights, leave_one_out, resample_by_study
from dernet_utils.triage.crossvalidation import cross_validate, open_test_labels, read_decision
from dernet_utils.triage.ensemble import PAPER_WEIGHTS

# %%
workspace = open_chapter(profile)
numbers = workspace.profile
found = {name: cross_validate(workspace, name) for name in NETWORKS}
decision = read_decision(workspace)
held, test = found[NETWORKS[0]].out_of_fold, found[NETWORKS[0]].test
prob_held = np.column_stack([found[name].out_of_fold["prob"] for name in NETWORKS])
prob = np.column_stack([found[name].test["prob"] for name in NETWORKS])
y, study = open_test_labels(workspace), test["study_id"].to_numpy()
vote = decision.prob(prob)
draws = {"resamples": numbers.bootstrap, "seed": numbers.seed}

# %% tags=["remove-cell"]
glue_values("c12", {
    "profile": numbers.name, "n": len(y), "n-studies": len(np.unique(study)),
    "kind": workspace.image_kind, "folds": numbers.folds,
    "resamples": f"{numbers.bootstrap:,}", "n-held": len(held), "simulations": f"{simulations:,}",
    "n-held-studies": held["study_id"].nunique(), "power": f"{power:.0%}", "least": detection.LEAST_BOXES,
})  # fmt: skip

# %% [markdown]
# ## What counts as one observation
#
# A study consists of one to several images of one spine. If a network is wrong about one of them, it is more likely
# to be wrong about the others, so a second image adds less information than a new patient would. The *intraclass
# correlation* $\rho$ measures how much less: it is the fraction of the scores' variance that lies between studies.
# With $m$ images per study, the variance of a mean over all images grows by the *design effect* {cite}`kish1965`
#
# $$
# D = 1 + (m - 1)\, \rho .
# $$ (eq:design-effect)
#
# We take DERNet's out-of-fold scores as logits, subtract the mean of each class, and split the remaining variance
# into a part between studies and a part within them.


# %%
def intraclass_correlation(values, groups):
    """One-way analysis of variance: the fraction of the variance that lies between groups."""
    of = pd.DataFrame({"value": values, "group": groups}).groupby("group")["value"]
    k, m = of.ngroups, of.size()
    between = (m * (of.mean() - np.mean(values)) ** 2).sum() / (k - 1)
    within = (of.var(ddof=0) * m).sum() / (len(values) - k)
    typical = (len(values) - (m**2).sum() / len(values)) / (k - 1)
    return (between - within) / (between + (typical - 1) * within)


# %%
label, held_study = held["label"].to_numpy(bool), held["study_id"].to_numpy()
scores = logit(np.clip(decision.prob(prob_held), 1e-6, 1 - 1e-6))
residual = scores - np.where(label, scores[label].mean(), scores[~label].mean())
rho = intraclass_correlation(residual, held_study)
m = len(held) / len(np.unique(held_study))
rng = np.random.default_rng(numbers.seed)
alone = np.mean([intraclass_correlation(rng.permutation(residual), held_study) for _ in range(200)])
assert rho <= 1 and abs(alone) < 0.1  # images assigned to studies at random are not correlated
pd.Series({"images per study": m, "rho": rho, "design effect": 1 + (m - 1) * rho}).round(2)

# %% tags=["remove-cell"]
glue_values("c12", {"rho": f"{rho:.2f}", "design": f"{1 + (m - 1) * rho:.2f}"})

# %% [markdown]
# In this run $\rho$ is {glue:text}`c12-rho`, on {glue:text}`c12-n-held` images from {glue:text}`c12-n-held-studies`
# studies, and the design effect is {glue:text}`c12-design`: treating images as independent understates the variance
# of a mean by this factor. With more images per study, or with a network that relies on what a patient's images have
# in common, it would be larger, but not without limit: $\rho$ is at most 1, so $D$ is at most $m$, as if a study
# counted as one image. (With unequal numbers of images the limit is somewhat higher.)
#
# ## The bootstrap, as one multiplication
#
# A bootstrap by study draws studies with replacement {cite}`efron1987`. In a draw, each image counts $w$ times: not
# at all, once, or more often. So we weight images instead of copying them. The AUROC of weighted images is
#
# $$
# \hat A(w) = \frac{\sum_{i : y_i = 1} \sum_{j : y_j = 0} w_i w_j \,
#   \bigl( [s_i > s_j] + \tfrac12 [s_i = s_j] \bigr)}
#   {\sum_{i : y_i = 1} w_i \; \sum_{j : y_j = 0} w_j},
# $$ (eq:weighted-auroc)
#
# where $[\cdot]$ is 1 if true and 0 otherwise. We first compute one draw by hand, pair by pair:

# %%
w = draw_weights(study, 1, numbers.seed)[0]
s = vote
wins = (s[y][:, None] > s[~y]) + 0.5 * (s[y][:, None] == s[~y])
A_of_draw = w[y] @ wins @ w[~y] / (w[y].sum() * w[~y].sum())
drawn = next(resample_by_study(study, 1, numbers.seed))
assert np.isclose(A_of_draw, roc_auc_score(y[drawn], s[drawn]))
assert np.isclose(A_of_draw, weighted_auroc(y, s)(w[None])[0])

# %% [markdown]
# Once the scores are sorted, {eq}`eq:weighted-auroc` is a cumulative sum of weights, and all draws are rows of one
# matrix. We time it on as many scores as the paper's test split has, against a plain loop over scikit-learn with the
# same draws:

# %%
rng = np.random.default_rng(numbers.seed)
y_many = np.repeat(rng.integers(0, 2, 1039), 2).astype(bool)
s_many = (y_many + rng.normal(size=2078)).round(2)
study_many = np.repeat(np.arange(1039), 2)
begun = time.perf_counter()
fast = weighted_auroc(y_many, s_many)(draw_weights(study_many, 1000, 1))
taken = {"all draws at once": time.perf_counter() - begun}
begun = time.perf_counter()
rows = resample_by_study(study_many, 1000, 1)
loop = np.array([roc_auc_score(y_many[r], s_many[r]) for r in rows])
taken["a loop over scikit-learn"] = time.perf_counter() - begun
assert np.abs(fast - loop).max() < 1e-9
pd.DataFrame({"seconds, 1,000 draws of 2,078 scores": taken}).round(3)

# %% [markdown]
# ### From draws to an interval
#
# The *percentile* interval runs from the 2.5th to the 97.5th percentile of the draws. Where the draws are skewed or
# off centre, the *bias-corrected and accelerated* interval, *BCa* {cite}`efron1987`, takes other percentiles,
#
# ```{math}
# :label: eq:bca
# \begin{aligned}
# \alpha_1 &= \Phi\!\left( z_0 + \frac{z_0 + z_{0.025}}{1 - a\,(z_0 + z_{0.025})} \right), \\
# z_0 &= \Phi^{-1}\bigl(\text{fraction of draws below } \hat A\bigr), \\
# a &= \frac{\sum_g d_g^3}{6\,(\sum_g d_g^2)^{3/2}},
# \end{aligned}
# ```
#
# and $\alpha_2$ with $z_{0.975}$. $\Phi$ is the standard normal distribution function. To get $d_g$, the AUROC is
# computed with each study left out in turn; $d_g$ is the mean of these values minus the value without study $g$. We
# compute the ends by hand:

# %%
area = weighted_auroc(y, s)
A, *A_draws = area(np.vstack([np.ones(len(y)), draw_weights(study, **draws)]))
without = area(leave_one_out(study))
d = np.nanmean(without) - without[~np.isnan(without)]
a = (d**3).sum() / (6 * (d**2).sum() ** 1.5)
A_draws = np.array(A_draws)[~np.isnan(A_draws)]
z_0 = norm.ppf(((A_draws < A).sum() + (A_draws == A).sum() / 2) / len(A_draws))
z = z_0 + norm.ppf([0.025, 0.975])
alpha = norm.cdf(z_0 + z / (1 - a * z))
bca = bootstrap(area, study, **draws, method="bca")
ends = np.quantile(A_draws, alpha) if np.isfinite(alpha).all() else [np.nan, np.nan]  # no study matters
assert np.allclose(ends, [bca.low, bca.high], equal_nan=True)
pd.Series({"z0": z_0, "a": a, "alpha 1": alpha[0], "alpha 2": alpha[1]}).round(3)

# %% [markdown]
# ## DeLong's formula, without resampling
#
# An AUROC is a mean over pairs of images, and the variance of such a mean is known {cite}`delong1988`. The *placement
# value* of an abnormal image is the fraction of normal images that score below it; that of a normal image is the
# fraction of abnormal images that score above it:
#
# ```{math}
# :label: eq:delong
# \begin{aligned}
# V_{10,i} &= \tfrac{1}{n_0} \textstyle\sum_j [s_i > s_j], \\
# V_{01,j} &= \tfrac{1}{n_1} \textstyle\sum_i [s_i > s_j], \\
# \operatorname{var} \hat A &= \frac{S_{10}}{n_1} + \frac{S_{01}}{n_0} ,
# \end{aligned}
# ```
#
# where ties count one half, $n_1$ and $n_0$ are the numbers of abnormal and normal images, and $S_{10}$ and $S_{01}$
# are the sample variances of the two kinds of placement values.

# %%
V10, V01 = wins.mean(axis=1), wins.mean(axis=0)
variance = V10.var(ddof=1) / len(V10) + V01.var(ddof=1) / len(V01)
by_image = significance.delong(y, s)
assert np.isclose(V10.mean(), A) and np.isclose(V01.mean(), A)
assert np.isclose(by_image.covariance[0, 0], variance)

# %% [markdown]
# {eq}`eq:delong` treats images as independent. Obuchowski's form {cite}`obuchowski1997` subtracts $\hat A$ from each
# placement value, sums the results within each study, and only then squares the sums, so that errors shared by the
# images of a study add up before they are squared. `significance.delong` implements both forms. We compute the form
# by study by hand, with $K$ studies, of which $K_1$ have an abnormal and $K_0$ a normal image:

# %%
n_1, n_0 = len(V10), len(V01)
ones = pd.Series(V10 - A).groupby(study[y]).sum() / n_1
zeros = pd.Series(V01 - A).groupby(study[~y]).sum() / n_0
mixed = ones.mul(zeros, fill_value=0).sum()
K_1, K_0, K = len(ones), len(zeros), len(np.unique(study))
by_hand = K_1 / (K_1 - 1) * (ones**2).sum() + K_0 / (K_0 - 1) * (zeros**2).sum()
by_hand += 2 * K / (K - 1) * mixed
by_study = significance.delong(y, s, study)
assert np.isclose(by_study.covariance[0, 0], by_hand)

# %% [markdown]
# The table compares five intervals for one number, DERNet's AUROC on the test split:

# %%
intervals = {
    "bootstrap, images": bootstrap(area, test["image_id"], **draws),
    "bootstrap, studies": bootstrap(area, study, **draws),
    "bootstrap, studies, BCa": bca,
    "DeLong, images": by_image.interval(),
    "DeLong, studies": by_study.interval(),
}
table = pd.DataFrame({name: vars(own) for name, own in intervals.items()}).T
table = table[["value", "low", "high"]].astype(float)
table.assign(width=table["high"] - table["low"]).round(3)

# %% tags=["remove-cell"]
widths = (table["high"] - table["low"]).fillna(0)
ratio = widths["bootstrap, studies"] / max(widths["bootstrap, images"], 1e-9)
glue_values("c12", {"width-ratio": f"{ratio:.2f}"})

# %% [markdown]
# The same bootstrap serves any statistic that can be computed from weighted images. The next table gives percentile
# and BCa intervals, by study, for the metrics that the paper prints for a classifier, and for the average precision
# (AP) of the commonest lesion type, where that has at least {glue:text}`c12-least` true boxes:

# %%
searched = detection_images(workspace)
true_boxes = searched.boxes[searched.boxes["image_id"].isin(test["image_id"])]
common = true_boxes["lesion_type"].value_counts().idxmax()
of_yolo = pd.read_parquet(workspace.tables / "yolo11l_test_boxes.parquet")
order = searched.test["image_id"].tolist()
points = classification.weighted_point(y, s, decision.thresholds["youden"])
statistics = {"AUROC": (area, study)} | {
    name: (lambda w, name=name: points(w)[name], study)
    for name in ("f1", "sensitivity", "specificity")
}
precision = detection.weighted_average_precision(true_boxes, of_yolo, common, order)
if (true_boxes["lesion_type"] == common).sum() >= detection.LEAST_BOXES:
    statistics[f"AP, {common}"] = (precision, searched.test["study_id"].to_numpy())
pd.DataFrame({
    name: {method: f"{bootstrap(own, groups, **draws, method=method):.3f}" for method in ("percentile", "bca")}
    for name, (own, groups) in statistics.items()
}).T  # fmt: skip

# %% [markdown]
# Bootstrap and DeLong should agree closely; what matters is the unit. By study, the bootstrap interval is
# {glue:text}`c12-width-ratio` times as wide as by image, on {glue:text}`c12-n` {glue:text}`c12-kind` from
# {glue:text}`c12-n-studies` studies. It need not be wider. If a study has normal and abnormal images, an error that
# they share shifts both in the same direction and cancels in the AUROC. If all images of a study have the same label,
# nothing cancels. Which interval is right?
#
# ## How often an interval contains the truth
#
# This can only be answered where the truth is known, so we simulate studies of three images, with one label per study
# and scores from two networks that are exactly equally good,
#
# $$
# s = \mu\, y + \sqrt{\rho}\; u_{\text{study}} + \sqrt{1 - \rho}\; e_{\text{image}},
# $$ (eq:clustered-scores)
#
# with $u$ and $e$ standard normal, $u$ drawn for each study and $e$ for each image; half of the variance of each is
# common to both networks. A random abnormal image scores above a random normal one with probability $\Phi(\mu / \sqrt
# 2)$: the true AUROC of each network.


# %%
mu, studies, images_per_study = 1.5, 200, 3
truth = norm.cdf(mu / np.sqrt(2))
which = np.repeat(np.arange(studies), images_per_study)


def simulate(rho, rng):
    """Labels, shape (n,), and two networks' scores, shape (n, 2), as in the equation."""
    label = np.repeat(rng.permutation(studies) < studies // 2, images_per_study)
    u, e = rng.normal(size=(studies, 3)), rng.normal(size=(len(which), 3))
    noise = np.sqrt(rho) * np.repeat(u, images_per_study, axis=0) + np.sqrt(1 - rho) * e
    return label, mu * label[:, None] + (noise[:, :2] + noise[:, 2:]) / np.sqrt(2)


# %%
many = [simulate(0.5, np.random.default_rng(seed)) for seed in range(200)]
areas = [auroc(labels, score[:, 0]) for labels, score in many]
assert abs(np.mean(areas) - truth) < 4 * np.std(areas) / np.sqrt(len(areas))  # unbiased
label_one, score_one = many[0]
assert abs(intraclass_correlation(score_one[:, 0] - mu * label_one, which) - 0.5) < 0.2

# %% [markdown]
# For each $\rho$ we simulate {glue:text}`c12-simulations` such datasets. We count how often DeLong's 95 % interval
# contains the true AUROC, by image and by study, and how often DeLong's test finds a difference between the two
# networks, although there is none. McNemar's test, explained below, is included, and so is the bootstrap at $\rho =
# 0.5$.


# %%
def coverage(rho, resamples=0):
    """How often intervals contain the truth and how often tests reject, over simulated datasets."""
    rng, rows = np.random.default_rng([numbers.seed, round(100 * rho)]), []
    for _ in range(simulations):
        labels, score = simulate(rho, rng)
        row = {}
        for unit, groups in (("images", None), ("studies", which)):
            areas = significance.delong(labels, score, groups)
            own = areas.interval()
            row[f"DeLong, {unit}"] = own.low <= truth <= own.high
            row[f"DeLong's test, {unit}"] = areas.p_value() < 0.05
            if resamples:
                drawn = which if groups is not None else np.arange(len(labels))
                of_draws = weighted_auroc(labels, score[:, 0])
                own = bootstrap(of_draws, drawn, resamples, int(rng.integers(2**32)))
                row[f"bootstrap, {unit}"] = own.low <= truth <= own.high
        right = (score > mu / 2) == labels[:, None]
        row["McNemar's test"] = significance.mcnemar(*right.T).p < 0.05
        rows.append(row)
    return pd.DataFrame(rows).mean()


# %%
correlations = [0.0, 0.25, 0.5, 0.75]
rates = pd.DataFrame({r: coverage(r, 400 if r == 0.5 else 0) for r in correlations}).T
error = np.sqrt(0.95 * 0.05 / simulations)  # standard error of such a rate
assert (rates["DeLong, studies"] - 0.95).abs().max() < 0.02 + 2 * error
assert abs(rates.loc[0.5, "bootstrap, studies"] - 0.95) < 0.02 + 2 * error
assert rates.loc[0.5, ["DeLong, images", "bootstrap, images"]].max() < 0.95 - 2 * error
rates.rename_axis("rho").round(3)

# %% tags=["hide-input", "remove-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.5))
looks = {"images": ("o-", "#B5442E"), "studies": ("s--", "#1F5FA8")}
for unit, (dash, colour) in looks.items():
    left.plot(rates.index, rates[f"DeLong, {unit}"], dash, color=colour, label=f"DeLong, {unit}")
    at = rates.loc[0.5, f"bootstrap, {unit}"]
    left.plot(0.5, at, dash[0], mfc="none", ms=11, color=colour, label=f"bootstrap, {unit}")
    right.plot(rates.index, rates[f"DeLong's test, {unit}"], dash, color=colour,
               label=f"DeLong's test, {unit}")  # fmt: skip
right.plot(rates.index, rates["McNemar's test"], "^:", color="0.3", label="McNemar's test, images")
for ax, wanted in ((left, 0.95), (right, 0.05)):
    ax.axhspan(wanted - 2 * error, wanted + 2 * error, color="0.88", zorder=0)
    ax.set(xlabel="intraclass correlation", xlim=(-0.04, 0.79))
    ax.legend(fontsize=8)
left.set(ylabel="fraction of intervals with the truth", ylim=(0.6, 1))
right.set(ylabel="fraction of tests that reject", ylim=(0, 0.3))
show_figure("c12-fig-coverage", fig)

# %% [markdown]
# ```{glue:figure} c12-fig-coverage
# :name: fig:coverage
# :alt: Left, the fraction of intervals that contain the truth, which falls with correlation by image and stays
# :  level by study. Right, the fraction of false rejections, which rises by image and stays level by study.
# How often 95 % intervals contain the true AUROC (left) and how often tests reject two equal networks (right), on
# {glue:text}`c12-simulations` simulated datasets of 200 studies with three images each. Grey: the nominal rate, plus
# and minus two standard errors of the simulation.
# ```
#
# {numref}`fig:coverage` is the reason why this book computes the intervals of metrics by study. If images are the
# unit, a nominal 95 % interval contains the truth less and less often as the images of a study resemble each other
# more, and equal networks are declared different far more often than one time in twenty. If studies are the unit,
# both problems disappear, and nothing else has to change.

# %% tags=["remove-cell"]
glue_values("c12", {f"cover-{unit}": f"{rates.loc[0.5, f'bootstrap, {unit}']:.1%}" for unit in looks})

# %% [markdown]
# At $\rho = 0.5$ the bootstrap interval by study contains the truth in {glue:text}`c12-cover-studies` of cases, the
# one by image in {glue:text}`c12-cover-images`.
#
# ## The paper's test: paired t across folds
#
# Five folds give five differences between two methods, and a t-test asks whether their mean is zero:
#
# $$
# t = \frac{\bar d}{\sqrt{s_d^2 \left( \frac1k + q \right)}}, \qquad
# q = 0 \ \text{or}\ \frac{n_{\text{test}}}{n_{\text{train}}} .
# $$ (eq:corrected-t)
#
# The plain test has $q = 0$ and assumes that the $k$ differences are independent. They are not: of five folds, any
# two training sets have three quarters of their images in common. The differences therefore agree more closely than
# independent ones would, and the test underestimates the variance of their mean. Nadeau and Bengio {cite}`nadeau2003`
# correct for this with $q = n_{\text{test}} / n_{\text{train}}$, which is one quarter for five folds.
#
# Again we need data whose truth is known. Two linear classifiers use ten features each; the features are different
# but equally informative, so neither classifier is better. On each simulated dataset, both are trained and evaluated
# on five folds:


# %%
def fold_differences(rng, n=150, features=10, folds=5):
    """Per fold, the difference in AUROC of two equally good linear classifiers."""
    label = rng.permutation(n) % 2
    x = rng.normal(size=(2, n, features)) + 0.25 * (label[:, None] - 0.5)
    fold, gaps = rng.permutation(n) % folds, []
    for held_out in range(folds):
        train, validation = fold != held_out, fold == held_out
        scores = []
        for own in x:
            ridge = own[train].T @ own[train] + np.eye(features)
            weight = np.linalg.solve(ridge, own[train].T @ (label[train] - 0.5))
            scores.append(auroc(label[validation], own[validation] @ weight))
        gaps.append(scores[0] - scores[1])
    return np.array(gaps)


# %%
rng = np.random.default_rng(numbers.seed)
gaps = [fold_differences(rng) for _ in range(simulations)]
false_positives = pd.Series({
    "paired t": np.mean([significance.paired_t(own).p < 0.05 for own in gaps]),
    "corrected (Nadeau and Bengio)": np.mean([significance.paired_t(own, 1 / 4).p < 0.05 for own in gaps]),
}, name="fraction of rejections")  # fmt: skip
plain, corrected = false_positives
assert corrected < plain
glue_values("c12", {"t-plain": f"{plain:.1%}", "t-corrected": f"{corrected:.1%}"})
false_positives.round(3).to_frame()

# %% [markdown]
# At a nominal 5 %, the plain test rejects in {glue:text}`c12-t-plain` of cases and the corrected one in
# {glue:text}`c12-t-corrected`. Moreover, a t-test of five numbers can only show that one *training recipe* is better
# on patients like these, averaged over training sets. Whether one trained network is better than another is a
# different question, which DeLong's test and the paired bootstrap answer.
#
# ## Right or wrong at one threshold: McNemar
#
# At a threshold, each image is classified correctly or not. Images that both networks classify correctly, or both
# incorrectly, carry no information about which is better. There remain $n_{10}$ images that only the first network
# classifies correctly and $n_{01}$ that only the second does. If the networks are equally good, each of these images
# is equally likely to be of either kind, like the toss of a coin; an exact binomial test asks whether the split is
# more uneven than chance explains {cite}`mcnemar1947`. The test treats images as independent, but the images of a
# study are not, and {numref}`fig:coverage` shows what that does to its false positives. We print its p because papers
# do; where studies have several images, it does not count. What counts is the paired comparison by study.

# %%
columns, held_columns = (
    {NETWORK_NAMES[name]: own[:, number] for number, name in enumerate(NETWORKS)}
    | {"equal weights": own.mean(axis=1), "paper's weights": own @ PAPER_WEIGHTS}
    for own in (prob, prob_held)
)
threshold = {name: classification.youden_threshold(label, own) for name, own in held_columns.items()}
ours = (vote > decision.thresholds["youden"]) == y
right = {name: (own > threshold[name]) == y for name, own in columns.items()}
mcnemar = {name: significance.mcnemar(ours, own).p for name, own in right.items()}
for name, theirs in right.items():  # by hand: both tails of a binomial distribution with p = 1/2
    n_10, n_01 = (ours & ~theirs).sum(), (theirs & ~ours).sum()
    n = int(n_10 + n_01)
    tail = sum(comb(n, k) for k in range(min(n_10, n_01) + 1)) / 2**n
    assert np.isclose(mcnemar[name], min(1.0, 2 * tail))

# %% [markdown]
# ## The comparisons of Table 2
#
# We compare DERNet with each network and with two other choices of weights. On the test split we compute the
# difference in AUROC with its interval by study, DeLong's p by study, and McNemar's p; across the
# {glue:text}`c12-folds` folds of the training studies, the paper's t-test, plain and corrected.


# %%
def area_gap(one, other):
    """Difference in AUROC of two scores of the test images, by study."""
    first, second = (weighted_auroc(y, own) for own in (one, other))
    return bootstrap(lambda w: first(w) - second(w), study, **draws)


def fold_gaps(name):
    """Per fold, DERNet's AUROC minus that of another score."""
    mine, other = decision.prob(prob_held), held_columns[name]
    folds = (held["fold"].to_numpy() == k for k in range(numbers.folds))
    return [auroc(label[own], mine[own]) - auroc(label[own], other[own]) for own in folds]


# %%
q = 1 / (numbers.folds - 1)
rows = {}
for name, own in columns.items():
    gap, folds = area_gap(vote, own), fold_gaps(name)
    both = significance.delong(y, np.column_stack([vote, own]), study)
    assert np.isclose(both.difference().value, gap.value)
    rows[name] = {
        "AUROC": f"{gap:+.3f}", "DeLong": both.p_value(), "DeLong, Holm": np.nan, "McNemar": mcnemar[name],
        "paired t": significance.paired_t(folds).p, "corrected t": significance.paired_t(folds, q).p,
    }  # fmt: skip
table_2 = pd.DataFrame(rows).T.rename_axis("DERNet minus")
table_2["DeLong, Holm"] = significance.holm(table_2["DeLong"].to_numpy(float))
table_2.style.format({name: "{:.3f}" for name in table_2.columns[1:]})

# %% tags=["remove-cell"]
shown = table_2.index[table_2["DeLong, Holm"] < 0.05]
text = "none of the differences remains significant"
if len(shown):
    text = f"what remains significant is the difference from {', '.join(shown)}"
glue_values("c12", {"stands": text})

# %% [markdown]
# These are five tests, and the chance that at least one of five true "no difference" hypotheses is rejected at 5 %
# may reach a quarter. Holm's correction {cite}`holm1979` multiplies the smallest p by five, the next by four, and so
# on, and keeps the chance of any false positive at 5 % or less. After this correction, by DeLong's test,
# {glue:text}`c12-stands`. Three of the five comparisons are with rows of the paper's table, the single networks; the
# two with other votes are ours. All five are fixed in this chapter, whatever the result. The recipe
# of `laptop` and `night`, however, was changed after scores on their first test patients were known. No correction for
# multiple testing covers that, so these were replaced after the recipe was frozen ({ref}`sec:test-split`).
#
# The columns answer different questions: DeLong's test concerns the ranking at all thresholds, McNemar's test one
# threshold, the t-test the recipe. They do not weigh the same. What counts here is the difference with its interval
# by study, and DeLong's p by study after Holm's correction. McNemar's p is by image. {numref}`fig:coverage` shows
# that it rejects too often when the images of a study are alike, so here it does not count, whichever way it falls.
# The t-test has one degree of freedom fewer than there are folds (here {glue:text}`c12-folds`). With two folds, as at
# `laptop` and `night`, one is left: at 5 % it then rejects only beyond $|t| = 12.7$, and informs nobody, whether it
# rejects or not.
#
# ### By hand: Holm
#
# Sort the p-values, multiply, and let no adjusted value be smaller than one before it, nor larger than 1:

# %%
p = np.sort(table_2["DeLong"].to_numpy(float))
m_tests = len(p)
adjusted = [min(1.0, max((m_tests - i) * p[i] for i in range(j + 1))) for j in range(m_tests)]
assert np.allclose(np.sort(table_2["DeLong, Holm"].to_numpy(float)), adjusted)

# %% [markdown]
# ## The comparisons of Table 3
#
# {ref}`chap:other-detectors` trained six detectors for equal time. The table shows YOLO11-L's mAP@0.5 minus that of
# each other detector, resampled by study. Two of these five comparisons are with rows of the paper's table, Faster
# R-CNN and RetinaNet; three are ours, with RT-DETR-L and the two smaller YOLO11 models. The second column has
# *simultaneous* intervals, each at the level $1 - 0.05/5$, so that all five contain the true differences together in
# at least 95 % of cases (Bonferroni).

# %%
boxes = pd.read_parquet(workspace.tables / "baselines_test_boxes.parquet")
of = {name: boxes[boxes["detector"] == name].drop(columns="detector") for name in BASELINES}
others = [name for name in BASELINES if name != "YOLO11-L"]
level = 1 - 0.05 / len(others)


def map_gap(name, level=0.95):
    """YOLO11-L's mean average precision minus another detector's."""
    mine = of["YOLO11-L"]
    return detection.mean_difference(true_boxes, mine, of[name], searched.test, **draws, level=level)


table_3 = {n: (map_gap(n), map_gap(n, level)) for n in others}
heads = ["mAP@0.5, 95 %", f"simultaneous, {level:.0%} each"]
gaps = pd.DataFrame({n: [f"{gap:+.3f}" for gap in own] for n, own in table_3.items()}, heads).T
gaps.rename_axis("YOLO11-L minus")

# %% tags=["remove-cell"]
clear = [name for name, (_, wide) in table_3.items() if wide.low > 0 or wide.high < 0]
scores = detection.detection_table(true_boxes, of["YOLO11-L"], searched.test, **draws)
glue_values("c12", {
    "table-3": f"{len(clear)} of {len(table_3)} of them exclude zero", "mean": mean_sentence(scores),
})  # fmt: skip

# %% [markdown]
# Simultaneous intervals are wider, and {glue:text}`c12-table-3`. {glue:text}`c12-mean` A type with four boxes weighs as
# much as one with hundreds. For a type that a detector never finds, every resample gives an AP of 0; that part of the
# uncertainty is missing from the interval, which is then too narrow. {ref}`chap:interval-coverage` counts how often
# intervals of AP and of mAP contain the true value, with 4 to 100 boxes per type.
# {ref}`chap:other-detectors` says which terms were not equal, and what short trainings from random weights can show
# about architectures.
#
# ## How many studies would it take?
#
# The paper's DERNet lies 2.42 points of AUROC above the dataset's baseline. The standard error of a difference falls
# with the square root of the number of studies $K$. For a two-sided test at 5 % to detect a difference $\delta$ with
# probability $1 - \beta$, the test split needs
#
# $$
# K = \left( \frac{(z_{0.975} + z_{1 - \beta})\, \sigma}{\delta} \right)^2
# $$ (eq:studies-needed)
#
# studies, where $\sigma$ is the standard error times $\sqrt K$. We estimate $\sigma$ from this run, for a difference
# between two networks on the same images and for one AUROC against a fixed number.

# %%
delta = (TABLE_2["DERNet"][0] - TABLE_2["VinDr Ensemble"][0]) / 100
pair = significance.delong(y, np.column_stack([prob[:, 0], prob[:, 2]]), study)
contrast = np.array([1, -1])
variances = {
    "one AUROC against a fixed number": by_study.covariance[0, 0],
    "DenseNet121 and ResNet50, same images": contrast @ pair.covariance @ contrast,
}
sigma = {name: np.sqrt(max(own, 1e-12) * K) for name, own in variances.items()}  # 0 for a perfect ranking
needed = {name: significance.studies_needed(delta, own, power) for name, own in sigma.items()}
reach = norm.ppf(0.975) + norm.ppf(power)
for name, own in sigma.items():
    assert needed[name] == int(np.ceil((reach * own / delta) ** 2))
glue_values("c12", {f"needed-{key}": f"{own:,}" for key, own in zip(("one", "pair"), needed.values(), strict=True)})
pd.DataFrame({"sigma": sigma, f"studies for {100 * delta:.2f} points": needed})

# %% tags=["hide-input", "remove-output"]
sizes = np.geomspace(50, 20_000, 200)
fig, ax = plt.subplots(figsize=(6.2, 3.4))
for (name, own), dash in zip(sigma.items(), ("-", "--"), strict=True):
    z = delta * np.sqrt(sizes) / own
    ax.plot(sizes, norm.cdf(z - norm.ppf(0.975)) + norm.cdf(-z - norm.ppf(0.975)), dash, label=name)
ax.axhline(power, color="0.6", lw=1)
for x, text in ((K, "this run"), (1000, "VinDr-SpineXR's test split")):
    ax.axvline(x, color="0.4", lw=1, ls=":")
    ax.text(x, 0.02, f" {text}", rotation=90, va="bottom", ha="right", fontsize=8)
ax.set_xscale("log")
ax.set(xlabel="test studies", ylabel=f"chance of detecting {100 * delta:.2f} points", ylim=(0, 1))
ax.legend(fontsize=8, loc="upper left")
show_figure("c12-fig-power", fig)

# %% [markdown]
# ```{glue:figure} c12-fig-power
# :name: fig:power
# :alt: Chance of detecting the difference against the number of test studies: two rising curves, with the numbers
# :  of studies of this run and of VinDr-SpineXR marked.
# Chance that a test at 5 % detects a difference as large as the paper's lead over the dataset's baseline. Standard
# errors are from this run: {glue:text}`c12-n` {glue:text}`c12-kind` from {glue:text}`c12-n-studies` studies, profile
# {glue:text}`c12-profile`.
# ```
#
# With this run's standard errors, detecting 2.42 points with a chance of {glue:text}`c12-power` takes
# {glue:text}`c12-needed-one` studies for one AUROC against a fixed number, and {glue:text}`c12-needed-pair` for two
# networks on the same images. {numref}`fig:power` marks the size of this run's test split and of VinDr-SpineXR's. A
# higher AUROC usually has a smaller $\sigma$, so the paper's own networks may need fewer studies; only the paper's
# scores could settle this.
#
# ## Which test to use
#
# | question | tool | unit |
# |---|---|---|
# | how uncertain is this AUROC, F1 or mAP? | bootstrap; BCa near an end of the scale | study |
# | how well is a rare type found? | boxes found, with an exact interval ({ref}`chap:interval-coverage`) | study |
# | does one network rank images better than another? | DeLong, or a paired bootstrap | study |
# | is it correct more often at its threshold? | paired bootstrap; McNemar only if each study has one image | study |
# | is one recipe better than another? | corrected t over folds, and more seeds | training |
# | several of these at once | Holm for p, Bonferroni for intervals | – |
# | can the difference be detected at all? | power, before the test split is opened | study |
#
# ## Paper beside ours
#
# | | paper | this book |
# |---|---|---|
# | resamples | 1,000 | {glue:text}`c12-resamples` |
# | intervals | 95 %, announced, not printed | 95 %, printed with the results |
# | unit | not stated | study |
# | test of two methods | paired t, $p < 0.05$; no p printed | DeLong by study, paired bootstrap, both t-tests |
# | correction for several tests | not stated | Holm, Bonferroni |
#
# ## Exercises
#
# Change the chapter first: set `simulations = 200`, and `images_per_study` to 10 in the simulation. What happens to the
# intervals by image?
#
# ```{exercise}
# :label: ex:statistics-mcnemar
# By hand: of 200 images, network A alone is right on 8 and network B alone on 2. What is McNemar's exact p?
# ```

# %% [markdown]
# ````{solution-start} ex:statistics-mcnemar
# :class: dropdown
# ````
# Ten tosses of a coin: eight or more heads have probability $(45 + 10 + 1) / 1024$. The two-sided p is twice that,
# 0.109. The 190 other images do not matter.

# %%
first, second = np.zeros(200, bool), np.zeros(200, bool)
first[:8], second[8:10] = True, True
first[10:], second[10:] = True, True
assert np.isclose(significance.mcnemar(first, second).p, 2 * 56 / 1024)

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:statistics-design
# In code: a mean is taken over 30 studies with 4 images each, $\rho = 0.6$. By what factor does its true standard error
# exceed the one that treats images as independent, and what does {eq}`eq:design-effect` predict?
# ```

# %% [markdown]
# ````{solution-start} ex:statistics-design
# :class: dropdown
# ````

# %%
rng = np.random.default_rng(1)
u, e = rng.normal(size=(4000, 30, 1)), rng.normal(size=(4000, 30, 4))
values = (np.sqrt(0.6) * u + np.sqrt(0.4) * e).reshape(4000, 120)
factor = values.mean(axis=1).std() / (values.std(axis=1, ddof=1).mean() / np.sqrt(120))
assert abs(factor - np.sqrt(1 + 3 * 0.6)) < 0.1
print(f"{factor:.2f}; the root of the design effect is {np.sqrt(1 + 3 * 0.6):.2f}")

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:statistics-question
# Question the method: a paper reports "paired t-test over five folds, $p = 0.03$" for a gain of one point. What would
# you ask its authors for?
# ```
#
# ```{solution} ex:statistics-question
# :class: dropdown
# The five differences, since $p$ alone hides whether the gain comes from one lucky fold. The corrected p, for which t
# is divided by 1.5 with five folds: 0.03 becomes about 0.09. The number of comparisons made. Whether anything, such
# as the epoch or the threshold, was chosen on the folds used for evaluation. And the interval of the gain on an
# untouched test split, by study.
# ```
#
# ## Takeaways
#
# - The unit of a radiology test set is the study. If images are the unit, 95 % is not 95 %.
# - A bootstrap can be computed with a matrix of weights instead of copies of images. DeLong's formula gives an
#   AUROC's interval without resampling. Both can be computed by study.
# - Folds share training images, so correct the t-test or do not use it; with two folds, do not use it.
# - Fix all comparisons beforehand, correct for their number, and print the interval of the difference.
# - First ask how many studies it would take to detect the difference.
