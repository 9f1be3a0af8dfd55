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
# (chap:densenet121)=
# # 04 · DenseNet121
#
# :::{admonition} In this chapter
# **You will be able to** build the layer that DenseNet repeats, count the network's parameters on
# paper, write its loss and one step of its optimiser by hand, train it fold by fold to tell normal
# from abnormal spine radiographs, choose a threshold, and say how sure the result is.
#
# **You need** {ref}`chap:imaging` (what the network is shown) and {ref}`chap:protocol` (which
# images it may learn from).
#
# **It takes** half an hour of reading. In this run training took {glue:text}`c04-train-minutes`
# minutes of one job after the other; what is trained once is only loaded from then on.
# :::

# %% tags=["parameters"]
profile = ""  # smoke, laptop or paper; empty: DERNET_PROFILE, else laptop
opened_fold = 0  # whose network is opened up at the end: it held this fold out

# %% [markdown]
# The set-up opens this run's folder, makes the virtual cohort where it is missing, and reads
# tables, folds and enhanced images.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from myst_nb import glue

from dernet_utils.book import figures
from dernet_utils.book.figures import show_figure, show_radiograph
from dernet_utils.book.paper import compare_with_table_2
from dernet_utils.book.progress import epoch_bars
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.dataset.prepared import load_cached
from dernet_utils.metrics import classification, intervals
from dernet_utils.triage import networks, training
from dernet_utils.triage.crossvalidation import cross_validate, triage_images

# %%
workspace = open_chapter(profile)
numbers = workspace.profile
images = triage_images(workspace)

# %% [markdown]
# ## One question, one number
#
# Triage asks a single question of a radiograph: is there anything on it that a radiologist should
# see soon? The network answers with one number, the *logit* $z$, and the logistic function turns
# it into a probability, $\hat y = \sigma(z) = 1 / (1 + e^{-z})$. The label $y$ is 1 where the
# image has at least one lesion box and 0 where it has none. *Which* lesion and *where* is the
# detector's business ({ref}`chap:yolo11-training`).
#
# The folds of {ref}`chap:protocol` say who learns from what. The network is trained once for
# each fold, on all *other* folds; so each training image is scored by a network that never saw it.
# These scores are called *out of fold*, and everything that is chosen in this part of the book is
# chosen on them. The labels of the test split stay sealed until {ref}`chap:ensemble`.

# %%
train = images[images["split"] == "train"]
test = images[images["split"] == "test"]
assert test["label"].isna().all()  # sealed
count = {"image_id": "count", "study_id": "nunique", "label": "sum"}
counts = train.groupby("fold").agg(count)
counts.set_axis(["images", "studies", "abnormal images"], axis=1)

# %% [markdown]
# Images of one study show the same spine. Were a study in two folds, the network could recognise
# the patient in place of the disease; so we make sure.

# %%
assert (train.groupby("study_id")["fold"].nunique() == 1).all()
assert not set(train["study_id"]) & set(test["study_id"])

# %% tags=["remove-cell"]
kind = "virtual radiographs" if numbers.virtual else "radiographs"
glue_values("c04", {
    "profile": numbers.name,
    "kind": kind,
    "px": numbers.triage_px,
    "folds": numbers.folds,
    "n": len(train),
    "n-studies": train["study_id"].nunique(),
})

# %% [markdown]
# ## What the network is shown
#
# Enhanced images come in every shape; the network wants squares of one size. Each is resized to
# {glue:text}`c04-px` × {glue:text}`c04-px` pixels without keeping its proportions, as the
# authors' companion code does at 384 × 384. A few hundred of them fit in memory as bytes, so
# they are read once.

# %%
recipe = training.TriageRecipe.of(numbers)
learnt = train[train["fold"] != opened_fold]
px = recipe.image_px
sample = training.Sample.load(learnt, px)
assert sample.pixels.shape == (len(learnt), 1, px, px)
assert sample.pixels.dtype == torch.uint8
recipe

# %% [markdown]
# The networks were designed for colour photographs. A radiograph is given to them as three equal
# channels, each less ImageNet's mean for that channel and divided by its deviation. That costs
# nothing and lets a network start from ImageNet where a checkpoint is at hand.

# %%
few = sample.pixels[:4]
x = networks.as_input(few)
red = (few[:, 0] / 255 - networks.IMAGENET_MEAN[0]) / networks.IMAGENET_STD[0]
assert x.shape == (4, 3, px, px)
assert torch.allclose(x[:, 0], red, atol=1e-6)

