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
# (chap:protocol)=
# # 03 · Protocol: folds by study, and what an image-level split leaks
#
# ```{admonition} In this chapter
# :class: tip
# **You will be able to** deal studies into stratified folds by hand, prove that no study sits on
# both sides of a split, measure what a careless split gives away, and say why a test split is
# used once.
#
# **You need** {ref}`chap:data` for the words *study*, *image* and *box*; nothing of networks yet.
#
# **It takes** about ten minutes to read and well under a minute to run on two cores, at any
# virtual profile.
# ```
#
# A result on radiographs stands or falls with a question that no network answers: *were the
# images that judge the model strangers to the images that taught it?* This chapter settles the
# question before any network is trained. It makes the folds that every later chapter uses, and it
# measures, on the training studies alone, how the answer changes if one does not ask.

# %% tags=["parameters"]
profile = ""  # smoke, laptop or paper; empty: DERNET_PROFILE, else laptop
deals = 5  # how often the cards are dealt anew when two ways of dealing are compared
thumbnail_px = 32  # side of the small films that the simple learners see
components = 20  # principal components that the logistic regression sees

# %% [markdown]
# The set-up reads the dataset and keeps the training images only. Of the test images this chapter
# knows how many there are; it opens none, and no number below depends on what they show.

# %%
import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from myst_nb import glue
from scipy.special import comb

from dernet_utils.book.figures import show_figure, show_radiograph
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.errors import DernetError
from dernet_utils.dataset.folds import load_folds, make_folds
from dernet_utils.dataset.prepared import load_cached, read_images
from dernet_utils.imaging.cache import cache_images
from dernet_utils.metrics.classification import auroc
from dernet_utils.metrics.intervals import bootstrap_by_study

workspace = open_chapter(profile)
images = read_images(workspace)
train = images[images["split"] == "train"].sort_values("image_id").reset_index(drop=True)

# %% tags=["hide-input"]
# What the sentences of this page quote is handed to them by `glue`, under names that begin c03.
F, seed = workspace.profile.folds, workspace.profile.seed
study, y = train["study_id"].to_numpy(), train["abnormal"].to_numpy().astype(int)
kind = "virtual radiographs" if workspace.profile.virtual else "radiographs"
glue_values("c03", {
    "profile": workspace.profile.name, "kind": kind, "folds": F, "seed": seed,
    "images": len(train), "studies": train["study_id"].nunique(),
    "test-images": len(images) - len(train), "abnormal": f"{y.mean():.0%}",
})  # fmt: skip

# %% [markdown]
# This run, profile {glue:text}`c03-profile`, has {glue:text}`c03-images` {glue:text}`c03-kind` of
# {glue:text}`c03-studies` training studies, {glue:text}`c03-abnormal` of them abnormal. A further
# {glue:text}`c03-test-images` images of other studies form the test split, and wait.
#
# ## Why the study is the unit
#
# A *study* is one visit of one person: one body, one machine, one day, often two or more
# projections. Its images therefore share far more than images of two people do: bone density,
# posture, collimation, exposure, and usually the label. First we count how many images a study
# has.

# %%
by_study = train.groupby("study_id")["abnormal"].agg(n="size", abnormal="sum")
siblings = by_study["n"].loc[study].to_numpy() - 1  # other images of the same study, (n,)
assert by_study["n"].sum() == len(train)
glue_values("c03", {
    "with-sibling": f"{(siblings > 0).mean():.0%}",
})
by_study.groupby("n").size().rename("studies").rename_axis("images a study").to_frame()

# %% [markdown]
# Of all training images, {glue:text}`c03-with-sibling` have at least one *sibling*: another image
# of the same study.
#
# How much does a sibling tell about a label? Take all pairs of images within a study and count
# those that agree, normal with normal or abnormal with abnormal. Then do the same for pairs
# across studies. If $n$ images hold $a$ abnormal ones, $\binom{a}{2} + \binom{n-a}{2}$ of their
# $\binom{n}{2}$ pairs agree.


# %%
def agreeing(n, a):
    """Number of pairs with the same label among n images of which a are abnormal."""
    return comb(a, 2) + comb(n - a, 2)


