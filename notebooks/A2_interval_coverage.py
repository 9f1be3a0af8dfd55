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
# (chap:interval-coverage)=
# # A2 · Intervals for rare lesion types
#
# Some lesion types have fewer than ten true boxes in a test split. A bootstrap interval of their average precision
# (AP) can be computed, and it looks like any other: [0, 0] from four boxes that were all missed,
# [0.34, 1.0] from ten. Does it contain the true value in 95 % of cases? This chapter simulates detectors whose true AP
# is known, counts, and decides from how many boxes on this book reports an AP. Below that number it reports how many
# boxes were found, with an exact interval.
#
# ```{admonition} In this chapter
# :class: tip
# **You will be able to** compute the AP of a detector from its score distributions, measure how often a bootstrap
# interval contains it, say why this fails with few boxes, and compute an exact interval of a proportion whose
# observations are clustered in studies.
#
# **You need** {ref}`chap:yolo11-training` for average precision and {ref}`chap:statistics` for the bootstrap by study
# and the design effect.
#
# **It takes** twenty minutes to read. It runs for less than a minute at `smoke` and a few minutes at `laptop` on one
# core. No network is trained, and no image of the run's dataset is used.
# ```

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
rho = 0.3  # intraclass correlation of a study's boxes, above 0 and below 1
boxes_per_study = 1.5  # mean number of true boxes of a type in a study that has the type, at least 1
draws = 400  # bootstrap resamples of each dataset

# %%
from math import comb

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import beta, norm
from scipy.stats import t as student
from statsmodels.stats.proportion import proportion_confint

from dernet_utils.book.figures import show_figure, use_style
from dernet_utils.book.teaching import glue_values
from dernet_utils.core.workspace import open_workspace
from dernet_utils.metrics.detection import LEAST_BOXES, RECALLS, weighted_areas
from dernet_utils.metrics.intervals import draw_weights, interval_of, leave_one_out
from dernet_utils.metrics.matching import Matches
from dernet_utils.metrics.proportions import exact_by_study

use_style()
numbers = open_workspace(profile).profile
datasets = numbers.bootstrap // 2  # simulated for each number of boxes
glue_values("cA2", {
    "profile": numbers.name, "datasets": datasets, "draws": draws, "rho": f"{rho:g}", "least": LEAST_BOXES,
    "each": f"{boxes_per_study:g}",
})  # fmt: skip

# %% [markdown]
# ## A detector whose AP is known
#
# Three numbers describe how a simulated detector handles one lesion type. It places a box with enough overlap on a
# fraction $c$ of the lesions; the others it misses at every score. The scores of those boxes follow a normal
# distribution with mean $\mu$ and standard deviation 1. And for every true box it makes $f$ false positives on
# average, whose scores have mean 0 and standard deviation 1. In a very large dataset, the recall and the precision at
# a score threshold $t$ are therefore
#
# $$
# r(t) = c\,\Phi(\mu - t), \qquad p(t) = \frac{c\,\Phi(\mu - t)}{c\,\Phi(\mu - t) + f\,\Phi(-t)},
# $$ (eq:population-curve)
#
# with $\Phi$ the standard normal distribution function, and AP follows from the curve by
# {eq}`eq:average-precision`. This is the *population AP*: what the sample's AP estimates. Because $f$ counts false
# positives per true box, it does not depend on how many boxes a dataset has. We take a good, a weak and a poor
# detector:

# %%
detectors = {"good": (0.95, 2.0, 3), "weak": (0.6, 1.0, 6), "poor": (0.4, 0.7, 10)}  # c, mu, f


def population_ap(c, mu, f):
    """AP of a very large dataset, in which hardly any score is above 4."""
    t = np.linspace(-8, 4, 100_001)
    recall = c * norm.cdf(mu - t)
    precision = recall / (recall + f * norm.cdf(-t))
    best = np.maximum.accumulate(precision)  # at this recall or a higher one, that is, a lower threshold
    reached = len(t) - np.searchsorted(recall[::-1], RECALLS)  # number of thresholds with that recall
    return np.where(reached > 0, best[reached - 1], 0).mean()


true_ap = {name: population_ap(*own) for name, own in detectors.items()}
pd.DataFrame(detectors, ["c", "mu", "f"]).T.assign(AP=true_ap).round(3)