# %% [markdown]
# Each time an image is shown it is changed a little: mirrored half of the time, turned by up to 15
# degrees, made up to 20 % brighter or darker, and its contrast stretched or flattened by as much.
# None of this alters the answer, so the network had better not depend on it.
#
# Turning a picture means reading it between its pixels, which blurs it; a film that is scored is not
# turned, and shows a small spur more sharply than any that was learnt from. Where the recipe's `detail`
# is 2, a training film is therefore turned at twice the side, and then averaged two by two.

# %%
generator = torch.Generator().manual_seed(numbers.seed)
abnormal_rows = np.flatnonzero(learnt["label"])
shown = int(abnormal_rows[0])
finer = training.Sample.load(learnt, recipe.train_px)
variants = F.avg_pool2d(training.augment(finer.pixels[[shown] * 5], generator), recipe.detail)
assert variants.shape == (5, 1, px, px)
assert variants.min() >= 0 and variants.max() <= 1

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(2, 3, figsize=(7.2, 5.6))
film = load_cached(learnt["cached_path"].iloc[shown])
show_radiograph(axes[0, 0], film, f"enhanced film, {film.shape[0]} × {film.shape[1]} px")
show_radiograph(axes[0, 1], sample.pixels[shown, 0].numpy(), "as a square")
for number, ax in enumerate(axes.flat[2:]):
    show_radiograph(ax, variants[number, 0].numpy() * 255, f"variant {number + 1}")
show_figure("c04-fig-input", fig)

# %% [markdown]
# ```{glue:figure} c04-fig-input
# :name: fig:densenet-input
# :alt: A spine radiograph in its own proportions, squeezed into a square, and four copies of the square that are mirrored, turned, brightened or flattened.
# What DenseNet121 is shown: one of n = {glue:text}`c04-n` {glue:text}`c04-kind`, its square of
# {glue:text}`c04-px` px, and four of the variants that training draws. Profile
# {glue:text}`c04-profile`.
# ```
#
# In {numref}`fig:densenet-input` the square is squeezed and the corners that a rotation uncovers
# are black, like the collimated margin of a film. The vertebrae and whatever is wrong with them
# stay recognisable.
#
# ### Crops first
#
# A network that starts from random weights has a hard time with whole films: the label says that
# *something* is wrong, and a lesion may fill a hundredth of the square. Where the recipe asks for
# `crop_epochs`, they come first. Half of the crops hold a lesion of a training film, rare types
# more often than they occur; the other half come from normal films, at places where other films
# have lesions, so that the place on the film alone gives nothing away. All three networks can learn from
# crops and then from films without a change, since they average over whatever area they are
# given. The protocol of the paper, and with it the profile `paper`, has no such epochs: there
# the networks start from ImageNet.

# %%
side = recipe.crop_px * recipe.detail
crops, is_lesion = training.draw_crops(finer, 24, side, generator)
assert crops.shape == (24, 1, side, side)
assert is_lesion.tolist() == [1] * 12 + [0] * 12
kinds = sample.lesions[:, 3].long()
chance = torch.bincount(kinds)[kinds].float().rsqrt()  # of a lesion, by its type's number
share = torch.bincount(kinds, chance) / chance.sum()
occurs = torch.bincount(kinds) / len(kinds)
assert share[occurs > 0].min() >= occurs[occurs > 0].min()

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(2, 6, figsize=(7.2, 2.9))
rows = [*range(6), *range(12, 18)]
for ax, row in zip(axes.flat, rows, strict=True):
    show_radiograph(ax, F.avg_pool2d(crops[row].float(), recipe.detail)[0].numpy())
for ax, word in zip(axes[:, 0], ("lesion", "normal"), strict=True):
    ax.set_title(word, fontsize=9, loc="left")
show_figure("c04-fig-crops", fig)
glue_values("c04", {
    "crop-px": recipe.crop_px,
    "crop-epochs": recipe.crop_epochs,
})

# %% [markdown]
# ```{glue:figure} c04-fig-crops
# :name: fig:crops
# :alt: Two rows of six small square crops of spine radiographs, the upper with a lesion each, the lower from normal films.
# Crops of {glue:text}`c04-crop-px` px, above with a lesion, below from normal films. This run's
# recipe has {glue:text}`c04-crop-epochs` epochs of them. n = {glue:text}`c04-n`
# {glue:text}`c04-kind`, profile {glue:text}`c04-profile`.
# ```
#
# Could you tell the rows of {numref}`fig:crops` apart? At this size many findings are a matter of a
# few grey values; that is why the label of a whole film is so thin a lesson.