n_pairs, n_agree = comb(by_study["n"], 2).sum(), agreeing(by_study["n"], by_study["abnormal"]).sum()
within = n_agree / n_pairs
across = (agreeing(len(y), y.sum()) - n_agree) / (comb(len(y), 2) - n_pairs)
assert 0 <= across <= 1 and 0 <= within <= 1
pd.Series({"within a study": within, "across studies": across}, name="labels agree").to_frame()

# %% [markdown]
# Two images of one study carry the same label in {glue:text}`c03-within` of pairs, two images of
# different studies in {glue:text}`c03-across`. The larger the gap between the two numbers, the
# more a learner gains from *recognising the person* instead of *seeing the lesion*. Whatever lets
# it recognise the person on the other side of the split is a leak: information that will not be
# there when a stranger comes {cite}`kaufman2012,kapoor2023`.
#
# ## Dealing studies, by hand
#
# Cross-validation deals the training images into $F$ *folds*. Each fold is held out once while a
# model learns from the others, so that every training image gets a prediction from a model that
# has never seen it: its *out-of-fold* prediction. We ask three things of the deal.
#
# 1. **Covering.** Every image is in exactly one fold.
# 2. **Grouped.** All images of a study are in one fold.
# 3. **Stratified.** The folds hold, as nearly as the second demand allows, equal shares of the
#    normal and equal shares of the abnormal images.
#
# The first two are absolute and the third is a compromise, so the deal is a small optimisation.
# Let $n_{sk}$ be the number of images of class $k$ in study $s$, $N_k = \sum_s n_{sk}$, and
# $C_{fk}$ the number of class-$k$ images that fold $f$ holds so far. Study $s$ goes to the fold
# that leaves the shares least unequal:
#
# ```{math}
# :label: eq:deal
# f^\star(s) = \operatorname*{arg\,min}_{f}\; \frac{1}{K} \sum_{k=1}^{K}
#   \operatorname*{sd}_{g = 1 \dots F} \left( \frac{C_{gk} + [g = f]\, n_{sk}}{N_k} \right)
# ```
#
# A fold that is equally good and holds fewer images is preferred. The sum on the right, for one
# study and one fold, takes three lines.


# %%
def spread(C, n_s, f, N):
    """Unevenness of the folds if study s joined fold f; C (F, K), n_s and N (K,)."""
    trial = C.copy()
    trial[f] += n_s
    return (trial / N).std(axis=0).mean()


# %% [markdown]
# The choice of one fold compares the folds from the first to the last.


# %%
def best_fold(C, n_s, N):
    """Return the fold of the least spread, of equal ones the emptier."""
    best, least = 0, spread(C, n_s, 0, N)
    for f in range(1, len(C)):
        this = spread(C, n_s, f, N)
        emptier = np.isclose(this, least) and C[f].sum() < C[best].sum()
        if this < least or emptier:
            best, least = f, this
    return best


# %% [markdown]
# The deal itself goes through the studies and keeps count.


# %%
def deal(n, F, order):
    """Return the fold of each study, (S,); n counts images by study and class, (S, K)."""
    C, fold = np.zeros((F, n.shape[1])), np.full(len(n), -1)
    for s in order:
        fold[s] = best_fold(C, n[s], n.sum(axis=0))
        C[fold[s]] += n[s]
    return fold


# %% [markdown]
# A case small enough to do in the head: two folds, and four studies with (normal, abnormal) images
# (2, 0), (0, 2), (1, 1) and (1, 1). The first goes to fold 0. The second would be as even in
# either fold, and fold 1 is the emptier. The two mixed studies then go one to each side.

# %%
toy = np.array([[2, 0], [0, 2], [1, 1], [1, 1]])
toy_fold = deal(toy, F=2, order=range(4))
assert toy_fold.tolist() == [0, 1, 0, 1]
pd.DataFrame(toy, columns=["normal", "abnormal"]).groupby(toy_fold).sum().rename_axis("fold")

# %% [markdown]
# Each toy fold has four images, and neither is perfectly balanced: with whole studies to deal,
# it often cannot be. Order matters in a greedy deal. Large one-sided studies are hard to place
# late, so they go first; within equals, a seeded shuffle decides.

# %%
studies, s_of_image = np.unique(study, return_inverse=True)
n = np.zeros((len(studies), 2))
np.add.at(n, (s_of_image, y), 1)  # n_sk: images by study and class
shuffled = np.arange(len(studies))
np.random.RandomState(seed).shuffle(shuffled)
order = shuffled[np.argsort(-n[shuffled].std(axis=1), kind="stable")]
fold_by_hand = deal(n, F, order)[s_of_image]