# %% [markdown]
# ## Studies in which boxes are alike
#
# A simulated test split has 200 studies with two images each. A study that has the lesion type has
# {glue:text}`cA2-each` true boxes of it on average, one plus a Poisson number, at random on its images. What the boxes
# of a study have in common enters through normal variables $u$ and $v$ that are drawn once per study, as in
# {eq}`eq:clustered-scores`, while $e$ and $q$ are drawn for each box. A lesion is found at some score, and has that
# score, where
#
# $$
# \sqrt{\rho}\,v + \sqrt{1 - \rho}\,q < \Phi^{-1}(c), \qquad
# s = \mu + \sqrt{\rho}\,u + \sqrt{1 - \rho}\,e .
# $$ (eq:clustered-boxes)
#
# A study's number of false positives is Poisson with a mean that varies between studies: a gamma variable with the
# variance $\rho$ times its mean squared. Their scores are those of {eq}`eq:clustered-boxes` with $\mu = 0$. In this
# chapter $\rho$ = {glue:text}`cA2-rho`. The result is in the form in which the package keeps matched boxes, so its own
# function computes AP.

# %%
STUDIES, IMAGES = 200, 2
study_of_image = np.repeat(np.arange(STUDIES), IMAGES)


def simulate(rng, n, c, mu, f, studies=STUDIES):
    """Matched boxes of one lesion type with n true boxes, and study, score and hit of each true box."""
    sizes = np.diff(np.minimum(np.cumsum(1 + rng.poisson(boxes_per_study - 1, n)), n), prepend=0)
    own = rng.permutation(studies)[: (sizes > 0).sum()].repeat(sizes[sizes > 0])  # study of each true box
    u, v = rng.normal(size=(2, studies))
    e, q = rng.normal(size=(2, n))
    near, far = np.sqrt(rho), np.sqrt(1 - rho)
    hit, score = near * v[own] + far * q < norm.ppf(c), mu + near * u[own] + far * e
    false = rng.poisson(f * n / studies * rng.gamma(1 / rho, rho, studies))
    false = np.arange(studies).repeat(false)  # study of each false positive
    of_false = near * u[false] + far * rng.normal(size=len(false))
    image, of_image = (IMAGES * at + rng.integers(IMAGES, size=len(at)) for at in (own, false))
    scores = np.r_[score[hit], of_false]
    order = np.argsort(-scores)
    is_hit = np.arange(len(scores)) < hit.sum()
    truths = np.bincount(image, minlength=IMAGES * studies)
    return Matches(np.r_[image[hit], of_image][order], scores[order], is_hit[order], truths), own, score, hit


# %% [markdown]
# The formula must agree with the package on a very large sample. With 40,000 true boxes we get:

# %%
rng, large = np.random.default_rng(numbers.seed), {}
for name, own in detectors.items():
    matches, *_ = simulate(rng, 40_000, *own, studies=100_000)
    large[name] = weighted_areas(matches, np.ones((1, len(matches.truths))))[0]
    assert abs(large[name] - true_ap[name]) < 0.015
pd.DataFrame({"formula": true_ap, "sample of 40,000": large}).round(3)

# %% [markdown]
# ## How often the interval contains the truth
#
# For 4, 10, 30 and 100 true boxes per type we simulate {glue:text}`cA2-datasets` datasets. Each has six lesion types,
# two for each of the three detectors, and so six APs and an mAP whose population values are known. We compute the
# percentile interval by study exactly as {ref}`chap:yolo11-training` does, from {glue:text}`cA2-draws` resamples that
# all types share. We also keep the number of boxes found at a threshold of $t = 0.5$, fixed beforehand, for use below.

# %%
kinds = [name for name in detectors for _ in range(2)]
true_map, at_threshold = np.mean([true_ap[name] for name in kinds]), 0.5
true_found = {name: c * norm.cdf(mu - at_threshold) for name, (c, mu, _) in detectors.items()}


def covered(of, values, truth):
    """Rows for the percentile and the BCa interval of a statistic: estimate, width, whether it contains the truth."""
    without = values[1 + draws :]
    for what, more in (("percentile", None), ("BCa", without)):
        own = interval_of(values[: 1 + draws], study_of_image, without=more)
        inside = bool(own.low <= truth <= own.high)
        yield {"of": of, "what": what, "value": own.value, "width": own.high - own.low, "covered": inside}