# %% [markdown]
# ## Dense connectivity
#
# A plain convolutional network is a chain: each layer sees only what the layer before it made, and
# an edge found early must be passed on by every layer in between to be of use later. A *dense
# block* gives every layer all earlier feature maps instead {cite}`huang2017`:
#
# $$
# \mathbf{x}_\ell = H_\ell\big([\mathbf{x}_0, \mathbf{x}_1, \dots, \mathbf{x}_{\ell-1}]\big).
# $$ (eq:dense)
#
# The brackets lay maps on top of one another along the channel axis. $H_\ell$ is
# batch normalisation, ReLU, a 1 × 1 convolution that squeezes whatever came to 128 channels, then
# batch normalisation, ReLU and a 3 × 3 convolution that adds just $k = 32$ new maps, the *growth
# rate*. Since nothing has to be made twice, layers may be thin. This is the *feature reuse* for
# which the paper takes the network into its ensemble.
#
# Three functions are enough to write {eq}`eq:dense` down.


# %%
def batch_norm(x, norm):
    """Normalise by the running mean and variance, then scale and shift."""
    shape = (1, -1, 1, 1)
    mean, variance = norm.running_mean.view(shape), norm.running_var.view(shape)
    x = (x - mean) / torch.sqrt(variance + norm.eps)
    return x * norm.weight.view(shape) + norm.bias.view(shape)


# %%
def dense_layer(x, layer):
    """H: to 128 channels by 1 x 1, to 32 new ones by 3 x 3."""
    x = F.relu(batch_norm(x, layer.norm1))
    x = F.conv2d(x, layer.conv1.weight)
    x = F.relu(batch_norm(x, layer.norm2))
    return F.conv2d(x, layer.conv2.weight, padding=1)


def dense_block(x, layers):
    """Each layer sees all maps so far and lays its own on top."""
    for layer in layers:
        x = torch.cat([x, dense_layer(x, layer)], dim=1)
    return x


# %% [markdown]
# They should do what the real network does. We build DenseNet121 with `timm`, show it four
# radiographs once in training mode, so that its running means and variances are no longer 0 and 1,
# and send them through its first dense block and through ours.

# %%
network = networks.build_network("densenet121", seed=numbers.seed)
with torch.no_grad():
    network.train()(x)
    network.eval()
    features = network.features
    x0 = features.pool0(features.norm0(features.conv0(x)))
    by_timm = features.denseblock1(x0)
    by_hand = dense_block(x0, features.denseblock1.values())
    normed = batch_norm(x0, features.denseblock1.denselayer1.norm1)
    shared = networks.batch_norm(x0, features.denseblock1.denselayer1.norm1)
assert torch.allclose(by_hand, by_timm, atol=1e-4)
assert torch.allclose(normed, shared, atol=1e-4)
x0.shape, by_hand.shape

# %% [markdown]
# The same numbers. Sixty-four channels went in, six layers laid 32 each on top, and 256 came out;
# the first 64 of them are the input, untouched.

# %%
assert by_hand.shape[1] == 64 + 6 * 32
assert torch.equal(by_hand[:, :64], x0)
first_layer = dense_layer(x0, features.denseblock1.denselayer1)
assert torch.allclose(by_hand[:, 64:96], first_layer, atol=1e-4)

# %% [markdown]
# ### Counting the weights
#
# DenseNet121 has four such blocks of 6, 12, 24 and 16 layers. Between two blocks a *transition*
# halves the channels by a 1 × 1 convolution and the image by pooling. Each batch normalisation
# has two numbers a channel, a convolution from $c$ to $d$ channels with a window of $s$ pixels
# has $cds^2$. That is all that is needed to count.


# %%
def layer_parameters(c, k):
    """Parameters of a dense layer with c channels before it and growth rate k."""
    squeeze = 2 * c + c * 4 * k
    grow = 2 * 4 * k + 4 * k * k * 3**2
    return squeeze + grow


# %%
def count_parameters(k=32, blocks=(6, 12, 24, 16), c=64):
    """Parameters of a DenseNet with one logit, and the channels on the way."""
    total, widths = 3 * c * 7**2 + 2 * c, [c]
    for number, layers in enumerate(blocks):
        if number:  # a transition leads here
            total, c = total + 2 * c + c * (c // 2), c // 2
            widths.append(c)
        for _ in range(layers):
            total, c = total + layer_parameters(c, k), c + k
            widths.append(c)
    return total + 2 * c + c + 1, widths


# %%
def parameters_of(network):
    return sum(parameter.numel() for parameter in network.parameters())


total, widths = count_parameters()
assert total == parameters_of(network)
share = total / parameters_of(networks.build_network("resnet50"))
print(f"{total:,}, {share:.0%} of ResNet50")

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(7.2, 3))
ax.step(range(len(widths)), widths, where="mid", color="black", lw=1.2)
starts = np.cumsum([0, 7, 13, 25])
for number, start, layers in zip((1, 2, 3, 4), starts, (6, 12, 24, 16), strict=True):
    ax.axvspan(start, start + layers, color="0.9" if number % 2 else "0.8", zorder=0)
    ax.text(start + layers / 2, 1080, f"block {number}", ha="center", fontsize=9)
