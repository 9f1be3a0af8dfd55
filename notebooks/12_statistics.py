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
# **You will be able to** say what an interval of an AUROC counts as one observation, compute it by
# resampling and by DeLong's formula, choose a test for two networks on the same films, say how often
# each test cries wolf, correct for asking several questions, and tell how many studies a
# difference of two points needs.
#
# **You need** {ref}`chap:protocol` for studies and folds and {ref}`chap:ensemble` for AUROC and thresholds.
#
# **It takes** half an hour of reading, and under a minute to run: nothing is trained.
# :::
#
# The paper states how it tested: 1,000 bootstrap resamples, 95 % intervals, paired t-tests at
# $p < 0.05$, five folds. Its tables print no interval and no p-value. This chapter asks of each of these
# tools when it may be trusted, by letting it judge data whose truth is known, and then
# makes every comparison of the paper's Tables 2 and 3 that this run can make.

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
simulations = 1000  # datasets whose truth is known, in each simulation
power = 0.8  # chance of seeing a difference that is there

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from myst_nb import glue
from scipy.special import logit
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from dernet_utils.book.figures import show_figure
from dernet_utils.book.paper import TABLE_2
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.vocabulary import NETWORK_NAMES, NETWORKS
from dernet_utils.detection import images
from dernet_utils.detection.baselines import BASELINES
from dernet_utils.metrics import classification, detection, significance
from dernet_utils.metrics import intervals as metrics_intervals
from dernet_utils.triage import ensemble
from dernet_utils.triage.crossvalidation import cross_validate, open_test_labels, read_decision

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
    "kind": "virtual radiographs" if numbers.virtual else "radiographs", "folds": numbers.folds,
    "resamples": f"{numbers.bootstrap:,}", "n-held": len(held), "simulations": f"{simulations:,}",
    "n-held-studies": held["study_id"].nunique(), "power": f"{power:.0%}",
})  # fmt: skip

# %% [markdown]
# ## What counts as one observation
#
# A study brings one to several films of one spine. If a network is wrong about one of them it is more
# likely wrong about the next, so the second film tells less than a new patient would. How much less
# is measured by the *intraclass correlation* $\rho$, the share of the scores' variance that lies
# between studies. With $m$ films a study, a mean of all films varies as if there were fewer of them, by the
# *design effect* {cite}`kish1965`
#
# $$
# D = 1 + (m - 1)\, \rho .
# $$ (eq:design-effect)
#
# We take DERNet's scores of films out of fold, as logits, less the mean of their label, and part their
# variance into that between and that within studies.


# %%
def intraclass_correlation(values, groups):
    """One-way analysis of variance: the share of variance between groups."""
    of = pd.DataFrame({"value": values, "group": groups}).groupby("group")["value"]
    k, m = of.ngroups, of.size()
    between = (m * (of.mean() - np.mean(values)) ** 2).sum() / (k - 1)
    within = (of.var(ddof=0) * m).sum() / (len(values) - k)
    typical = (len(values) - (m**2).sum() / len(values)) / (k - 1)
    return (between - within) / (between + (typical - 1) * within)


# %%
label = held["label"].to_numpy(bool)
scores = logit(np.clip(decision.prob(prob_held), 1e-6, 1 - 1e-6))
residual = scores - np.where(label, scores[label].mean(), scores[~label].mean())
rho = intraclass_correlation(residual, held["study_id"].to_numpy())
m = len(held) / held["study_id"].nunique()
shuffled = np.random.default_rng(numbers.seed).permutation(residual)
alone = intraclass_correlation(shuffled, held["study_id"].to_numpy())
assert rho <= 1 and abs(alone) < 0.35  # films dealt to studies at random have nothing in common
pd.Series({"films a study": m, "rho": rho, "design effect": 1 + (m - 1) * rho}).round(2)

# %% tags=["remove-cell"]
glue_values("c12", {
    "rho": f"{rho:.2f}",
    "design": f"{1 + (m - 1) * rho:.2f}",
})