# %% [markdown]
# Every later chapter takes its folds from one file, written once per run by `load_folds`. The
# package makes it with scikit-learn's `StratifiedGroupKFold` {cite}`pedregosa2011`. If we have
# understood it, our deal is not merely similar but the same, image by image.

# %%
folds = load_folds(workspace, images)
fold = folds["fold"].to_numpy()
assert (folds["image_id"] == train["image_id"]).all()
assert (fold_by_hand == fold).all()

# %% [markdown]
# ## Three promises, checked
#
# Covering and grouping are asserted outright. For the third promise we compare each fold's number
# of images of each class with the ideal $N_k / F$. Since studies are not cut, a fold can
# miss the ideal; it should not miss it by more than the largest study.

# %%
assert np.isin(fold, range(F)).all() and folds["image_id"].is_unique
assert (folds.groupby("study_id")["fold"].nunique() == 1).all()
for f in range(F):
    assert not set(study[fold == f]) & set(study[fold != f])
counts = pd.crosstab(fold, y)
assert (counts - n.sum(axis=0) / F).abs().to_numpy().max() <= by_study["n"].max()

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(6.4, 3.2))
bottom = np.zeros(F)
for label, name, colour, hatch in ((0, "normal", "#9ECAE1", ""), (1, "abnormal", "#D55E00", "//")):
    ax.bar(range(F), counts[label], bottom=bottom, label=name, color=colour, hatch=hatch)
    bottom += counts[label].to_numpy()
for f in range(F):
    text = f"{len(set(study[fold == f]))} studies"
    ax.text(f, bottom[f], text, ha="center", va="bottom", fontsize=8)
ax.set(xlabel="fold", ylabel="images", xticks=range(F), ylim=(0, bottom.max() * 1.15))
ax.legend(loc="lower right", framealpha=1)
glue_values("c03", {
    "within": f"{within:.0%}",
    "across": f"{across:.0%}",
})
show_figure("c03-fig-folds", fig)

# %% [markdown]
# ```{glue:figure} c03-fig-folds
# :name: fig:folds
# :alt: Stacked bars of normal and abnormal images, one bar a fold, with the number of studies.
# The folds of this run. n = {glue:text}`c03-images` {glue:text}`c03-kind` of
# {glue:text}`c03-studies` training studies, profile {glue:text}`c03-profile`.
# ```
#
# {numref}`fig:folds` shows the compromise at work: heights and shares are nearly level although
# nobody cut a study to make them so.
#
# A rule that is only written down will be broken in some late-night change. So the package
# refuses to deal a table that has test images in it:

# %%
try:
    make_folds(images, F, seed)
except DernetError as error:
    refusal = str(error)
assert "test split" in refusal
refusal

# %% [markdown]
# ## The other way: dealing images
#
# Now the mistake, made on purpose and on the training images only. An *image-level* deal is
# stratified too, but treats each film as a stranger.

# %%
from sklearn.model_selection import StratifiedKFold


def deal_images(y, F, seed):
    """Return the fold of each image, (n,), whatever study it belongs to."""
    fold, splitter = np.empty(len(y), int), StratifiedKFold(F, shuffle=True, random_state=seed)
    for f, (_, held_out) in enumerate(splitter.split(y, y)):
        fold[held_out] = f
    return fold


# %% [markdown]
# An image *leaks* if one of its siblings lies in another fold, because then the sibling is in the
# training set when the image is judged. Nothing else needs to be known to count leaks.


# %%
def leaks(study, fold):
    """Whether another image of the same study lies in another fold, (n,)."""
    return pd.Series(fold).groupby(study).transform("nunique").to_numpy() > 1


image_fold = deal_images(y, F, seed)
assert not leaks(study, fold).any()
leaking = leaks(study, image_fold).mean()
glue_values("c03", {
    "leaking": f"{leaking:.0%}",
})