ax.set(xlabel="dense layer or transition, from input to output", ylabel="channels", ylim=(0, 1180))
show_figure("c04-fig-widths", fig)
glue_values("c04", {
    "parameters": f"{total:,}",
    "share": f"{share:.0%}",
})

# %% [markdown]
# ```{glue:figure} c04-fig-widths
# :name: fig:densenet-widths
# :alt: A staircase of channels that rises by 32 a layer within each of four blocks and falls to half between them, ending at 1,024.
# Channels along DenseNet121, counted by hand: each layer adds 32, each transition halves. The
# architecture does not depend on data or profile.
# ```
#
# The sum by hand, {glue:text}`c04-parameters`, is the network's own, and
# {glue:text}`c04-share` of ResNet50's. {numref}`fig:densenet-widths` shows why it stays small: a
# layer adds 32 channels, where a layer of ResNet50 computes up to 2,048 anew.
#
# ### Work and reach
#
# What an image costs is counted in floating-point operations, a multiplication and an addition
# for each weight of a convolution at each place of its output. And how much of the image can one
# output see? Each window of side $s$ adds $s - 1$ steps, and a step is as many pixels as the
# strides before it multiply to. Along the longest way of DenseNet121:

# %%
block_of = [[(1, 1), (3, 1)] * layers for layers in (6, 12, 24, 16)]
transition = [(1, 1), (2, 2)]
way = [(7, 2), (3, 2), *block_of[0]]
for block in block_of[1:]:
    way += transition + block