# %%
def one_dataset(n, number):
    """Rows of a simulated dataset: the interval of each type's AP, of mAP, and of each fraction found."""
    rng, rows, areas = np.random.default_rng([numbers.seed, n, number]), [], []
    drawn = draw_weights(study_of_image, draws, int(rng.integers(2**32)))
    weights = np.vstack([np.ones(len(study_of_image)), drawn, leave_one_out(study_of_image)])
    for name in kinds:
        matches, own, score, hit = simulate(rng, n, *detectors[name])
        areas.append(weighted_areas(matches, weights))
        rows += covered(name, areas[-1], true_ap[name])
        found = hit & (score >= at_threshold)
        for what, groups in (("found, by study", own), ("found, by box", np.arange(n))):
            exact = exact_by_study(found, groups)
            inside = exact.low <= true_found[name] <= exact.high
            rows.append({"of": name, "what": what, "width": exact.high - exact.low, "covered": inside})
    rows += covered("mAP", np.nanmean(areas, axis=0), true_map)
    return [row | {"boxes": n, "dataset": number} for row in rows]


# %%
sizes = (4, 10, 30, 100)
results = pd.DataFrame([row for n in sizes for i in range(datasets) for row in one_dataset(n, i)])

# %% [markdown]
# The number of datasets is limited, so the coverage that we count is itself uncertain: its interval is the exact one of
# {eq}`eq:effective-size` below, with each dataset as one cluster. Table and figure give the coverage of nominal 95 %
# intervals with its own 95 % interval. BCa has no ends where all resamples are equal; that counts as a miss.


# %%
def rate(rows):
    """Coverage of some intervals, with the Monte Carlo interval."""
    return exact_by_study(rows["covered"].to_numpy(bool), rows["dataset"].to_numpy())


measured = {key: rate(own) for key, own in results.groupby(["what", "of", "boxes"])}
coverage = pd.Series({key: own.count / own.total for key, own in measured.items()}).rename_axis(["what", "of", "n"])
shown = pd.Series({key: f"{coverage[key]:.0%} [{own.low:.0%}, {own.high:.0%}]" for key, own in measured.items()})
rows = [(what, of) for what in ("percentile", "BCa") for of in (*detectors, "mAP")]
shown.unstack().loc[rows].rename_axis(columns="true boxes")

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True)
for ax, what in zip(axes, ("percentile", "BCa"), strict=True):
    for shift, (of, mark) in enumerate(zip((*detectors, "mAP"), ("o-", "s--", "^-.", "D:"), strict=True)):
        own = [measured[what, of, n] for n in sizes]
        at = np.array([each.count / each.total for each in own])
        error = [at - [each.low for each in own], [each.high for each in own] - at]
        x = np.array(sizes) * 1.05 ** (shift - 1.5)
        label = "mAP of six types" if of == "mAP" else f"AP, {of}: {true_ap[of]:.2f}"
        ax.errorbar(x, at, yerr=error, fmt=mark, ms=5, capsize=3, label=label)
    ax.axhline(0.95, color="0.4", lw=1)
    ax.set(xscale="log", title=f"{what} interval", xlabel="true boxes of a type")
    ax.set_xticks(sizes, sizes)
    ax.minorticks_off()
axes[0].set(ylabel="fraction of intervals with the truth", ylim=(0.5, 1.01))
axes[1].legend(fontsize=8, loc="lower right")
show_figure("cA2-fig-coverage", fig)

# %% [markdown]
# ```{glue:figure} cA2-fig-coverage
# :name: fig:ap-coverage
# :alt: Fraction of intervals that contain the true value against the number of true boxes, for percentile and BCa
# :  intervals, with a line for each of three detectors and one for their mean.
# How often nominal 95 % bootstrap intervals by study contain the population AP and mAP. Simulated detectors;
# {glue:text}`cA2-datasets` datasets of 200 studies for each number of boxes, two types per detector and dataset.
# Bars: 95 % intervals of the coverage itself. Profile {glue:text}`cA2-profile`.
# ```