# %% tags=["hide-input", "remove-output"]
shown = by_study[by_study["n"] > 1].index[:10]
fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.6), sharey=True)
palette = plt.get_cmap("cividis", F)
for ax, dealt, title in zip(axes, (fold, image_fold), ("by study", "by image"), strict=True):
    for row, name in enumerate(shown):
        for column, f in enumerate(dealt[study == name]):
            ax.add_patch(plt.Rectangle((column, row), 0.9, 0.8, color=palette(f)))
            ink = "white" if f < F / 2 else "black"
            ax.text(column + 0.45, row + 0.4, str(f), ha="center", va="center", color=ink)
    ax.set(title=f"dealt {title}", xlabel="image of the study")
    ax.set(xlim=(-0.2, by_study["n"].max() + 0.2))
    ax.set(ylim=(len(shown), -0.2), xticks=[], yticks=np.arange(len(shown)) + 0.4)
    ax.set_yticklabels(range(1, len(shown) + 1))
    ax.grid(visible=False)
axes[0].set_ylabel("study")
glue_values("c03", {
    "shown": len(shown),
})
show_figure("c03-fig-deals", fig)

# %% [markdown]
# ```{glue:figure} c03-fig-deals
# :name: fig:deals
# :alt: Squares numbered by fold; each row has one number on the left, several on the right.
# Two ways to deal the same films: a row is a study, a square one of its images, the number its
# fold. The first n = {glue:text}`c03-shown` training studies with several {glue:text}`c03-kind`,
# profile {glue:text}`c03-profile`.
# ```
#
# In {numref}`fig:deals`, each row on the left has one number. On the right, numbers mix within
# rows, and each mixed row is a study on both sides of a split. In this deal,
# {glue:text}`c03-leaking` of the images leak.
#
# That is no bad luck. Suppose $N$ images are dealt at random into folds of $N/F$. The chance that
# all $m - 1$ siblings of an image fall into the image's own fold, and none leaks, is a short
# product:
#
# ```{math}
# :label: eq:leak
# P(\text{leak} \mid m) = 1 - \prod_{j=1}^{m-1} \frac{N/F - j}{N - j} \approx 1 - F^{-(m-1)}
# ```


# %%
def leak_probability(m, N, F):
    """Chance that an image of a study with m images leaks in a random deal (equation above)."""
    j = np.arange(1, m)
    return 1 - np.prod(np.maximum(N / F - j, 0) / (N - j))


# %% [markdown]
# Is that what deals do? Fifty of them, averaged, against the equation.

# %%
expected = np.mean([leak_probability(1 + m, len(y), F) for m in siblings])
measured = np.mean([leaks(study, deal_images(y, F, seed + d)) for d in range(50)])
assert abs(expected - measured) < 0.05
glue_values("c03", {
    "expected": f"{expected:.0%}",
    "measured": f"{measured:.0%}",
})

# %% [markdown]
# Averaged over the studies, {eq}`eq:leak` promises {glue:text}`c03-expected`; fifty deals gave
# {glue:text}`c03-measured`. More folds make it worse: the more data each model may learn from, the
# likelier the sibling is among them. Leave-one-*image*-out, the limit, leaks whatever can leak.
#
# ## Does a film know its study?
#
# A leak does harm only if a learner can use it. The plainest test needs no learner: shrink each
# enhanced film to a thumbnail, remove its mean brightness and contrast, and ask which other
# thumbnail is nearest.

# %%


def thumbnail(path, side):
    """A film as side × side grey values of mean 0 and deviation 1, shape (side²,)."""
    small = cv2.resize(load_cached(path), (side, side), interpolation=cv2.INTER_AREA)
    grey = small.astype(float).ravel()
    return (grey - grey.mean()) / max(grey.std(), 1e-6)


# %%
x = np.stack([thumbnail(path, thumbnail_px) for path in train["cached_path"]])
assert x.shape == (len(train), thumbnail_px**2)
squares = (x**2).sum(axis=1)
distance = squares[:, None] + squares[None, :] - 2 * x @ x.T  # squared Euclidean, (n, n)
np.fill_diagonal(distance, np.inf)
nearest = distance.argmin(axis=1)
assert (nearest != np.arange(len(train))).all()

# %% [markdown]
# Among images that have a sibling, how often is the nearest film of all one of its own study?
# A film chosen blindly would be a sibling with probability $(m - 1)/(N - 1)$. And where it is
# not, how far down the list does the nearest sibling come?

# %%
own = study[nearest] == study
has = np.flatnonzero(siblings > 0)
recognised = bootstrap_by_study(
    lambda rows: own[has][rows].mean(), study[has], workspace.profile.bootstrap, seed
)
to_sibling = np.where(study[:, None] == study, distance, np.inf).min(axis=1)
nearer = (distance < to_sibling[:, None]).mean(axis=1)[has]  # share of films before the sibling
assert (nearer[own[has]] == 0).all()