reach = networks.receptive_field(way)
operations = networks.count_operations(network, px)
half = networks.count_operations(network, px // 2)
assert 3.5 < operations / half < 4.5  # half the side, a quarter of the places
reach, operations

# %% tags=["remove-cell"]
glue_values("c04", {
    "reach": f"{reach:,}",
    "operations": f"{operations / 1e9:.1f}",
})

# %% [markdown]
# {glue:text}`c04-operations` billion operations for a square of {glue:text}`c04-px` px, and a reach
# of {glue:text}`c04-reach` px: each output could see the whole film. The reach is an upper bound,
# since pixels near its rim come in by few ways.

# %% [markdown]
# (sec:algorithm-1-phase-1)=
# ## The loss and the step
#
# Phase I of the paper's Algorithm 1 takes seven lines. Lines 1 and 7 say that each of the three
# networks is trained for itself; this chapter is $m$ = DenseNet121. Line 2 starts from ImageNet;
# lines 3 and 6 repeat until done; lines 4 and 5 are the work. Line 4 is the binary cross-entropy,
#
# $$
# \mathcal{L}_{CE} = -\sum_i \big[\, y_i \log \hat y_i + (1 - y_i) \log (1 - \hat y_i) \,\big].
# $$ (eq:bce)
#
# It charges $-\log$ of the probability that was given to what turned out true: nothing for a
# certainty that was right, without limit for one that was wrong. Taken literally it fails where
# $\hat y$ rounds to 0 or 1. Written with the logit, $\log(1 + e^{-|z|}) + \max(z, 0) - yz$, it is
# the same number and never overflows.

# %%
z = torch.tensor([-3.0, -0.5, 0.2, 4.0], requires_grad=True)
y = torch.tensor([0.0, 1.0, 1.0, 0.0])
y_hat = 1 / (1 + torch.exp(-z))
line_4 = -(y * torch.log(y_hat) + (1 - y) * torch.log(1 - y_hat)).sum()
stable = (torch.log1p(torch.exp(-z.abs())) + z.clamp(min=0) - y * z).sum()
by_torch = F.binary_cross_entropy_with_logits(z, y, reduction="sum")
assert torch.isclose(line_4, by_torch) and torch.isclose(stable, by_torch)

# %% [markdown]
# Training uses the mean over a batch in place of the sum, so that the step does not grow with the
# batch. The loss has a beautiful gradient: what was said less what was true, $\partial
# \mathcal{L}/\partial z_i = \hat y_i - y_i$. Where the network is right there is nothing to learn.

# %%
by_torch.backward()
assert torch.allclose(z.grad, (y_hat - y).detach())
extreme = F.binary_cross_entropy_with_logits(torch.tensor([200.0]), torch.tensor([0.0]))
assert extreme == 200  # where log(1 - 1) would be minus infinity

# %% [markdown]
# Line 5 moves every weight against its gradient $g$ by AdamW {cite}`loshchilov2019`. It keeps a
# running mean $m$ of the gradient and $v$ of its square, corrects both for their start at zero,
# and shrinks the weight a little on its own account:
#
# $$
# \theta \leftarrow \theta - \eta \Big( \lambda \theta +
# \frac{\hat m}{\sqrt{\hat v} + \epsilon} \Big), \qquad
# \hat m = \frac{m}{1 - \beta_1^t}, \quad \hat v = \frac{v}{1 - \beta_2^t}.
# $$ (eq:adamw)
#
# Two steps by hand, on two weights with the loss $\theta_1^2 + 3\theta_2^2$, against torch's.

# %%
eta, lam, beta_1, beta_2, epsilon = recipe.lr, training.WEIGHT_DECAY, 0.9, 0.999, 1e-8
theta, m, v = np.array([1.0, -2.0]), 0, 0
for t in (1, 2):
    g = np.array([2, 6]) * theta
    m, v = beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g**2
    m_hat, v_hat = m / (1 - beta_1**t), v / (1 - beta_2**t)
    theta = theta - eta * (lam * theta + m_hat / (np.sqrt(v_hat) + epsilon))

# %%
weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
optimizer = torch.optim.AdamW([weight], lr=eta, weight_decay=lam)
for _ in range(2):
    optimizer.zero_grad()
    (weight[0] ** 2 + 3 * weight[1] ** 2).backward()
    optimizer.step()
assert np.allclose(weight.detach().numpy(), theta, rtol=1e-12)

# %% [markdown]
# The learning rate follows half a cosine from the recipe's value $\eta_{max}$ to zero, large strides
# first and small ones at the end: $\eta_t = \eta_{max} \tfrac12 (1 + \cos (\pi t / N))$, where $t$ is
# how many of $N$ epochs are over, those on crops included. Whole films so find a network that has
# learnt what a lesion looks like, and disturb it less than large strides would.

# %% [markdown]
# ## Training, fold by fold
#
# Everything is in place. {glue:text}`c04-start` All epochs are made and the last one counts: the
# companion code keeps the epoch that is best on the test images, which we do not
# ({numref}`ex:densenet-epoch`). The held-out fold is scored for the learning curve, from the last epoch
# on crops to the end, and decides nothing.
#
# `cross_validate` trains once for each of {glue:text}`c04-folds` folds. A network and a fold are one
# job, named by a digest of images, labels, numbers and code: one that is finished is loaded, one
# that was interrupted goes on at its last finished epoch, and a cluster may run them all at once.

# %% tags=["remove-output"]
found = cross_validate(workspace, "densenet121", epoch_bars("densenet121", numbers))

# %%
curves, scored = found.curves, found.out_of_fold
epochs = recipe.crop_epochs + recipe.epochs
assert (curves.groupby("fold")["epoch"].max() == epochs).all()
assert scored["image_id"].tolist() == train["image_id"].tolist()  # each image, once
curves.groupby("fold").tail(1).set_index("fold").drop(columns="seconds").round(5)

# %% tags=["hide-input", "remove-output"]
show_figure("c04-fig-curve", figures.draw_learning_curves(curves))
start = networks.starting_sentence("densenet121", networks.starting_weights("densenet121"))
glue_values("c04", {
    "start": start,
    "train-minutes": f"{curves['seconds'].sum() / 60:.1f}",
    "epochs": epochs,
})

# %% [markdown]
# ```{glue:figure} c04-fig-curve
# :name: fig:densenet-curve
# :alt: Two panels over epochs, a colour a fold. Left, the loss on images learnt from and held out. Right, the AUROC on the held-out fold.
# Learning curves over {glue:text}`c04-epochs` epochs and {glue:text}`c04-folds` folds; epochs on
# crops lie on grey. Held-out losses above 1.5 are cut off. n = {glue:text}`c04-n`
# {glue:text}`c04-kind`, profile {glue:text}`c04-profile`.
# ```
#
# In {numref}`fig:densenet-curve` the loss of what is learnt from is measured with augmentation
# and while the weights move, on crops as long as crops are shown; the held-out one is that of whole
# films at the end of the epoch. Held-out losses may jump early: in evaluation mode batch
# normalisation relies on running means, which trail behind the weights and during crop epochs are
# those of crops.

# %% [markdown]
# ## The threshold, chosen out of fold
#
# A probability becomes a decision by a threshold $\tau$: abnormal where $\hat y > \tau$, the
# $\tau_{optimal}$ of line 17 in Algorithm 1. The paper does not say how it was found. We
# take Youden's: the $\tau$ with the largest sensitivity + specificity − 1 {cite}`youden1950`, out of
# fold. The probability is the mean over the image and its mirror image.

# %%
y, prob = scored["label"].to_numpy(), scored["prob"].to_numpy()
tau = classification.youden_threshold(y, prob)
network, _ = training.load_network("densenet121", found.checkpoints[opened_fold], recipe)
held_out = training.Sample.load(train[train["fold"] == opened_fold], px)
mirrored = networks.predict_probabilities(network, held_out.pixels[:8].flip(-1))
assert np.allclose(mirrored, prob[scored["fold"] == opened_fold][:8], atol=1e-4)
glue_values("c04", {
    "tau": f"{tau:.2f}",
})

# %% [markdown]
# Sensitivity is the share of abnormal images that are called so, specificity the share of normal
# ones that are left alone. To see that nothing is hidden in the search, we try every
# distinct probability.


# %%
def youden(threshold):
    point = classification.operating_point(y, prob, threshold)
    return point["sensitivity"] + point["specificity"] - 1


best = max(youden(threshold) for threshold in prob)
assert youden(tau) >= best - 1e-9

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(7.2, 2.8))
bins = np.linspace(0, 1, 21)
ax.hist(
    [prob[~y], prob[y]],
    bins, label=["normal", "abnormal"], color=["0.75", "C3"], edgecolor="black", lw=0.5,
)  # fmt: skip
ax.axvline(tau, color="black", ls="--", label=f"threshold {tau:.2f}")
ax.set(xlabel="probability of abnormal", ylabel="images", xlim=(0, 1))
ax.legend(fontsize=8)
show_figure("c04-fig-threshold", fig)