# %% [markdown]
# The fewer the boxes, the more often the interval misses. Three things go wrong, and none of them shows in the interval
# itself.
#
# *All boxes agree.* If a detector misses all four boxes, it misses them in every resample, and the interval is [0, 0].
# A detector that finds every second lesion misses four in a row once in sixteen times. The same happens at the other
# end.
#
# *AP of a small sample is too high on average.* It takes the best precision at a recall or beyond, and the best of
# several noisy numbers lies above their true values. Resampling a sample adds the same error a second time, so the
# percentile interval starts from an estimate that is too high and is itself shifted further up. BCa corrects for this
# shift, as far as it can be seen in the resamples.
#
# *Few studies carry all boxes.* Four boxes lie in two or three studies. A resample of 200 studies draws each of them
# between zero times and a few times; such a distribution is too coarse to have a 2.5th percentile worth the name.
#
# The next table shows the second effect, and how wide the intervals are.

# %%
percentile = results[results["what"] == "percentile"]
means = percentile.groupby(["of", "boxes"])[["value", "width"]].mean().unstack().loc[[*detectors, "mAP"]]
means.insert(0, ("population", ""), [*true_ap.values(), true_map])
means.rename(columns={"value": "mean estimate", "width": "mean width"}).round(3)

# %%
few, enough = sizes[0], LEAST_BOXES
population = means["population"].squeeze()
assert enough in sizes
low = means.loc[["weak", "poor", "mAP"], "value"]
assert (low[few] > low[100]).all() and (low[100] > population[low.index]).all()  # an error that falls
for name in detectors:
    assert measured["percentile", name, few].high < 0.95  # clearly too low
    assert measured["percentile", name, enough].high > 0.9 > measured["percentile", name, few].low
none = percentile[(percentile["boxes"] == few) & (percentile["of"] != "mAP")]
lowest = {n: min(coverage["percentile", name, n] for name in detectors) for n in sizes}
widest = {n: max(means["width", n][name] for name in detectors) for n in sizes}
glue_values("cA2", {
    "few": few, "none": f"{(none['width'] == 0).mean():.0%}", "low-few": f"{lowest[few]:.0%}",
    "low-ten": f"{lowest[10]:.0%}", "wide-ten": f"{widest[10]:.2f}", "low-enough": f"{lowest[enough]:.0%}",
    "low-many": f"{lowest[100]:.0%}", "weak-few": f"{means['value', few]['weak']:.2f}",
    "weak": f"{true_ap['weak']:.2f}",
    "map-enough": f"{coverage['percentile', 'mAP', enough]:.0%}", "bca-enough": f"{coverage['BCa', 'mAP', enough]:.0%}",
    "map-many": f"{coverage['percentile', 'mAP', 100]:.0%}", "bca-many": f"{coverage['BCa', 'mAP', 100]:.0%}",
})  # fmt: skip