# %% tags=["hide-input", "remove-output"]
chosen = [*np.flatnonzero(own)[:2], *np.flatnonzero(~own)]
chosen = chosen[:4]
fig, axes = plt.subplots(2, len(chosen), figsize=(7.4, 4.6))
for column, i in zip(axes.T, chosen, strict=True):
    show_radiograph(column[0], load_cached(train["cached_path"][i]), "film")
    whose = "of its own study" if own[i] else "of another study"
    show_radiograph(column[1], load_cached(train["cached_path"][nearest[i]]), whose)
glue_values("c03", {
    "n-nearest": len(chosen),
    "recognised": f"{recognised:.2f}",
    "by-chance": f"{(siblings[has] / (len(train) - 1)).mean():.3f}",
    "nearer": f"{np.median(nearer):.0%}",
    "n-has": len(has),
})
show_figure("c03-fig-nearest", fig)

# %% [markdown]
# ```{glue:figure} c03-fig-nearest
# :name: fig:nearest
# :alt: Spine films, each above its nearest film, which is marked as of its own or another study.
# Films (above) and their nearest neighbours by thumbnail (below); where there are such, two of
# the own study first. n = {glue:text}`c03-n-nearest` of {glue:text}`c03-images`
# {glue:text}`c03-kind`, profile {glue:text}`c03-profile`.
# ```
#
# For the {glue:text}`c03-n-has` images with a sibling, the nearest film is of the own study in a
# share of {glue:text}`c03-recognised` (95 % interval by resampling studies), against
# {glue:text}`c03-by-chance` by chance. (Where the share is exactly none or all, resampling gives an
# interval without width; three divided by the number of studies then bounds what it cannot see.)
# In the median, {glue:text}`c03-nearer` of all films come
# before the first sibling; half of them would if siblings were like any others. Look at
# {numref}`fig:nearest` for the reason in either direction: films of one projection look alike
# across people, and two projections of one person need not look alike at all. A sibling of the
# *same* projection is what a memoriser hopes for. A network sees far more than a thumbnail, and
# may recognise a person, a machine or an implant across projections.
#
# ## Does it flatter a learner?
#
# Now two learners of the kind that existed long before deep networks. The first reduces the
# thumbnails to their principal components and fits a logistic regression. The second is a pure
# memoriser: it copies the label of the nearest training film.

# %%
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