# %% [markdown]
# ```{glue:figure} c04-fig-threshold
# :name: fig:densenet-threshold
# :alt: Histogram of the out-of-fold probabilities of normal and abnormal images, with a vertical line at the threshold.
# Out-of-fold probabilities by label, and Youden's threshold $\tau$ = {glue:text}`c04-tau`. n =
# {glue:text}`c04-n` {glue:text}`c04-kind`, profile {glue:text}`c04-profile`.
# ```
#
# Where the two groups of bars in {numref}`fig:densenet-threshold` overlap, every threshold errs.
# One that is chosen to please these images looks slightly too good on them; only images that
# had no say show its worth, and these are the test split's.

# %% [markdown]
# ## How good, and how sure
#
# AUROC needs no threshold: it is the chance that an abnormal image scores above a normal one.

# %%
draws = {"resamples": numbers.bootstrap, "seed": numbers.seed}
scores = classification.classification_table(y, prob, scored["study_id"], tau, **draws)
pairs = prob[y][:, None] - prob[~y][None, :]
by_pairs = (pairs > 0).mean() + (pairs == 0).mean() / 2
assert np.isclose(by_pairs, scores.loc["auroc", "value"])
interval = intervals.Interval(**scores.loc["auroc"])
assert interval.n_images == len(train)
scores.round(3)

# %% [markdown]
# Each interval comes from {glue:text}`c04-bootstrap` resamples. In each, whole *studies* are drawn
# with replacement until there are as many as before, and the metric is computed anew; the interval
# leaves out the lowest and the highest 2.5 %. Where a draw holds one class only, AUROC is
# undefined, and the draw is left out and counted. All folds' scores are pooled, though each fold
# has a network of its own, whose probabilities may run a little higher or lower; within one fold
# there is no such mixing.

# %%
by_fold = {
    fold: classification.auroc(rows["label"].to_numpy(), rows["prob"].to_numpy())
    for fold, rows in scored.groupby("fold")
}
assert set(by_fold) == set(range(numbers.folds))
by_fold | {"pooled": interval.value}

# %% tags=["hide-input", "remove-output"]
band = classification.roc_band(y, prob, scored["study_id"], **draws)
point = scores["value"]
star = {f"threshold {tau:.2f}": (point["sensitivity"], point["specificity"])}
show_figure("c04-fig-roc", figures.draw_roc({f"AUROC {interval.value:.2f}": band}, star))
glue_values("c04", {
    "bootstrap": f"{numbers.bootstrap:,}",
    "auroc": f"{interval:.2f}",
})
if interval.low > 0.5:
    verdict = "The whole interval lies above one half: the order it puts images in is not chance."
else:
    verdict = "The interval reaches one half: this run does not show more than chance."
glue_values("c04", {
    "verdict": verdict,
})

# %% [markdown]
# ```{glue:figure} c04-fig-roc
# :name: fig:densenet-roc
# :alt: Receiver operating characteristic out of fold with a shaded band, the diagonal of chance and a star at the chosen threshold.
# Receiver operating characteristic out of fold, with a pointwise 95 % band from resampled
# studies. n = {glue:text}`c04-n` {glue:text}`c04-kind` of {glue:text}`c04-n-studies`
# studies, profile {glue:text}`c04-profile`.
# ```
#
# The AUROC is {glue:text}`c04-auroc`. {glue:text}`c04-verdict`
#
# ### Why by study?
#
# Had we drawn images as though each were a patient of its own, we would have counted one spine
# several times and taken that for knowledge. Both ways, on the same probabilities:


# %%
def auroc_of(rows):
    return classification.auroc(y[rows], prob[rows])


by_study = intervals.bootstrap_by_study(auroc_of, scored["study_id"], **draws)
by_image = intervals.bootstrap_by_study(auroc_of, scored["image_id"], **draws)
assert by_study.value == by_image.value and by_study.low == interval.low
print(f"by study {by_study:.3f}\nby image {by_image:.3f}")

# %% [markdown]
# Where the images of a study share label and score, the first is the wider. Where a study holds both
# labels, what its images have in common cancels in the comparison of pairs, and it can be narrower.
#
# No interval of this part of the book knows everything. It tells how the result would vary with other
# films for *these* networks; another seed would have given other networks. So two networks are compared
# as they were trained here, not as architectures.
#
# ### Right and wrong
#
# Numbers do not say what kind of error is made; images do. The rule that picks them is fixed
# beforehand: of each kind of answer, the one that the network was surest of.

# %% tags=["hide-input", "remove-output"]
answers = scored.assign(cached_path=train["cached_path"], lesions=train["lesions"])
show_figure("c04-fig-examples", figures.draw_most_confident(answers, tau))

# %% [markdown]
# ```{glue:figure} c04-fig-examples
# :name: fig:densenet-examples
# :alt: Four spine radiographs. Above, an abnormal one that was found and a normal one left alone. Below, an abnormal one that was missed and a normal one that raised a false alarm.
# The surest out-of-fold answer of each kind, after contrast enhancement; rings mark where lesions
# lie. Out of n = {glue:text}`c04-n` {glue:text}`c04-kind`, profile {glue:text}`c04-profile`.
# ```
#
# Look at {numref}`fig:densenet-examples` before reading on. Would you have seen what was missed, at
# this size and without the rings? Whether the network looked at the lesion at all is a question for a
# later chapter; a probability alone does not tell.

# %% [markdown]
# ## Is anything reused?
#
# Dense connectivity lets every layer read every earlier one; whether it does is
# for training to decide. The 1 × 1 convolution of a layer holds, for each earlier source, the weights
# with which it reads that source, and the normalisation before it scales each source. The mean size
# of their products, after the original paper's heat map {cite}`huang2017`, shows how much attention
# each source gets.


# %%
def reuse(block, first):
    """Mean size of a layer's weights for each source, over the layer's mean."""
    table = np.full((len(block), len(block)), np.nan)
    for target, layer in enumerate(block.values()):
        weight = layer.conv1.weight * layer.norm1.weight.view(1, -1, 1, 1)
        size = weight.detach().abs().mean(dim=(0, 2, 3)).cpu()
        parts = size.split([first] + [32] * target)
        sources = [part.mean() for part in parts]
        table[: target + 1, target] = torch.stack(sources) / size.mean()
    return table