# %% [markdown]
# ## From how many boxes on
#
# With {glue:text}`cA2-few` boxes, the worst of the three coverages is {glue:text}`cA2-low-few`, and
# {glue:text}`cA2-none` of all intervals have no width at all. The weak detector, whose population AP is
# {glue:text}`cA2-weak`, gets {glue:text}`cA2-weak-few` on average. With 10 boxes the worst coverage is
# {glue:text}`cA2-low-ten`. That may look tolerable, but the intervals are up to {glue:text}`cA2-wide-ten` wide on
# average: they seldom miss because they exclude little. With {glue:text}`cA2-least` boxes it is
# {glue:text}`cA2-low-enough`, and with 100 it is {glue:text}`cA2-low-many`: beyond {glue:text}`cA2-least` boxes,
# coverage hardly depends on their number any more. This book therefore reports an AP from {glue:text}`cA2-least` true
# boxes on (`metrics.detection.LEAST_BOXES`). Even there, a nominal 95 % is rather 90 to 95 %.
#
# The limit is a decision, not a law of nature. It rests on this simulation: on its three detectors, on
# {glue:text}`cA2-each` boxes per study and $\rho$ = {glue:text}`cA2-rho`. Change them in the parameters and run the
# chapter again: with more boxes per study, the same number of boxes tells less.
#
# *The mean is a different matter.* In mAP the noise of the types averages out, and its interval is narrow. The upward
# error of AP does not average out, because it has the same sign for every type. So a narrow interval lies around a
# number that is too high: the percentile interval of mAP contains the population value in {glue:text}`cA2-map-enough`
# of datasets with {glue:text}`cA2-least` boxes of each type, and in {glue:text}`cA2-map-many` with 100. For BCa the
# fractions are {glue:text}`cA2-bca-enough` and {glue:text}`cA2-bca-many`. Where some types of a mean have fewer than
# {glue:text}`cA2-least` boxes, the chapters say that its interval is not supported; where none has, they say that it
# tends to lie too high. A *difference* of two detectors on the same boxes suffers less if both have about the same
# error, but this chapter did not measure it.
#
# ## Counting instead: k of n
#
# What can be said from four boxes? How many of them were found, at a score threshold that a reader could work with.
# Chapters 10 and 11 use the threshold at which the detector has one false positive per image, over all lesion types and
# images. If $k$ of $n$ independent boxes are found, the exact interval of Clopper and Pearson {cite}`clopper1934`
# contains every fraction $\pi$ under which neither $k$ or more nor $k$ or fewer boxes found is rarer than 2.5 %. Its
# ends are quantiles $B_q(a, b)$ of the beta distribution:
#
# $$
# \pi_{low} = B_{0.025}(k,\; n - k + 1), \qquad \pi_{high} = B_{0.975}(k + 1,\; n - k),
# $$ (eq:clopper-pearson)
#
# with $\pi_{low} = 0$ for $k = 0$ and $\pi_{high} = 1$ for $k = n$. It contains the true fraction in *at least* 95 %
# of cases for every $n$, even for 4, because it uses the distribution of $k$ itself, not a resampling of four boxes.
#
# But boxes of one study are alike. Korn and Graubard {cite}`korn1998` replace $n$ by the *effective sample size*
# $n_e$, the number of independent boxes that would tell as much, and $k$ by $\hat p\, n_e$ with $\hat p = k / n$.
# Study $s$ of $S$ has $n_s$ boxes, of which $k_s$ are found:
#
# ```{math}
# :label: eq:effective-size
# \begin{aligned}
# D &= \frac{S}{S - 1} \sum_{s=1}^{S} \left( \frac{k_s - \hat p\, n_s}{n} \right)^2
#   \Big/ \; \frac{\hat p\,(1 - \hat p)}{n - 1}, \\
# n_e &= \min\left( n, \; \frac{n}{D}
#   \left( \frac{t_{0.975,\, n - 1}}{t_{0.975,\, S - 1}} \right)^2 \right).
# \end{aligned}
# ```
#
# $D$ is the design effect of {eq}`eq:design-effect`, estimated from the data. Student's quantiles $t$ allow for its
# being estimated from few studies. If every box lies in a study of its own, $D = 1$, $n_e = n$, and the interval is
# Clopper and Pearson's. If no box is found, or all are, there is no variance to estimate a design effect from; then
# $n_e = S$, as if each study counted once. That is conservative. By hand, for eight boxes in five studies:

# %%
k_s, n_s = np.array([3, 1, 0, 0, 1]), np.array([3, 2, 1, 1, 1])
k, n, S = k_s.sum(), n_s.sum(), len(n_s)
p = k / n
D = S / (S - 1) * (((k_s - p * n_s) / n) ** 2).sum() / (p * (1 - p) / (n - 1))
n_e = min(n, n / D * (student.ppf(0.975, n - 1) / student.ppf(0.975, S - 1)) ** 2)
low, high = beta.ppf(0.025, p * n_e, n_e - p * n_e + 1), beta.ppf(0.975, p * n_e + 1, n_e - p * n_e)
is_found = np.concatenate([np.arange(all_) < own for own, all_ in zip(k_s, n_s, strict=True)])
by_study = exact_by_study(is_found, np.repeat(list("abcde"), n_s))
assert np.allclose((by_study.low, by_study.high, by_study.effective), (low, high, n_e))
by_box = exact_by_study(is_found, np.arange(n))
assert np.allclose((by_box.low, by_box.high), proportion_confint(k, n, method="beta"))
pd.Series({"design effect": D, "effective size": n_e, "by study": f"{by_study}", "by box": f"{by_box}"}).to_frame()

# %% [markdown]
# The interval by study is wider than the one that takes the eight boxes as independent. With fewer studies $n_e$ may
# even fall below 1, and the interval then contains nearly everything: two studies tell hardly anything. Do these
# intervals hold what they promise? In the same simulated datasets we counted the boxes found with a score of at least
# 0.5:

# %%
exact = coverage[["found, by study", "found, by box"]].unstack()
for name in detectors:
    for n_boxes in sizes:
        assert measured["found, by study", name, n_boxes].high > 0.95