# %% [markdown]
# In this run $\rho$ is {glue:text}`c12-rho`, on {glue:text}`c12-n-held` films of
# {glue:text}`c12-n-held-studies` studies, and the design effect {glue:text}`c12-design`: by so
# much an interval that counts films understates a variance. With more films a study, or a network that
# goes by what a patient's films share, it would be worse.
#
# ## The bootstrap, as one multiplication
#
# A bootstrap draws studies with replacement {cite}`efron1987`. What a draw does to a film is to count
# it $w$ times: not at all, once, or more. So we do not copy films about; we weigh them. An AUROC of weighted films is
#
# $$
# \hat A(w) = \frac{\sum_{i : y_i = 1} \sum_{j : y_j = 0} w_i w_j \,
#   \bigl( [s_i > s_j] + \tfrac12 [s_i = s_j] \bigr)}
#   {\sum_{i : y_i = 1} w_i \; \sum_{j : y_j = 0} w_j},
# $$ (eq:weighted-auroc)
#
# where $[\cdot]$ is 1 if true and 0 otherwise. First one draw by hand, pair by pair:

# %%
w = metrics_intervals.draw_weights(study, 1, numbers.seed)[0]
s = vote
wins = (s[y][:, None] > s[~y]) + 0.5 * (s[y][:, None] == s[~y])
A_of_draw = w[y] @ wins @ w[~y] / (w[y].sum() * w[~y].sum())
drawn = next(metrics_intervals.resample_by_study(study, 1, numbers.seed))
assert np.isclose(A_of_draw, roc_auc_score(y[drawn], s[drawn]))
assert np.isclose(A_of_draw, classification.weighted_auroc(y, s)(w[None])[0])

# %% [markdown]
# With scores sorted once, {eq}`eq:weighted-auroc` is a running sum of weights, and all draws are rows of one matrix. On as many
# scores as the paper's test split has, beside the plain loop over scikit-learn, same draws:

# %%
rng = np.random.default_rng(numbers.seed)
y_many = np.repeat(rng.integers(0, 2, 1039), 2).astype(bool)
s_many = (y_many + rng.normal(size=2078)).round(2)
study_many = np.repeat(np.arange(1039), 2)
begun = time.perf_counter()
fast = classification.weighted_auroc(y_many, s_many)(metrics_intervals.draw_weights(study_many, 1000, 1))
taken = {"all draws at once": time.perf_counter() - begun}
begun = time.perf_counter()
rows = metrics_intervals.resample_by_study(study_many, 1000, 1)
loop = np.array([roc_auc_score(y_many[r], s_many[r]) for r in rows])
taken["a loop over scikit-learn"] = time.perf_counter() - begun
assert np.abs(fast - loop).max() < 1e-9
pd.DataFrame({"seconds, 1,000 draws of 2,078 scores": taken}).round(3)

# %% [markdown]
# ### From draws to an interval
#
# The *percentile* interval takes the 2.5th and the 97.5th percentile of the draws. Where draws are
# skewed or off centre, *BCa* {cite}`efron1987` takes other percentiles,
#
# ```{math}
# :label: eq:bca
# \begin{aligned}
# \alpha_1 &= \Phi\!\left( z_0 + \frac{z_0 + z_{0.025}}{1 - a\,(z_0 + z_{0.025})} \right), \\
# z_0 &= \Phi^{-1}\bigl(\text{share of draws below } \hat A\bigr), \\
# a &= \frac{\sum_g d_g^3}{6\,(\sum_g d_g^2)^{3/2}},
# \end{aligned}
# ```
#
# and $\alpha_2$ with $z_{0.975}$. $\Phi$ is the normal distribution function, and $d_g$ the mean of all values
# with one study left out, less the value without study $g$. By hand:

# %%
area = classification.weighted_auroc(y, s)
A, A_draws = area(np.ones((1, len(y))))[0], area(metrics_intervals.draw_weights(study, **draws))
without = area(metrics_intervals.leave_one_out(study))
d = np.nanmean(without) - without[~np.isnan(without)]
a = (d**3).sum() / (6 * (d**2).sum() ** 1.5)
A_draws = A_draws[~np.isnan(A_draws)]
z_0 = norm.ppf(((A_draws < A).sum() + (A_draws == A).sum() / 2) / len(A_draws))
z = z_0 + norm.ppf([0.025, 0.975])
alpha = norm.cdf(z_0 + z / (1 - a * z))
bca = metrics_intervals.bootstrap(area, study, **draws, method="bca")
assert np.allclose(np.quantile(A_draws, alpha), [bca.low, bca.high], equal_nan=True)
pd.Series({"z0": z_0, "a": a, "alpha 1": alpha[0], "alpha 2": alpha[1]}).round(3)

# %% [markdown]
# ## DeLong's formula, without any draw
#
# An AUROC is a mean over pairs, and that has a known variance {cite}`delong1988`. The *placement value* of
# an abnormal film is the share of normal films that it beats, that of a normal film the share of
# abnormal films that beat it:
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
# ties counting half, with $n_1$ abnormal and $n_0$ normal films and $S$ the sample variance of each kind.

# %%
V10, V01 = wins.mean(axis=1), wins.mean(axis=0)
variance = V10.var(ddof=1) / len(V10) + V01.var(ddof=1) / len(V01)
by_film = significance.delong(y, s)
assert np.isclose(V10.mean(), A) and np.isclose(V01.mean(), A)
assert np.isclose(by_film.covariance[0, 0], variance)

# %% [markdown]
# {eq}`eq:delong` treats films as independent. Obuchowski's form {cite}`obuchowski1997` first adds up the placement
# values of each study, less $\hat A$ each, and then squares the sums, so that films of one study that err together
# are seen to do so. `stats.delong` has both. By hand for the study-wise form, with $K$ studies, $K_1$ of them with
# an abnormal and $K_0$ with a normal film:

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
# Five intervals of one number, DERNet's AUROC on the test split:

# %%
intervals = {
    "bootstrap, films": metrics_intervals.bootstrap(area, test["image_id"], **draws),
    "bootstrap, studies": metrics_intervals.bootstrap(area, study, **draws),
    "bootstrap, studies, BCa": bca,
    "DeLong, films": by_film.interval(),
    "DeLong, studies": by_study.interval(),
}
table = pd.DataFrame({name: vars(own) for name, own in intervals.items()}).T
table = table[["value", "low", "high"]].astype(float)
table.assign(width=table["high"] - table["low"]).round(3)

# %% tags=["remove-cell"]
widths = (table["high"] - table["low"]).fillna(0)
ratio = widths["bootstrap, studies"] / max(widths["bootstrap, films"], 1e-9)
glue_values("c12", {
    "auroc": f"{intervals['bootstrap, studies']:.2f}",
    "width-ratio": f"{ratio:.2f}",
})

# %% [markdown]
# The same bootstrap serves whatever can be computed of weighted films. By study, percentile and BCa, for what the paper prints of a
# classifier at its threshold, and for the average precision of the commonest lesion type:

# %%
searched = images.detection_images(workspace)
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
statistics[f"AP, {common}"] = (precision, searched.test["study_id"].to_numpy())
pd.DataFrame({
    name: {method: f"{metrics_intervals.bootstrap(own, groups, **draws, method=method):.3f}"
           for method in ("percentile", "bca")}
    for name, (own, groups) in statistics.items()
}).T  # fmt: skip

# %% [markdown]
# Bootstrap and DeLong agree about as well as two methods can; what matters is the unit. By study the
# bootstrap's interval is {glue:text}`c12-width-ratio` times as wide as by film, on
# {glue:text}`c12-n` {glue:text}`c12-kind` of {glue:text}`c12-n-studies` studies. It need not be wider: where a study has normal and
# abnormal films, what they share moves both and cancels in an AUROC. Where all films of a study have one label, nothing cancels. Which is right?
#
# ## How often an interval holds the truth
#
# Only where the truth is known can that be asked. We make it: studies of three films, a label a study,
# and scores of two networks that are exactly equally good,
#
# $$
# s = \mu\, y + \sqrt{\rho}\; u_{\text{study}} + \sqrt{1 - \rho}\; e_{\text{film}},
# $$ (eq:clustered-scores)
#
# with $u$ and $e$ standard normal; half of the variance of each is common to both networks. A random abnormal film
# beats a random normal film with probability $\Phi(\mu / \sqrt 2)$: the true AUROC of each.