pca = PCA(min(components, len(train) // 2), random_state=seed)
logistic = make_pipeline(pca, StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
learners = {"logistic regression": logistic, "nearest neighbour": KNeighborsClassifier(1)}

# %% [markdown]
# Components, means and weights are all learnt inside the fold. A principal component computed from
# all images would be a second, quieter leak.


# %%
@threadpool_limits.wrap(limits=1)  # on matrices this small, threads mostly wait for each other
def out_of_fold(learner, x, y, fold):
    """Probability of abnormal for each image, by a model that learnt from the other folds."""
    prob = np.full(len(y), np.nan)
    for f in range(F):
        held_out = fold == f
        prob[held_out] = learner.fit(x[~held_out], y[~held_out]).predict_proba(x[held_out])[:, 1]
    assert not np.isnan(prob).any()
    return prob


# %% [markdown]
# One deal is one throw of dice, so both ways of dealing are repeated with new seeds; the first
# study-level deal is the run's own.

# %%
ways = {
    "by image": [deal_images(y, F, seed + d) for d in range(deals)],
    "by study": [make_folds(train, F, seed + d)["fold"].to_numpy() for d in range(deals)],
}
assert (ways["by study"][0] == fold).all()
prob = {
    (name, way): np.stack([out_of_fold(learner, x, y, fold) for fold in dealt])
    for name, learner in learners.items()
    for way, dealt in ways.items()
}

# %% [markdown]
# We score by the area under the receiver operating characteristic, AUROC: the chance that an
# abnormal image gets a higher score than a normal one; 0.5 is a coin, 1 is perfect. The difference
# of the two ways is computed within each resample of studies, so that what they share
# cancels.


# %%
def mean_auroc(key, rows):
    """AUROC over some rows, mean of the deals."""
    return np.mean([auroc(y[rows], p[rows]) for p in prob[key]])


def interval(statistic):
    """The statistic with its 95 % interval over resampled studies."""
    return bootstrap_by_study(statistic, study, workspace.profile.bootstrap, seed)


# %% [markdown]
# First each way of dealing for itself, then the difference.

# %%
score = {key: interval(lambda rows, key=key: mean_auroc(key, rows)) for key in prob}


def gain(name, rows):
    """What a learner seems to gain when images are dealt instead of studies."""
    return mean_auroc((name, "by image"), rows) - mean_auroc((name, "by study"), rows)


flattery = {name: interval(lambda rows, name=name: gain(name, rows)) for name in learners}


# %% tags=["hide-input", "remove-output"]
def verdict(difference):
    """Say in words where the interval of a difference lies."""
    if difference.low > 0:
        return "lies above zero: the image-level deal flatters this learner"
    if difference.high < 0:
        return "lies below zero: here the image-level deal did the learner no favour"
    return "contains zero: with this many studies, an effect cannot be told from chance"


glue_values("c03", {
    "deals": deals,
})
for short, name in (("logistic", "logistic regression"), ("nearest", "nearest neighbour")):
    glue(f"c03-flattery-{short}", f"{flattery[name]:+.3f}", display=False)
    glue(f"c03-verdict-{short}", verdict(flattery[name]), display=False)

fig, ax = plt.subplots(figsize=(7.4, 2.6))
marks = {"by image": ("s", "#D55E00", -0.12), "by study": ("o", "#0072B2", 0.12)}
for way, (marker, colour, shift) in marks.items():
    its = [score[name, way] for name in learners]
    value = np.array([s.value for s in its])
    error = [value - [s.low for s in its], [s.high for s in its] - value]
    height = np.arange(len(its)) + shift
    style = {"fmt": marker, "color": colour, "capsize": 4, "label": f"dealt {way}"}
    ax.errorbar(value, height, xerr=error, **style)
ax.axvline(0.5, color="grey", linestyle=":", label="a coin")
ax.set(yticks=range(len(learners)), yticklabels=list(learners), ylim=(1.6, -0.6))
ax.set_xlabel("AUROC, out of fold")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
show_figure("c03-fig-leak", fig)

table = pd.DataFrame(
    {f"dealt {way}": [f"{score[name, way]:.2f}" for name in learners] for way in ways},
    index=list(learners),
)
table.assign(difference=[f"{flattery[name]:+.2f}" for name in learners])

# %% [markdown]
# ```{glue:figure} c03-fig-leak
# :name: fig:leak
# :alt: AUROC of two learners, with intervals, where folds are dealt by image and by study.
# What two simple learners seem to be worth, by the way of dealing; mean of
# {glue:text}`c03-deals` deals, bars are 95 % intervals over studies. n =
# {glue:text}`c03-images` {glue:text}`c03-kind` of {glue:text}`c03-studies` training studies,
# profile {glue:text}`c03-profile`.
# ```
#
# Read the difference in {numref}`fig:leak`, not the heights. For the logistic regression it is
# {glue:text}`c03-flattery-logistic`; the interval {glue:text}`c03-verdict-logistic`. For the
# nearest neighbour it is {glue:text}`c03-flattery-nearest`; the interval
# {glue:text}`c03-verdict-nearest`.
#
# Four cautions belong to the numbers, whichever way they came out. They are about these two weak
# learners; a network with millions of weights memorises far better, and its leak can be larger.
# They depend on how many images a study has and on how alike these are, which differs between a
# virtual cohort and a hospital. With a few dozen images an AUROC pooled over folds can fall well
# below one half by itself: taking an abnormal study out of the training set makes the rest more
# normal, and a learner with nothing else to go by learns just that. And a small difference is no
# licence: the deal by study costs nothing, so there is nothing to be weighed against it.
#
# Would this page have noticed a leak that matters? The second exercise plants one and looks.
#
# ## Touching the test split once
#
# Folds protect choices *among* training studies. The test split protects the last number, and only
# if no choice has looked at it. The paper's public companion code picks the best epoch, the
# ensemble's weights and the decision threshold on the test images. Nothing
# about that is visible in the result; the reported number is simply the best of many, and the best
# of many is higher than the truth, even where there is nothing to be found.
#
# How much higher can be computed. Let $J$ worthless candidates each score $n_0$ normal and $n_1$
# abnormal images at random. An AUROC is then 0.5 on average, with deviation
# {cite}`hanley1982`
#
# ```{math}
# :label: eq:null-auroc
# \sigma_0 = \sqrt{\frac{n_0 + n_1 + 1}{12\, n_0\, n_1}}, \qquad
# \mathbb{E}\left[\max_{i \le J} \mathrm{AUROC}_i\right]
#   \lesssim \frac{1}{2} + \sigma_0 \sqrt{2 \ln J}.
# ```
#
# To show it without the test split, the even folds play its part and the odd ones play the
# strangers who come afterwards.

# %%
played, strangers = np.flatnonzero(fold % 2 == 0), np.flatnonzero(fold % 2 == 1)
n_1, n_0 = y[played].sum(), (1 - y[played]).sum()
sigma_0 = np.sqrt((n_0 + n_1 + 1) / (12 * n_0 * n_1))
noise = np.random.default_rng(seed).random((100, 60, len(y)))  # repeats, candidates, images
seen = np.array([[auroc(y[played], p[played]) for p in repeat] for repeat in noise])
unseen = np.array([[auroc(y[strangers], p[strangers]) for p in repeat] for repeat in noise])
assert abs(seen.mean() - 0.5) < 5 * sigma_0 / np.sqrt(seen.size)

# %% [markdown]
# From the first $J$ candidates of each repeat we take the one that looks best on the played test,
# and note what it scores there and on strangers.

# %%
tries = np.array([1, 2, 5, 10, 20, 60])  # 60: the paper's epochs, if each were looked at
best = np.array([seen[:, :J].argmax(axis=1) for J in tries])  # (6, repeats)
repeat = np.arange(len(noise))
reported = np.array([seen[repeat, b].mean() for b in best])
true = np.array([unseen[repeat, b].mean() for b in best])
bound = 0.5 + sigma_0 * np.sqrt(2 * np.log(tries))
assert (np.diff(reported) >= 0).all() and (reported[1:] <= bound[1:]).all()

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(6.4, 3.2))
ax.plot(tries, reported, "s-", color="#D55E00", label="reported: on the images that chose")
ax.plot(tries, true, "o--", color="#0072B2", label="afterwards: on strangers")
ax.plot(tries, bound, ":", color="black", label="bound of the equation")
ax.set(xscale="log", xticks=tries, xlabel="candidates tried", ylabel="mean AUROC of the chosen")
ax.set_xticklabels(tries)
ax.minorticks_off()
ax.legend()
glue_values("c03", {
    "reported": f"{reported[-1]:.2f}",
    "true": f"{true[-1]:.2f}",
    "n-played": len(played),
})
show_figure("c03-fig-optimism", fig)

# %% [markdown]
# ```{glue:figure} c03-fig-optimism
# :name: fig:optimism
# :alt: Reported AUROC rises with the number of candidates tried; on strangers it stays near 0.5.
# The best of many worthless candidates. Scores are random numbers, so the truth is 0.5; labels are
# those of n = {glue:text}`c03-n-played` {glue:text}`c03-kind` of the even training folds, mean of
# 100 repeats, profile {glue:text}`c03-profile`.
# ```
#
# In {numref}`fig:optimism`, sixty looks at {glue:text}`c03-n-played` images turn nothing at all
# into a reported AUROC of {glue:text}`c03-reported`; strangers get {glue:text}`c03-true`. By
# {eq}`eq:null-auroc` the optimism falls with the size of the test split and grows with the number
# of looks, slowly but without end. Real epochs resemble each other more than random candidates
# do, so real optimism is smaller than this bound, and it is not zero.
#
# Hence the rules of this book:
#
# - epochs, ensemble weights, thresholds and every other choice come from out-of-fold predictions
#   of training studies;
# - the test split is predicted once, after the choices, and what comes out is printed;
# - intervals resample studies, not images, for the same reason that folds deal studies.
#
# ## Paper beside ours
#
# | | paper, VinDr-SpineXR {cite}`pham2021` | this run, {glue:text}`c03-kind` |
# | --- | --- | --- |
# | folds | 5, stratified | {glue:text}`c03-folds`, stratified |
# | all images of a study in one fold | not stated | yes, asserted above |
# | seed | 42 | {glue:text}`c03-seed` |
# | training images | 8,389 | {glue:text}`c03-images` |
# | test images | 2,078 | {glue:text}`c03-test-images`, not touched here |
# | epoch, weights, threshold chosen on | test images (companion code) | out-of-fold predictions |
#
# The published split of VinDr-SpineXR is itself by study {cite}`nguyen2021`; what the folds inside
# the training split were grouped by, the paper does not say.
#
# ## Exercises
#
# ```{exercise}
# :label: ex:protocol-hand
# By hand: two folds and three studies with (normal, abnormal) images (2, 0), (1, 0) and (0, 1),
# dealt in this order by {eq}`eq:deal`. Where does each go, and is the third promise kept?
# ```
#
# ```{solution} ex:protocol-hand
# :class: dropdown
# The first goes to fold 0: both folds are empty and equal, and the first is kept. The second goes
# to fold 1, which makes the normal shares 2/3 and 1/3 rather than 1 and 0. The third
# adds the only abnormal image: the abnormal shares become 1 and 0 either way, a tie, and fold 1
# holds fewer images. So fold 1 gets it, and fold 0 has no abnormal image at all: one abnormal
# image cannot be shared by two folds. Stratification is a wish; grouping is not.
# ```
#
# ```{exercise}
# :label: ex:protocol-code
# In code, a positive control: give every film a twin of the same study, the same thumbnail under
# fresh noise of half a deviation, as a repeated exposure would be. What does the nearest neighbour
# seem to be worth if twins are dealt by image, and by study?
# ```
#
# ```{solution-start} ex:protocol-code
# :class: dropdown
# ```

# %%
assert deal(np.array([[2, 0], [1, 0], [0, 1]]), 2, range(3)).tolist() == [0, 1, 1]  # by hand
twin = x + np.random.default_rng(seed).normal(0, 0.5, x.shape)
x_2, y_2 = np.vstack([x, twin]), np.tile(y, 2)
dealt_2 = {"by image": deal_images(y_2, F, seed), "by study": np.tile(fold, 2)}
memoriser = learners["nearest neighbour"]
worth = {way: auroc(y_2, out_of_fold(memoriser, x_2, y_2, f)) for way, f in dealt_2.items()}
assert worth["by image"] > worth["by study"]
pd.Series(worth, name="AUROC with twins").rename_axis("dealt").round(2).to_frame()

# %% [markdown]
# Dealt by image, most twins find each other across the split and the memoriser looks like an
# expert. Dealt by study, it is what it was. The measurement can see a leak where there is one.
#
# ```{solution-end}
# ```
#
# ```{exercise}
# :label: ex:protocol-change
# Change the chapter: set `thumbnail_px = 8` in the parameters cell and run again. What do you
# expect of {numref}`fig:nearest` and {numref}`fig:leak`, and what happens?
# ```
#
# ```{solution} ex:protocol-change
# :class: dropdown
# Eight pixels leave posture and collimation, and blur bone. If the own study is still found as
# often, it was recognised by outline, not by anatomy. A study fingerprint needs no detail, which
# is why cropping or blurring the films does not mend a leaking split.
# ```
#
# ```{exercise}
# :label: ex:protocol-question
# Question the method: VinDr-SpineXR names studies but not patients. A patient may have come
# twice. Which promise of this chapter does that weaken, can you find such pairs without names,
# and would you remove them from the test split if you did?
# ```
#
# ```{solution} ex:protocol-question
# :class: dropdown
# Grouping by study then still lets a person onto both sides, and the intervals, which treat
# studies as independent, are a little too narrow. Nearest neighbours across studies, by a better
# descriptor than a thumbnail, would suggest candidates for a human to judge. Removing them from
# the test split *before* any model is scored, by a rule written down beforehand, is a repair;
# removing them after seeing which were answered wrongly is a choice made on the test split.
# ```
#
# ## What to take along
#
# - The study is the unit: of dealing, of testing and of resampling.
# - A stratified deal of whole studies is a short greedy optimisation, {eq}`eq:deal`, and the
#   folds of this run equal it image by image.
# - An image-level deal puts siblings on both sides, as often as {eq}`eq:leak` says. Whether a
#   given learner profits has to be measured; this page measured two.
# - The best of many looks is optimistic, {eq}`eq:null-auroc`. So the test split is looked at once.
#
# {ref}`chap:densenet121` trains the first network, on these folds.