widths = results[results["what"] == "found, by study"].groupby(["of", "boxes"])["width"].mean().unstack()
glue_values("cA2", {
    "exact-low": f"{exact.loc['found, by study'].min(axis=None):.1%}", "exact-few": f"{widths[few].max():.2f}",
})  # fmt: skip
shown.unstack().loc[exact.index].rename_axis(columns="true boxes")

# %% [markdown]
# By study the interval contains the true fraction in at least {glue:text}`cA2-exact-low` of datasets, for every
# detector and every number of boxes. It is conservative, most of all with few boxes. With {glue:text}`cA2-few` boxes
# it is up to {glue:text}`cA2-exact-few` wide on average. That is not a weakness of the method: so little is what four
# boxes tell, and now the reader can see it. With boxes this loosely clustered, taking them as independent does little
# harm; an exercise shows when it does.
#
# Two limits remain. The interval takes the score threshold as given, although the false positives of the same test
# split determine it. And a fraction found at one threshold is not an average precision: it says nothing about the
# ranking at other thresholds.
#
# ## Paper beside ours
#
# | | paper | this book |
# |---|---|---|
# | AP of a lesion type | printed for all seven | printed from {glue:text}`cA2-least` true boxes on |
# | interval of an AP | none printed | bootstrap by study |
# | number of test boxes of a type | not printed beside its AP | beside each AP |
# | rare types | AP like the others | boxes found at one false positive per image, with an exact interval |
# | mean | mAP over seven types | the same, with the number of rare types |
#
# ## Exercises
#
# ```{exercise}
# :label: ex:coverage-hand
# By hand: none of four boxes, each in a study of its own, is found. What is the upper end of the exact interval? What
# is it if the four boxes lie in two studies?
# ```

# %% [markdown]
# ````{solution-start} ex:coverage-hand
# :class: dropdown
# ````
# At the upper end, four misses in a row have probability 2.5 %: $(1 - \pi)^4 = 0.025$, so $\pi = 0.60$. With two
# studies, $n_e = 2$ and $(1 - \pi)^2 = 0.025$, so $\pi = 0.84$.

# %%
missed = np.zeros(4, bool)
assert np.isclose(exact_by_study(missed, list("abcd")).high, 1 - 0.025 ** (1 / 4))
assert np.isclose(exact_by_study(missed, list("aabb")).high, 1 - 0.025 ** (1 / 2))
assert (round(1 - 0.025 ** (1 / 4), 2), round(1 - 0.025 ** (1 / 2), 2)) == (0.6, 0.84)

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:coverage-alike
# In code: eight studies have five boxes each. A study's boxes are either all found, with probability 0.3, or all
# missed. How often does the exact interval contain 0.3, by study and by box? No simulation is needed.
# ```

# %% [markdown]
# ````{solution-start} ex:coverage-alike
# :class: dropdown
# ````
# The number of studies whose boxes are found is binomial, so we add the probabilities of those numbers for which the
# interval contains 0.3.

# %%
of_box, inside = np.arange(8).repeat(5), {"by study": 0.0, "by box": 0.0}
for studies_found in range(9):
    probability = comb(8, studies_found) * 0.3**studies_found * 0.7 ** (8 - studies_found)
    for unit, groups in (("by study", of_box), ("by box", np.arange(40))):
        own = exact_by_study(of_box < studies_found, groups)
        inside[unit] += probability * (own.low <= 0.3 <= own.high)
assert inside["by study"] >= 0.95 > 0.85 > inside["by box"]
print({unit: f"{chance:.1%}" for unit, chance in inside.items()})

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:coverage-question
# Question the method: a paper reports that a new detector raises the AP of a rare type from 20 % to 35 %, on a test
# split with nine boxes of it. What would you ask its authors for?
# ```
#
# ```{solution} ex:coverage-question
# :class: dropdown
# The number of boxes that each detector finds at one threshold: 35 % may be one or two boxes more. The number of
# studies that the nine boxes come from. The interval of the difference on the same studies, or rather the list of the
# boxes that only one of the two finds. And whether the type was singled out after all seven had been looked at.
# ```
#
# ## Takeaways
#
# - An interval can be computed from any number of boxes, but it does not keep its promise with any number.
# - AP is biased upward in small samples. In a mean over types this error stays, while the interval gets narrower.
# - Below {glue:text}`cA2-least` true boxes, count: k of n, with an exact interval for the effective sample size.
# - Two detectors whose counts of a rare type differ by a box or two have not been shown to differ.