# %%
mu, studies, films = 1.5, 200, 3
truth = norm.cdf(mu / np.sqrt(2))
which = np.repeat(np.arange(studies), films)


def made(rho, rng):
    """Labels, shape (n,), and two networks' scores, shape (n, 2), as the equation says."""
    label = np.repeat(rng.permutation(studies) < studies // 2, films)
    u, e = rng.normal(size=(studies, 3)), rng.normal(size=(studies * films, 3))
    noise = np.sqrt(rho) * np.repeat(u, films, axis=0) + np.sqrt(1 - rho) * e
    return label, mu * label[:, None] + (noise[:, :2] + noise[:, 2:]) / np.sqrt(2)


# %%
label_one, score_one = made(0.5, np.random.default_rng(0))
big = [made(0.5, np.random.default_rng(seed)) for seed in range(200)]
areas = [classification.auroc(label, score[:, 0]) for label, score in big]
assert abs(np.mean(areas) - truth) < 4 * np.std(areas) / np.sqrt(len(areas))  # unbiased
assert abs(intraclass_correlation(score_one[:, 0] - mu * label_one, which) - 0.5) < 0.2

# %% [markdown]
# On {glue:text}`c12-simulations` such datasets for each $\rho$ we ask how often DeLong's 95 % interval holds the true AUROC, by film
# and by study, and how often its test says that the two networks differ, which they do not. McNemar's
# test, explained below, is asked along. At $\rho = 0.5$ the bootstrap is asked too.


# %%
def judged(rho, resamples=0):
    """Of each simulated dataset: does an interval hold the truth, does a test reject?"""
    rng, rows = np.random.default_rng([numbers.seed, round(100 * rho)]), []
    for _ in range(simulations):
        label, score = made(rho, rng)
        row = {}
        for unit, groups in (("films", None), ("studies", which)):
            areas = significance.delong(label, score, groups)
            own = areas.interval()
            row[f"DeLong, {unit}"] = own.low <= truth <= own.high
            row[f"DeLong's test, {unit}"] = areas.p_value() < 0.05
            if resamples:
                drawn = which if groups is not None else np.arange(len(label))
                area = classification.weighted_auroc(label, score[:, 0])
                own = metrics_intervals.bootstrap(area, drawn, resamples, int(rng.integers(2**32)))
                row[f"bootstrap, {unit}"] = own.low <= truth <= own.high
        right = (score > mu / 2) == label[:, None]
        row["McNemar's test"] = significance.mcnemar(*right.T).p < 0.05
        rows.append(row)
    return pd.DataFrame(rows).mean()


# %%
correlations = [0.0, 0.25, 0.5, 0.75]
shares = pd.DataFrame({r: judged(r, 400 if r == 0.5 else 0) for r in correlations}).T
error = np.sqrt(0.95 * 0.05 / simulations)  # of such a share, by chance alone
assert (shares["DeLong, studies"] - 0.95).abs().max() < 0.02 + 2 * error
assert abs(shares.loc[0.5, "bootstrap, studies"] - 0.95) < 0.02 + 2 * error
assert shares.loc[0.5, ["DeLong, films", "bootstrap, films"]].max() < 0.95 - 2 * error
shares.rename_axis("rho").round(3)

# %% tags=["hide-input", "remove-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.5))
looks = {"films": ("o-", "#B5442E"), "studies": ("s--", "#1F5FA8")}
for unit, (dash, colour) in looks.items():
    left.plot(shares.index, shares[f"DeLong, {unit}"], dash, color=colour, label=f"DeLong, {unit}")
    at = shares.loc[0.5, f"bootstrap, {unit}"]
    left.plot(0.5, at, dash[0], mfc="none", ms=11, color=colour, label=f"bootstrap, {unit}")
    right.plot(shares.index, shares[f"DeLong's test, {unit}"], dash, color=colour,
               label=f"DeLong's test, {unit}")  # fmt: skip
right.plot(shares.index, shares["McNemar's test"], "^:", color="0.3", label="McNemar's test, films")
for ax, wanted in ((left, 0.95), (right, 0.05)):
    ax.axhspan(wanted - 2 * error, wanted + 2 * error, color="0.88", zorder=0)
    ax.set(xlabel="intraclass correlation", xlim=(-0.04, 0.79))
    ax.legend(fontsize=8)
left.set(ylabel="intervals that hold the truth", ylim=(0.6, 1))
right.set(ylabel="tests that reject equal networks", ylim=(0, 0.3))
show_figure("c12-fig-coverage", fig)

# %% [markdown]
# ```{glue:figure} c12-fig-coverage
# :name: fig:coverage
# :alt: Left, the share of intervals that hold the truth, falling with correlation when films are counted and level when studies are. Right, the share of false rejections, rising when films are counted and level when studies are.
# How often 95 % intervals hold the true AUROC (left) and how often tests reject two equal networks (right),
# on {glue:text}`c12-simulations` simulated datasets of 200 studies with three films each. Grey: what is
# wanted, and what chance alone allows.
# ```
#
# {numref}`fig:coverage` is the reason for every interval of this book. Counting films, what is called 95 % holds the
# truth less and less often as films of a study resemble each other, and equal networks are told apart far more
# often than one time in twenty. Counting studies mends both, and nothing else has to change.

# %% tags=["remove-cell"]
for name in ("films", "studies"):
    glue(f"c12-cover-{name}", f"{shares.loc[0.5, f'bootstrap, {name}']:.1%}", display=False)

# %% [markdown]
# At $\rho = 0.5$ the bootstrap by study holds the truth in {glue:text}`c12-cover-studies` of cases,
# by film in {glue:text}`c12-cover-films`.
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
# The plain test has $q = 0$ and believes the $k$ differences independent. They are not: any two of five
# folds learn from training sets of which three quarters are the same, so the differences agree more than
# independent ones would, and their spread says too little. Nadeau and Bengio {cite}`nadeau2003` correct with
# $q = n_{\text{test}} / n_{\text{train}}$, one quarter for five folds.
#
# Again the truth has to be known. Two linear classifiers see ten features each, other ones, that are equally telling; neither
# is better. Both are trained and judged on five folds, over and over:


# %%
def fold_differences(rng, n=150, features=10, folds=5):
    """Differences in AUROC of two equally good linear classifiers, a fold each."""
    label = rng.permutation(n) % 2
    x = rng.normal(size=(2, n, features)) + 0.25 * (label[:, None] - 0.5)
    fold, apart = rng.permutation(n) % folds, []
    for held_out in range(folds):
        learn, judge = fold != held_out, fold == held_out
        scores = []
        for own in x:
            ridge = own[learn].T @ own[learn] + np.eye(features)
            weight = np.linalg.solve(ridge, own[learn].T @ (label[learn] - 0.5))
            scores.append(classification.auroc(label[judge], own[judge] @ weight))
        apart.append(scores[0] - scores[1])
    return np.array(apart)


# %%
rng = np.random.default_rng(numbers.seed)
apart = [fold_differences(rng) for _ in range(simulations)]
false_alarms = pd.Series({
    "paired t": np.mean([significance.paired_t(own).p < 0.05 for own in apart]),
    "corrected (Nadeau and Bengio)": np.mean([significance.paired_t(own, 1 / 4).p < 0.05 for own in apart]),
}, name="rejects two equal classifiers")  # fmt: skip
assert false_alarms.iloc[1] < false_alarms.iloc[0]
glue_values("c12", {
    "t-plain": f"{false_alarms.iloc[0]:.1%}",
    "t-corrected": f"{false_alarms.iloc[1]:.1%}",
})
false_alarms.round(3).to_frame()

# %% [markdown]
# The plain test at 5 % rejects in {glue:text}`c12-t-plain` of cases, the corrected one in
# {glue:text}`c12-t-corrected`. And a t-test of five numbers can say only that one *training recipe* is better on
# patients like these, averaged over training sets. Whether this trained network beats that one is another question, which
# DeLong and the paired bootstrap answer.
#
# ## Right or wrong at one threshold: McNemar
#
# At a threshold each film is called right or wrong. Films that both networks get right, or both wrong, say nothing
# about which is better; of the $n_{10}$ that only the first has right and the $n_{01}$ that only the second
# has, half should be either's if there is no difference: a coin, and an exact binomial test {cite}`mcnemar1947`.
# It counts films, so {numref}`fig:coverage` applies to it.

# %%
columns = {NETWORK_NAMES[name]: prob[:, m] for m, name in enumerate(NETWORKS)}
columns |= {"equal weights": prob.mean(axis=1), "paper's weights": prob @ ensemble.PAPER_WEIGHTS}
held_columns = {NETWORK_NAMES[name]: prob_held[:, m] for m, name in enumerate(NETWORKS)}
held_columns |= {
    "equal weights": prob_held.mean(axis=1), "paper's weights": prob_held @ ensemble.PAPER_WEIGHTS,
}  # fmt: skip
threshold = {n: classification.youden_threshold(label, own) for n, own in held_columns.items()}
ours = (vote > decision.thresholds["youden"]) == y
right = {name: (own > threshold[name]) == y for name, own in columns.items()}

# %% [markdown]
# ## Every comparison of Table 2
#
# DERNet against each network and against two other ways of weighing. On the test split: the difference in AUROC with its
# interval by study, DeLong's p by study, and McNemar's p. Across the {glue:text}`c12-folds` folds of the training
# studies: the t-test as the paper has it, and corrected.


# %%
def area_gap(one, other):
    """Difference in AUROC of two scores of the test films, by study."""
    first, second = (classification.weighted_auroc(y, own) for own in (one, other))
    return metrics_intervals.bootstrap(lambda w: first(w) - second(w), study, **draws)


def fold_gaps(name):
    """DERNet's AUROC less another's, in each fold."""
    mine, other = decision.prob(prob_held), held_columns[name]
    return [
        classification.auroc(label[own], mine[own]) - classification.auroc(label[own], other[own])
        for own in (held["fold"].to_numpy() == k for k in range(numbers.folds))
    ]


# %%
q = 1 / (numbers.folds - 1)
rows = {}
for name, own in columns.items():
    gap, folds = area_gap(vote, own), fold_gaps(name)
    both = significance.delong(y, np.column_stack([vote, own]), study)
    assert np.isclose(both.difference().value, gap.value)
    rows[name] = {
        "AUROC": f"{gap:+.3f}", "DeLong": both.p_value(), "McNemar": significance.mcnemar(ours, right[name]).p,
        "paired t": significance.paired_t(folds).p, "corrected t": significance.paired_t(folds, q).p,
    }  # fmt: skip
table_2 = pd.DataFrame(rows).T.rename_axis("DERNet less")
table_2["DeLong, Holm"] = significance.holm(table_2["DeLong"].to_numpy(float))
shown_columns = ["AUROC", "DeLong", "DeLong, Holm", "McNemar", "paired t", "corrected t"]
tests = shown_columns[1:]
table_2[shown_columns].style.format({name: "{:.3f}" for name in tests})

# %% tags=["remove-cell"]
shown = table_2.index[table_2["DeLong, Holm"] < 0.05]
text = "none of the differences stands"
if len(shown):
    text = f"what stands is the difference to {', '.join(shown)}"
glue_values("c12", {
    "stands": text,
})
plain = (table_2["paired t"] < 0.05).sum()
glue_values("c12", {
    "plain-t": int(plain),
})

# %% [markdown]
# Five questions are asked, and the chance that at least one of five true "no difference" is rejected at 5 % may
# reach a quarter. Holm's correction {cite}`holm1979` multiplies the smallest p by five, the next by four, and so on, and keeps
# the chance of any false alarm at 5 %. After it, by DeLong's test, {glue:text}`c12-stands`. The five were
# written down before the test split was opened, since they are the paper's.
#
# Read the columns against each other. They ask different questions: DeLong about order at all thresholds, McNemar about one
# threshold, t about the recipe. With {glue:text}`c12-folds` folds the t-test has
# one degree of freedom less than that, and can hardly reject anything at two folds.
#
# ### By hand: Holm

# %%
p = np.sort(table_2["DeLong"].to_numpy(float))
m_tests = len(p)
adjusted = [min(1.0, max((m_tests - i) * p[i] for i in range(j + 1))) for j in range(m_tests)]
assert np.allclose(np.sort(table_2["DeLong, Holm"].to_numpy(float)), adjusted)

# %% [markdown]
# ## Every comparison of Table 3
#
# {ref}`chap:other-detectors` trained six detectors for equal time. YOLO11-L's mAP@0.5 less each other's, drawn study by study; the second column is
# a *simultaneous* interval, at the level $1 - 0.05/5$, so that all five hold together in 95 % of cases (Bonferroni).

# %%
boxes = pd.read_parquet(workspace.tables / "rivals_test_boxes.parquet")
of = {name: boxes[boxes["detector"] == name].drop(columns="detector") for name in BASELINES}
others = [name for name in BASELINES if name != "YOLO11-L"]
level = 1 - 0.05 / len(others)


def map_gap(name, level=0.95):
    """YOLO11-L's mean average precision less another detector's."""
    mine = of["YOLO11-L"]
    return detection.mean_difference(true_boxes, mine, of[name], searched.test, **draws, level=level)


table_3 = {n: (map_gap(n), map_gap(n, level)) for n in others}
heads = ["mAP@0.5, 95 %", f"simultaneous, {level:.0%} each"]
gaps = pd.DataFrame({n: [f"{gap:+.3f}" for gap in own] for n, own in table_3.items()}, heads).T
gaps.rename_axis("YOLO11-L less")

# %% tags=["remove-cell"]
sure = [name for name, (_, wide) in table_3.items() if wide.low > 0 or wide.high < 0]
text = f"{len(sure)} of {len(table_3)} differences are told from zero by them"
glue_values("c12", {
    "table-3": text,
})

# %% [markdown]
# Simultaneous intervals are wider, and {glue:text}`c12-table-3`. What short trainings from random weights can say about
# architectures is discussed where they were made.
#
# ## How many studies would it take?
#
# The paper's DERNet lies 2.42 points of AUROC above the dataset's baseline. A difference's standard error
# falls with the root of the number of studies $K$. For a two-sided test at 5 % to see a difference $\delta$
# with probability $1 - \beta$ takes
#
# $$
# K = \left( \frac{(z_{0.975} + z_{1 - \beta})\, \sigma}{\delta} \right)^2
# $$ (eq:studies-needed)
#
# studies, where $\sigma$ is the standard error times $\sqrt K$, taken from this run: for a difference between two networks on
# the same films, and for one AUROC against a fixed number.

# %%
delta = (TABLE_2["DERNet"][0] - TABLE_2["VinDr Ensemble"][0]) / 100
pair = significance.delong(y, np.column_stack([prob[:, 0], prob[:, 2]]), study)
apart = np.array([1, -1])
sigma = {
    "one AUROC against a fixed number": np.sqrt(by_study.covariance[0, 0] * K),
    "DenseNet121 and ResNet50, same films": np.sqrt(apart @ pair.covariance @ apart * K),
}
needed = {name: significance.studies_needed(delta, own, power) for name, own in sigma.items()}
reach = norm.ppf(0.975) + norm.ppf(power)
for name, own in sigma.items():
    assert needed[name] == int(np.ceil((reach * own / delta) ** 2))
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
ax.set(xlabel="test studies", ylabel=f"chance of seeing {100 * delta:.2f} points", ylim=(0, 1))
ax.legend(fontsize=8, loc="upper left")
show_figure("c12-fig-power", fig)

# %% tags=["remove-cell"]
for key, name in zip(("one", "pair"), needed, strict=True):
    glue(f"c12-needed-{key}", f"{needed[name]:,}", display=False)

# %% [markdown]
# ```{glue:figure} c12-fig-power
# :name: fig:power
# :alt: Chance of seeing the difference against the number of test studies, two rising curves, with this run's and VinDr-SpineXR's numbers of studies marked.
# Chance that a test at 5 % sees a difference of the size that the paper claims over the dataset's baseline. Standard errors
# from this run: {glue:text}`c12-n` {glue:text}`c12-kind` of {glue:text}`c12-n-studies` studies,
# profile {glue:text}`c12-profile`.
# ```
#
# To see 2.42 points with a chance of {glue:text}`c12-power` takes {glue:text}`c12-needed-one` studies for one AUROC against a number that is
# held fixed, and {glue:text}`c12-needed-pair` for two networks on the same films, as far as this run's
# standard errors serve. {numref}`fig:power` marks what there is. A network with a higher AUROC has a smaller $\sigma$, so that the
# paper's own case is somewhat easier; it cannot be settled without the paper's scores.
#
# ## Which test when
#
# | question | tool | unit |
# |---|---|---|
# | how sure is this AUROC, F1, mAP | bootstrap; BCa near an end of the scale | study |
# | does this network order better than that one | DeLong, or a paired bootstrap | study |
# | is it right more often at its threshold | paired bootstrap; McNemar if each study has one film | study |
# | is this recipe better than that one | corrected t over folds, and more seeds | training |
# | several of these at once | Holm for p, Bonferroni for intervals | – |
# | can the difference be seen at all | power, before the test split is opened | study |
#
# ## Paper beside ours
#
# | | paper | this book |
# |---|---|---|
# | resamples | 1,000 | {glue:text}`c12-resamples` |
# | intervals | 95 %, announced, not printed | 95 %, printed with each number |
# | unit | not said | study |
# | test of two methods | paired t, $p < 0.05$; no p printed | DeLong by study, paired bootstrap, both t-tests |
# | correction for several tests | not said | Holm, Bonferroni |
#
# ## Exercises
#
# Change the chapter first: set `simulations = 200`, and `films` to 10 in the simulation. What becomes of the
# intervals by film?
#
# ```{exercise}
# :label: ex:statistics-mcnemar
# By hand: of 200 films, network A alone is right on 8 and network B alone on 2. What is McNemar's exact p?
# ```

# %% [markdown]
# ````{solution-start} ex:statistics-mcnemar
# :class: dropdown
# ````
# Ten tosses of a coin: eight or more heads have probability $(45 + 10 + 1) / 1024$, and two-sided twice that, 0.109.
# The 190 other films do not matter.

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
# In code: a mean of 30 studies with 4 films each, $\rho = 0.6$. By what factor is its true standard error above the one
# that counts films, and what does {eq}`eq:design-effect` say?
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
# Question the method: a paper reports "paired t-test over five folds, $p = 0.03$" for a gain of one point. What would you ask its authors for?
# ```
#
# ```{solution} ex:statistics-question
# :class: dropdown
# The five differences, since $p$ alone hides whether the gain is one lucky fold. The corrected p, which for five folds
# divides t by 1.5: 0.03 becomes about 0.12. How many comparisons were made. Whether anything, such as the epoch or the threshold, was chosen on the
# folds that judge. And the interval of the gain on an untouched test split, by study.
# ```
#
# ## What to take along
#
# - The unit of a radiology test set is the study. Count films, and 95 % is not 95 %.
# - A bootstrap is a matrix of weights times a statistic; DeLong is its formula for AUROC. Both come by study.
# - Folds share training films: correct the t-test, or do not use it.
# - Name all comparisons beforehand, correct for their number, and print the interval of the difference.
# - Ask first how many studies the difference would need.