# %%
blocks = network.features
widths_in = {1: 64, 2: 128, 3: 256, 4: 512}
tables = {
    number: reuse(getattr(blocks, f"denseblock{number}"), width)
    for number, width in widths_in.items()
}
assert np.allclose(tables[1][0, 0], 1)  # a first layer has one source

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(2, 2, figsize=(7.2, 6.4))
reach = max(np.nanmax(np.abs(table - 1)) for table in tables.values())
for ax, (number, table) in zip(axes.flat, tables.items(), strict=True):
    shown = ax.imshow(table, cmap="cividis", vmin=1 - reach, vmax=1 + reach)
    ax.set(title=f"block {number}", xlabel="layer that reads", ylabel="source (0: input)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.grid(False)
fig.get_layout_engine().set(wspace=0.08, hspace=0.06)
fig.colorbar(shown, ax=axes, shrink=0.6, label="mean |weight|, relative to the layer's")
show_figure("c04-fig-reuse", fig)
untrained = networks.build_network("densenet121", seed=numbers.seed).features.denseblock4
for key, table in {"after": tables[4], "before": reuse(untrained, widths_in[4])}.items():
    glue(f"c04-reuse-{key}", f"{np.nanmax(table) - np.nanmin(table):.2f}", display=False)

# %% [markdown]
# ```{glue:figure} c04-fig-reuse
# :name: fig:densenet-reuse
# :alt: Four triangular heat maps, one a dense block, of how strongly each layer reads each earlier source.
# How strongly each dense layer reads each earlier source after training, relative to that layer's
# mean: 1 means like any other. The network that held one fold out; n = {glue:text}`c04-n`
# {glue:text}`c04-kind` in all, profile {glue:text}`c04-profile`.
# ```
#
# An untrained network is of one colour but for noise: the values of its fourth block span
# {glue:text}`c04-reuse-before`. After this run's training they span {glue:text}`c04-reuse-after` in
# {numref}`fig:densenet-reuse`. Sources far above 1 are favoured, and a row that stays bright to the
# right is one that many later layers keep reading.

# %% [markdown]
# ## Paper beside ours
#
# Per cent, ours with 95 % intervals. The first column quotes the paper's Table 2, measured on
# 2,078 test images; the second is this run's, out of fold. They were measured on different images
# and answer different questions, so neither is better or worse than the other.

# %% tags=["hide-input"]
compare_with_table_2(numbers, {"out of fold": {"densenet121": scores}}, ("densenet121",))

# %% [markdown]
# The paper prints no interval in its Table 2, starts from ImageNet, and learns for 60 epochs. Our
# threshold was chosen on these very images, so that sensitivity, specificity and F1 look slightly too
# good here; AUROC does not. What else differs stands, with reasons, in {doc}`/book/deviations`.

# %% [markdown]
# ## Exercises
#
# Change the chapter first: set `opened_fold = 1` in the parameters and run all; nothing is trained
# anew. Do two networks that learnt from different films reuse the same sources?
#
# ```{exercise}
# :label: ex:densenet-channels
#
# By hand: the second dense block receives 128 channels and has 12 layers of growth rate 32. How
# many channels leave it, and how many leave the transition after it?
# ```

# %% [markdown]
# ````{solution-start} ex:densenet-channels
# :class: dropdown
# ````
# Twelve layers lay 32 channels each on top of 128: 128 + 12 · 32 = 512. The transition halves
# them to 256, which is what the third block receives.

# %%
assert widths[7] == 128 and widths[7 + 12] == 512 and widths[7 + 12 + 1] == 256

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:densenet-growth
#
# In code: halve the growth rate to $k = 16$, all else equal. By which factor do the parameters
# fall, and why by less or more than two?
# ```

# %% [markdown]
# ````{solution-start} ex:densenet-growth
# :class: dropdown
# ````
# A layer's costs are products of two widths that both shrink with $k$, so the fall is nearer to
# four than to two; the stem and the block inputs, which do not depend on $k$ at first, keep it
# below four.

# %%
thin, _ = count_parameters(k=16)
assert 2 < total / thin < 4
print(f"{total:,} / {thin:,} = {total / thin:.2f}")

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:densenet-mirror
#
# In code: what does averaging over the mirror image change? Compute the AUROC on the opened fold
# without it. Why not on the test split?
# ```

# %% [markdown]
# ````{solution-start} ex:densenet-mirror
# :class: dropdown
# ````
# One forward pass on the image alone. Whether to average is a choice like any other, so it is made
# on held-out images; the test split would turn from a judge into an adviser.

# %%
with torch.no_grad():
    logits = [
        network(networks.as_input(batch.to(blocks.conv0.weight.device)))
        for batch in held_out.pixels.split(16)
    ]
alone = torch.cat(logits).squeeze(1).cpu().numpy()
without = classification.auroc(held_out.y.numpy(), alone)
print(f"AUROC without {without:.3f}, with {by_fold[opened_fold]:.3f}")

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:densenet-epoch
#
# A question to the method: the companion code keeps the epoch with the best AUROC on the test images.
# Let each held-out fold play the part of the test split. How much would that choice add here to
# the last epoch's AUROC, and why could the sum never be negative?
# ```

# %% [markdown]
# ````{solution-start} ex:densenet-epoch
# :class: dropdown
# ````
# The best of several numbers is at least any one of them, also where all epochs are equally good
# and differ by chance alone. What is added is therefore optimism; new images would not show it.

# %%
by_epoch = curves.groupby("fold")["validation_auroc"]
optimism = by_epoch.max() - by_epoch.last()
assert (optimism >= 0).all()
optimism.round(3)

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - A dense layer reads all maps before it and adds a few. Five lines of code equal timm's block, and
#   a sum on paper equals the network's {glue:text}`c04-parameters` parameters.
# - Binary cross-entropy is computed from the logit; its gradient is what was said less what was true.
# - The last epoch counts, every image is scored by a network that never saw it, and the labels of
#   the test split stay sealed.
# - AUROC {glue:text}`c04-auroc` out of fold on {glue:text}`c04-n` {glue:text}`c04-kind`: a number with
#   its interval, drawn by study, and its sample size.
