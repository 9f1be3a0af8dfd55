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
# **You will be able to** build the layer that DenseNet repeats, count the network's parameters on paper, write its
# loss and one step of its optimiser by hand, train it fold by fold to separate normal from abnormal spine
# radiographs, choose a score threshold, and state how uncertain the result is.
#
# **You need** {ref}`chap:imaging` (the images that the network receives) and {ref}`chap:protocol` (which of them it
# may be trained on).
#
# **It takes** half an hour of reading. Training took {glue:text}`c04-train-minutes` minutes, one job after the other;
# a trained network is only loaded from then on.
# :::

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
opened_fold = 0  # the network examined at the end is the one for which this fold was held out

# %% [markdown]
# The set-up opens this run's folder, prepares the data if that has not been done yet, and reads tables, folds and
# enhanced images.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from dernet_utils.book.classifier_chapter import glue_run_facts, show_out_of_fold, show_training
from dernet_utils.book.figures import show_figure, show_radiograph
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.imaging.enhance import load_cached
from dernet_utils.metrics import classification, intervals
from dernet_utils.triage import networks, training
from dernet_utils.triage.crossvalidation import triage_images

# %%
workspace = open_chapter(profile)
numbers = workspace.profile
images = triage_images(workspace)

# %% [markdown]
# ## One question, one number
#
# Triage asks a single question about a radiograph: does it show anything that a radiologist should see soon? The
# network's output is one number, the *logit* $z$, and the logistic function turns it into a probability, $\hat y =
# \sigma(z) = 1 / (1 + e^{-z})$. The label $y$ is 1 if the image has at least one lesion box and 0 if it has none.
# *Which* lesion it is, and *where*, is left to the detector ({ref}`chap:yolo11-training`).
#
# The folds of {ref}`chap:protocol` separate training from validation images. The network is trained once per fold, on
# all *other* folds, so that each training image is scored by a network that was not trained on it. These scores are
# called *out of fold*; thresholds, ensemble weights and calibration are chosen on them. The labels of the test split
# stay sealed until {ref}`chap:ensemble`.
#
# Images of one study show the same spine. If a study were divided between two folds, the network could recognise the
# patient instead of the lesion. So we check that no study is divided, and that the training and test splits share no
# study.

# %%
train = images[images["split"] == "train"]
test = images[images["split"] == "test"]
assert test["label"].isna().all()  # sealed
assert (train.groupby("study_id")["fold"].nunique() == 1).all()
assert not set(train["study_id"]) & set(test["study_id"])
glue_run_facts("c04", workspace, train)
count = {"image_id": "count", "study_id": "nunique", "label": "sum"}
counts = train.groupby("fold").agg(count)
counts.set_axis(["images", "studies", "abnormal images"], axis=1)

# %% [markdown]
# ## The network's input
#
# Enhanced images differ in size and shape; the network needs squares of one size. Each image is resized to
# {glue:text}`c04-px` × {glue:text}`c04-px` pixels without keeping its aspect ratio, as the authors' companion code
# does at 384 × 384. As bytes, hundreds of such images fit in memory, so they are read only once.

# %%
recipe = training.TriageRecipe.of(numbers)
trained_on = train[train["fold"] != opened_fold]
px = recipe.image_px
sample = training.Sample.load(trained_on, px)
assert sample.pixels.shape == (len(trained_on), 1, px, px)
assert sample.pixels.dtype == torch.uint8
recipe

# %% [markdown]
# The networks were designed for colour photographs. They receive a radiograph as three equal channels, each minus
# ImageNet's mean for that channel and divided by its standard deviation. That costs little and lets training start
# from ImageNet weights where a checkpoint is available.

# %%
few = sample.pixels[:4]
x = networks.as_input(few)
red = (few[:, 0] / 255 - networks.IMAGENET_MEAN[0]) / networks.IMAGENET_STD[0]
assert x.shape == (4, 3, px, px)
assert torch.allclose(x[:, 0], red, atol=1e-6)

# %% [markdown]
# Each time an image is used in training it is changed a little: mirrored half of the time, rotated by up to 15
# degrees, made up to 20 % brighter or darker, and its contrast raised or lowered by as much. None of this changes
# the label, so the network should not depend on it.
#
# Rotation interpolates between pixels and so blurs an image. Images at inference are not rotated, and show a small
# osteophyte more sharply than the training images do. Where the recipe's `detail` is 2, a training image is therefore
# rotated at twice the side length and then averaged over blocks of 2 × 2 pixels.

# %%
generator = torch.Generator().manual_seed(numbers.seed)
abnormal_rows = np.flatnonzero(trained_on["label"])
shown = int(abnormal_rows[0])
finer = training.Sample.load(trained_on, recipe.train_px)
augmented = F.avg_pool2d(training.augment(finer.pixels[[shown] * 5], generator), recipe.detail)
assert augmented.shape == (5, 1, px, px)
assert augmented.min() >= 0 and augmented.max() <= 1

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(2, 3, figsize=(7.2, 5.6))
enhanced = load_cached(trained_on["cached_path"].iloc[shown])
show_radiograph(axes[0, 0], enhanced, f"enhanced, {enhanced.shape[0]} × {enhanced.shape[1]} px")
show_radiograph(axes[0, 1], sample.pixels[shown, 0].numpy(), "resized to a square")
for number, ax in enumerate(axes.flat[2:]):
    show_radiograph(ax, augmented[number, 0].numpy() * 255, f"augmented, {number + 1}")
show_figure("c04-fig-input", fig)

# %% [markdown]
# ```{glue:figure} c04-fig-input
# :name: fig:densenet-input
# :alt: A spine radiograph in its own proportions, squeezed into a square, and four copies of the square that are
# :  mirrored, rotated, brightened or reduced in contrast.
# The input of DenseNet121: one of n = {glue:text}`c04-n` {glue:text}`c04-kind`, its square of {glue:text}`c04-px` px,
# and four augmented images as training draws them. Profile {glue:text}`c04-profile`.
# ```
#
# In {numref}`fig:densenet-input` the square is distorted, and the corners that a rotation uncovers are black, like
# the collimated margin of a radiograph. The vertebrae and their lesions stay recognisable.
#
# ### Crops first
#
# Whole radiographs are hard for a network that starts from random weights: the label says that *something* is
# abnormal, and a lesion may fill a hundredth of the square. Where the recipe sets `crop_epochs`, training therefore
# starts with epochs on crops. Half of the crops contain a lesion of a training radiograph, with rare classes drawn
# more often than they occur; the other half come from normal radiographs, at positions where other radiographs have
# lesions, so that position alone carries no information. All three networks can be trained on crops and then on whole
# radiographs without a change, since they average over an area of any size. The paper's protocol, and with it the
# profile `paper`, has no such epochs: its networks start from ImageNet weights.

# %%
side = recipe.crop_px * recipe.detail
crops, is_lesion = training.draw_crops(finer, 24, side, generator)
assert crops.shape == (24, 1, side, side)
assert is_lesion.tolist() == [1] * 12 + [0] * 12
kinds = sample.lesions[:, 3].long()
chance = torch.bincount(kinds)[kinds].float().rsqrt()  # a lesion's weight when crops are drawn
fraction = torch.bincount(kinds, chance) / chance.sum()
occurs = torch.bincount(kinds) / len(kinds)
assert fraction[occurs > 0].min() >= occurs[occurs > 0].min()

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(2, 6, figsize=(7.2, 2.9))
rows = [*range(6), *range(12, 18)]
for ax, row in zip(axes.flat, rows, strict=True):
    show_radiograph(ax, F.avg_pool2d(crops[row].float(), recipe.detail)[0].numpy())
for ax, word in zip(axes[:, 0], ("lesion", "normal"), strict=True):
    ax.set_title(word, fontsize=9, loc="left")
show_figure("c04-fig-crops", fig)
glue_values("c04", {"crop-px": recipe.crop_px, "crop-epochs": recipe.crop_epochs})

# %% [markdown]
# ```{glue:figure} c04-fig-crops
# :name: fig:crops
# :alt: Two rows of six small square crops of spine radiographs, the upper row with a lesion each, the lower from
# :  normal radiographs.
# Crops of {glue:text}`c04-crop-px` px, above with a lesion, below from normal radiographs. This run's recipe has
# {glue:text}`c04-crop-epochs` epochs of them. n = {glue:text}`c04-n` {glue:text}`c04-kind`, profile
# {glue:text}`c04-profile`.
# ```
#
# Could you tell the rows of {numref}`fig:crops` apart? At this size many findings differ from normal anatomy by only
# a few grey levels. This is one reason why a network learns little from the label of a whole radiograph.

# %% [markdown]
# ## Dense connectivity
#
# A plain convolutional network is a chain: each layer receives only the output of the layer before it, and an edge
# detected early must be passed on by every layer in between if a later layer is to use it. A *dense block* instead
# gives every layer all earlier feature maps {cite}`huang2017`:
#
# $$
# \mathbf{x}_\ell = H_\ell\big([\mathbf{x}_0, \mathbf{x}_1, \dots, \mathbf{x}_{\ell-1}]\big).
# $$ (eq:dense)
#
# The brackets concatenate maps along the channel axis. $H_\ell$ is batch normalisation, ReLU and a 1 × 1 convolution
# that reduces whatever number of channels it receives to 128, then batch normalisation, ReLU and a 3 × 3 convolution
# that adds only $k = 32$ new maps, the *growth rate*. Since no layer has to compute again what an earlier one has
# computed, layers can be narrow. This is the *feature reuse* for which the paper includes the network in its
# ensemble.
#
# Three functions are enough to implement {eq}`eq:dense`.


# %%
def batch_norm(x, norm):
    """Normalise by the running mean and variance, then scale and shift."""
    shape = (1, -1, 1, 1)
    mean, variance = norm.running_mean.view(shape), norm.running_var.view(shape)
    x = (x - mean) / torch.sqrt(variance + norm.eps)
    return x * norm.weight.view(shape) + norm.bias.view(shape)


def dense_layer(x, layer):
    """H: to 128 channels by 1 x 1, to 32 new ones by 3 x 3."""
    x = F.relu(batch_norm(x, layer.norm1))
    x = F.conv2d(x, layer.conv1.weight)
    x = F.relu(batch_norm(x, layer.norm2))
    return F.conv2d(x, layer.conv2.weight, padding=1)


def dense_block(x, layers):
    """Each layer receives all maps so far and appends its own."""
    for layer in layers:
        x = torch.cat([x, dense_layer(x, layer)], dim=1)
    return x


# %% [markdown]
# Do they compute the same as the real network? We build DenseNet121 with `timm`, pass four radiographs through it
# once in training mode, so that its running means and variances are no longer 0 and 1, and then compare its first
# dense block with ours. The outputs agree. Sixty-four channels went in, six layers appended 32 each, and 256 came
# out; the first 64 of them are the input, unchanged.

# %%
network = networks.build_network("densenet121", seed=numbers.seed)
with torch.no_grad():
    network.train()(x)
    network.eval()
    features = network.features
    x0 = features.pool0(features.norm0(features.conv0(x)))
    by_timm = features.denseblock1(x0)
    by_hand = dense_block(x0, features.denseblock1.values())
    first = features.denseblock1.denselayer1
    first_layer = dense_layer(x0, first)
    normed, shared = batch_norm(x0, first.norm1), networks.batch_norm(x0, first.norm1)
assert torch.allclose(by_hand, by_timm, atol=1e-4)
assert torch.allclose(normed, shared, atol=1e-4)
assert by_hand.shape[1] == 64 + 6 * 32
assert torch.equal(by_hand[:, :64], x0)
assert torch.allclose(by_hand[:, 64:96], first_layer, atol=1e-4)
x0.shape, by_hand.shape

# %% [markdown]
# ### Counting the weights
#
# DenseNet121 has four such blocks of 6, 12, 24 and 16 layers. Between two blocks a *transition* halves the channels
# by a 1 × 1 convolution and the side of the maps by pooling. A batch normalisation has two parameters per channel; a
# convolution from $c$ to $d$ channels with a window of side $s$ has $cds^2$.


# %%
def layer_parameters(c, k):
    """Parameters of a dense layer with c channels before it and growth rate k."""
    squeeze = 2 * c + c * 4 * k
    grow = 2 * 4 * k + 4 * k * k * 3**2
    return squeeze + grow


def count_parameters(k=32, blocks=(6, 12, 24, 16), c=64):
    """Parameters of a DenseNet with one logit, and the channels on the way."""
    total, widths = 3 * c * 7**2 + 2 * c, [c]
    for number, layers in enumerate(blocks):
        if number:  # preceded by a transition
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
of_resnet = total / parameters_of(networks.build_network("resnet50"))
print(f"{total:,}, {of_resnet:.0%} of ResNet50")

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(7.2, 3))
ax.step(range(len(widths)), widths, where="mid", color="black", lw=1.2)
starts = np.cumsum([0, 7, 13, 25])
for number, start, layers in zip((1, 2, 3, 4), starts, (6, 12, 24, 16), strict=True):
    ax.axvspan(start, start + layers, color="0.9" if number % 2 else "0.8", zorder=0)
    ax.text(start + layers / 2, 1080, f"block {number}", ha="center", fontsize=9)
ax.set(xlabel="dense layer or transition, from input to output", ylabel="channels", ylim=(0, 1180))
show_figure("c04-fig-widths", fig)
glue_values("c04", {"parameters": f"{total:,}", "share": f"{of_resnet:.0%}"})

# %% [markdown]
# ```{glue:figure} c04-fig-widths
# :name: fig:densenet-widths
# :alt: A staircase of channels that rises by 32 per layer within each of four blocks and falls to half between them,
# :  ending at 1,024.
# Channels along DenseNet121, counted by hand: each layer adds 32, each transition halves their number. The
# architecture does not depend on data or profile.
# ```
#
# The number counted by hand, {glue:text}`c04-parameters`, equals that of timm's network and is {glue:text}`c04-share`
# of ResNet50's. {numref}`fig:densenet-widths` shows why it stays small: a layer adds 32 channels, while a layer of
# ResNet50 computes up to 2,048 anew.
#
# ### Operations and receptive field
#
# The cost of an image is counted in floating-point operations: a multiplication and an addition for each weight of a
# convolution at each position of its output. The *receptive field* is the part of the image on which one output can
# depend. A window of side $s$ enlarges it by $s - 1$ steps, and a step is as many pixels as the product of all
# strides before it. Along the longest path of DenseNet121:

# %%
block_of = [[(1, 1), (3, 1)] * layers for layers in (6, 12, 24, 16)]
transition = [(1, 1), (2, 2)]
way = [(7, 2), (3, 2), *block_of[0]]
for block in block_of[1:]:
    way += transition + block
reach = networks.receptive_field(way)
operations = networks.count_operations(network, px)
half = networks.count_operations(network, px // 2)
assert 3.5 < operations / half < 4.5  # half the side, a quarter of the positions
glue_values("c04", {"reach": f"{reach:,}", "operations": f"{operations / 1e9:.1f}"})
reach, operations

# %% [markdown]
# One image takes {glue:text}`c04-operations` billion operations at {glue:text}`c04-px` × {glue:text}`c04-px` px, and
# the receptive field is {glue:text}`c04-reach` px wide: each output could depend on the whole radiograph. This is an
# upper bound: pixels near its edge contribute along few paths only.

# %% [markdown]
# (sec:algorithm-1-phase-1)=
# ## The loss and the step
#
# Phase I of the paper's Algorithm 1 takes seven lines. Lines 1 and 7 loop over the three networks; this chapter is
# $m$ = DenseNet121. Line 2 starts from ImageNet; lines 3 and 6 repeat until training ends; lines 4 and 5 are the
# training step. Line 4 is the binary cross-entropy,
#
# $$
# \mathcal{L}_{CE} = -\sum_i \big[\, y_i \log \hat y_i + (1 - y_i) \log (1 - \hat y_i) \,\big].
# $$ (eq:bce)
#
# It is $-\log$ of the probability given to the true class: zero for a prediction that is certain and correct,
# unbounded for one that is certain and wrong. Computed as written, it fails where $\hat y$ rounds to 0 or 1. Written
# with the logit, $\log(1 + e^{-|z|}) + \max(z, 0) - yz$, it has the same value and never overflows.

# %%
z = torch.tensor([-3.0, -0.5, 0.2, 4.0], requires_grad=True)
y = torch.tensor([0.0, 1.0, 1.0, 0.0])
y_hat = 1 / (1 + torch.exp(-z))
line_4 = -(y * torch.log(y_hat) + (1 - y) * torch.log(1 - y_hat)).sum()
stable = (torch.log1p(torch.exp(-z.abs())) + z.clamp(min=0) - y * z).sum()
by_torch = F.binary_cross_entropy_with_logits(z, y, reduction="sum")
assert torch.isclose(line_4, by_torch) and torch.isclose(stable, by_torch)

# %% [markdown]
# Training uses the mean over a batch instead of the sum, so that the gradient does not grow with the batch size. The
# gradient of the sum is simple, predicted minus true: $\partial \mathcal{L}/\partial z_i = \hat y_i - y_i$. It is
# zero where prediction and label are equal.

# %%
by_torch.backward()
assert torch.allclose(z.grad, (y_hat - y).detach())
extreme = F.binary_cross_entropy_with_logits(torch.tensor([200.0]), torch.tensor([0.0]))
assert extreme == 200  # where log(1 - 1) would be minus infinity

# %% [markdown]
# Line 5 moves every weight against its gradient $g$ by AdamW {cite}`loshchilov2019`. It keeps a running mean $m$ of
# the gradient and $v$ of its square, corrects both for their start at zero, and shrinks each weight a little
# (weight decay):
#
# $$
# \theta \leftarrow \theta - \eta \Big( \lambda \theta +
# \frac{\hat m}{\sqrt{\hat v} + \epsilon} \Big), \qquad
# \hat m = \frac{m}{1 - \beta_1^t}, \quad \hat v = \frac{v}{1 - \beta_2^t}.
# $$ (eq:adamw)
#
# Two steps by hand, on two weights with the loss $\theta_1^2 + 3\theta_2^2$, compared with torch's:

# %%
eta, lam, beta_1, beta_2, epsilon = recipe.lr, training.WEIGHT_DECAY, 0.9, 0.999, 1e-8
theta, m, v = np.array([1.0, -2.0]), 0, 0
for t in (1, 2):
    g = np.array([2, 6]) * theta
    m, v = beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g**2
    m_hat, v_hat = m / (1 - beta_1**t), v / (1 - beta_2**t)
    theta = theta - eta * (lam * theta + m_hat / (np.sqrt(v_hat) + epsilon))

weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
optimizer = torch.optim.AdamW([weight], lr=eta, weight_decay=lam)
for _ in range(2):
    optimizer.zero_grad()
    (weight[0] ** 2 + 3 * weight[1] ** 2).backward()
    optimizer.step()
assert np.allclose(weight.detach().numpy(), theta, rtol=1e-12)

# %% [markdown]
# The learning rate follows half a cosine from the recipe's value $\eta_{max}$ to zero, large steps first and small
# ones at the end: $\eta_t = \eta_{max} \tfrac12 (1 + \cos (\pi t / N))$, where $t$ is how many of $N$ epochs are
# completed, those on crops included. When training turns to whole radiographs, the network has already been trained
# on lesions, and small steps change what it has learnt less than large ones would.

# %% [markdown]
# ## Training, fold by fold
#
# {glue:text}`c04-start` All epochs are run and the last one counts. The companion code instead keeps the epoch that
# is best on the test images ({numref}`ex:densenet-epoch`). The held-out fold is scored from the last epoch on crops
# to the end, for the learning curve only; no choice depends on it.
#
# `show_training`, which the next two chapters call too, trains once for each of {glue:text}`c04-folds` folds and
# draws the learning curves. A network and a fold are one job, named by a digest of images, labels, numbers and code.
# A finished job is loaded, an interrupted one resumes after its last finished epoch, and a cluster can run all jobs
# in parallel.

# %% tags=["remove-output"]
found, last_epochs = show_training("c04", workspace, "densenet121")

# %%
curves, scored = found.curves, found.out_of_fold
epochs = recipe.crop_epochs + recipe.epochs
assert (curves.groupby("fold")["epoch"].max() == epochs).all()
assert scored["image_id"].tolist() == train["image_id"].tolist()  # each image, once
glue_values("c04", {"epochs": epochs})
last_epochs

# %% [markdown]
# ```{glue:figure} c04-fig-curve
# :name: fig:densenet-curve
# :alt: Two panels over epochs, a colour per fold. Left, the loss on training images and on held-out ones. Right, the
# :  AUROC on the held-out fold.
# Learning curves over {glue:text}`c04-epochs` epochs and {glue:text}`c04-folds` folds; epochs on crops lie on grey.
# Held-out losses above 1.5 are cut off. n = {glue:text}`c04-n` {glue:text}`c04-kind`, profile
# {glue:text}`c04-profile`.
# ```
#
# In {numref}`fig:densenet-curve` the training loss is measured with augmentation and while the weights change, on
# crops as long as these are used; the held-out loss is that of whole radiographs at the end of the epoch. Held-out
# losses may jump in early epochs: in evaluation mode batch normalisation uses running means, which lag behind the
# weights and, during epochs on crops, are those of crops.

# %% [markdown]
# ## The threshold, chosen out of fold
#
# A probability becomes a decision by a score threshold $\tau$: abnormal where $\hat y > \tau$, the $\tau_{optimal}$
# of line 17 in Algorithm 1. The paper does not say how it was found. We take Youden's, the $\tau$ with the largest
# sensitivity + specificity − 1 out of fold {cite}`youden1950`. The probability is the mean over the image and its
# mirror image.
#
# Sensitivity is the fraction of abnormal images that are called abnormal, specificity the fraction of normal ones
# that are called normal. To check the search, we also try every distinct probability as a threshold.

# %%
y, prob = scored["label"].to_numpy(), scored["prob"].to_numpy()
tau = classification.youden_threshold(y, prob)
glue_values("c04", {"tau": f"{tau:.2f}"})


def youden(threshold):
    point = classification.operating_point(y, prob, threshold)
    return point["sensitivity"] + point["specificity"] - 1


best = max(youden(threshold) for threshold in prob)
assert youden(tau) >= best - 1e-9

network, _ = training.load_network("densenet121", found.checkpoints[opened_fold], recipe)
held_out = training.Sample.load(train[train["fold"] == opened_fold], px)
mirrored = networks.predict_probabilities(network, held_out.pixels[:8].flip(-1))
assert np.allclose(mirrored, prob[scored["fold"] == opened_fold][:8], atol=1e-4)

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
# :alt: Histogram of the out-of-fold probabilities of normal and abnormal images, with a vertical line at the
# :  threshold.
# Out-of-fold probabilities by label, and Youden's threshold $\tau$ = {glue:text}`c04-tau`. n = {glue:text}`c04-n`
# {glue:text}`c04-kind`, profile {glue:text}`c04-profile`.
# ```
#
# Where the two groups of bars in {numref}`fig:densenet-threshold` overlap, every threshold makes errors. A threshold
# chosen on these images looks slightly too good on them. How good it really is can be seen only on images that played
# no part in the choice: those of the test split.

# %% [markdown]
# ## Performance, with intervals
#
# AUROC needs no threshold: it is the probability that an abnormal image scores higher than a normal one.

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
# Each interval comes from {glue:text}`c04-bootstrap` resamples. In each, whole *studies* are drawn with replacement
# until there are as many as before, and the metric is computed again; the interval leaves out the lowest and the
# highest 2.5 %. Where a resample contains one class only, AUROC is undefined; such resamples are left out and
# counted. The scores of all folds are pooled, although each fold has its own network, whose probabilities may be a
# little higher or lower. So we also compute each fold's AUROC.

# %%
by_fold = {
    fold: classification.auroc(rows["label"].to_numpy(), rows["prob"].to_numpy())
    for fold, rows in scored.groupby("fold")
}
assert set(by_fold) == set(range(numbers.folds))
by_fold | {"pooled": interval.value}

# %% [markdown]
# `show_out_of_fold` does all of this in one call, in the next two chapters too, and draws the figures below. It must
# agree with our steps.

# %% tags=["remove-output"]
results = show_out_of_fold("c04", workspace, found, train)
assert results.threshold == tau and results.scores.equals(scores)
verdict = (
    "The whole interval lies above one half: the network ranks images better than chance."
    if interval.low > 0.5
    else "The interval reaches one half: this run does not show more than chance."
)
glue_values("c04", {"bootstrap": f"{numbers.bootstrap:,}", "verdict": verdict})

# %% [markdown]
# ```{glue:figure} c04-fig-roc
# :name: fig:densenet-roc
# :alt: Receiver operating characteristic out of fold with a shaded band, the diagonal of chance and a star at the
# :  chosen threshold.
# Receiver operating characteristic out of fold, with a pointwise 95 % band from resampled studies. n =
# {glue:text}`c04-n` {glue:text}`c04-kind` of {glue:text}`c04-n-studies` studies, profile {glue:text}`c04-profile`.
# ```
#
# The AUROC is {glue:text}`c04-auroc`. {glue:text}`c04-verdict`
#
# ### Why by study?
#
# Resampling images as though each came from a different patient would treat several images of one spine as
# independent evidence. Here are both intervals for the same probabilities:


# %%
def auroc_of(rows):
    return classification.auroc(y[rows], prob[rows])


by_study = intervals.bootstrap_by_study(auroc_of, scored["study_id"], **draws)
by_image = intervals.bootstrap_by_study(auroc_of, scored["image_id"], **draws)
assert by_study.value == by_image.value and by_study.low == interval.low
print(f"by study {by_study:.3f}\nby image {by_image:.3f}")

# %% [markdown]
# Where the images of a study have similar labels and scores, the interval by study is wider. Where a study contains
# both labels, what its images have in common cancels in the comparison of pairs, and the interval can be narrower.
#
# No interval here covers every source of variation. Each shows how the result of *these* networks would vary with
# other radiographs; another seed would have given other networks. So we compare two networks as they were trained
# here, not two architectures.
#
# ### Right and wrong predictions
#
# Metrics do not show on which images a network errs, so we look at examples. The rule that selects them is fixed
# beforehand: the most confident prediction of each outcome.
#
# ```{glue:figure} c04-fig-examples
# :name: fig:densenet-examples
# :alt: Four spine radiographs. Above, an abnormal one that was found and a normal one that was called normal. Below,
# :  an abnormal one that was missed and a normal one that was called abnormal.
# The most confident out-of-fold prediction of each outcome, after contrast enhancement; rings mark lesions. Out of
# n = {glue:text}`c04-n` {glue:text}`c04-kind`, profile {glue:text}`c04-profile`.
# ```
#
# In {numref}`fig:densenet-examples`, would you have seen the missed lesion at this size and without the rings? A
# probability alone does not show whether the network used the lesion at all; {ref}`chap:explainability` examines
# that.

# %% [markdown]
# ## Is anything reused?
#
# Dense connectivity lets every layer use the output of every earlier one; training decides whether it does. The 1 × 1
# convolution of a layer has weights for each earlier source, and the normalisation before it scales each source. The
# mean magnitude of their products shows how strongly each source is used, after a heat map of the original paper
# {cite}`huang2017`.


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
    ax.set(title=f"block {number}", xlabel="layer", ylabel="source (0: input)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.grid(False)
fig.get_layout_engine().set(wspace=0.08, hspace=0.06)
fig.colorbar(shown, ax=axes, shrink=0.6, label="mean |weight|, relative to the layer's")
show_figure("c04-fig-reuse", fig)
untrained = networks.build_network("densenet121", seed=numbers.seed).features.denseblock4
spans = {"reuse-after": tables[4], "reuse-before": reuse(untrained, widths_in[4])}
glue_values("c04", {key: f"{np.nanmax(table) - np.nanmin(table):.2f}" for key, table in spans.items()})

# %% [markdown]
# ```{glue:figure} c04-fig-reuse
# :name: fig:densenet-reuse
# :alt: Four triangular heat maps, one per dense block, of how strongly each layer uses each earlier source.
# How strongly each dense layer uses each earlier source after training, relative to that layer's mean, which is 1.
# The network for which one fold was held out; n = {glue:text}`c04-n` {glue:text}`c04-kind` in all, profile
# {glue:text}`c04-profile`.
# ```
#
# The map of an untrained network is uniform except for noise: the values of its fourth block span
# {glue:text}`c04-reuse-before`. After this run's training they span {glue:text}`c04-reuse-after` in
# {numref}`fig:densenet-reuse`. Values far above 1 mark sources that a layer favours. A row that stays bright to the
# right is a source that many later layers use.

# %% [markdown]
# ## Paper beside ours
#
# In per cent, ours with 95 % intervals. The first column quotes the paper's Table 2, measured on 2,078 test images;
# the second is this run's, out of fold. They were measured on different images and cannot be compared: neither is
# better or worse than the other.

# %% tags=["hide-input"]
results.beside_paper

# %% [markdown]
# The paper prints no interval in its Table 2, starts from ImageNet, and trains for 60 epochs. Our threshold was
# chosen on these same images, so sensitivity, specificity and F1 look slightly too good here; AUROC does not depend
# on it. {doc}`/book/deviations` lists what else differs, with reasons.

# %% [markdown]
# ## Exercises
#
# First change the chapter: set `opened_fold = 1` in the parameters and run all cells; nothing is trained again. Do
# two networks trained on different radiographs reuse the same sources?
#
# ```{exercise}
# :label: ex:densenet-channels
#
# By hand: the second dense block receives 128 channels and has 12 layers of growth rate 32. How many channels leave
# it, and how many leave the transition after it?
# ```

# %% [markdown]
# ````{solution-start} ex:densenet-channels
# :class: dropdown
# ````
# Twelve layers append 32 channels each to 128: 128 + 12 · 32 = 512. The transition halves them to 256, which is what
# the third block receives.

# %%
assert widths[7] == 128 and widths[7 + 12] == 512 and widths[7 + 12 + 1] == 256

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:densenet-growth
#
# In code: halve the growth rate to $k = 16$, all else equal. By what factor does the number of parameters fall, and
# why is it not two?
# ```

# %% [markdown]
# ````{solution-start} ex:densenet-growth
# :class: dropdown
# ````
# The number of weights of a layer is a product of two widths that both shrink with $k$, so the factor is nearer to
# four than to two. The stem and its 64 channels, which do not depend on $k$, keep it below four.

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
# In code: what does averaging over the mirror image change? Compute the AUROC on the opened fold without it. Why
# should you not do this on the test split?
# ```

# %% [markdown]
# ````{solution-start} ex:densenet-mirror
# :class: dropdown
# ````
# It takes one forward pass on the image alone. Whether to average is a choice like any other, so it is made on
# held-out images. A test split that guides choices no longer measures performance on unseen images.

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
# A question about the method: the companion code keeps the epoch with the best AUROC on the test images. Use each
# held-out fold in place of the test split. How much would that choice add here to the last epoch's AUROC, and why can
# the difference never be negative?
# ```

# %% [markdown]
# ````{solution-start} ex:densenet-epoch
# :class: dropdown
# ````
# The maximum of several numbers is at least as large as each of them, even where all epochs are equally good and
# differ by chance alone. Such a gain is optimism; new images would not show it.

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
# - A dense layer receives all maps before it and adds a few. Three short functions compute the same as timm's block,
#   and a count on paper gives the network's {glue:text}`c04-parameters` parameters.
# - Binary cross-entropy is computed from the logit; its gradient is predicted minus true.
# - The last epoch counts, every training image is scored by a network that was not trained on it, and the labels of
#   the test split stay sealed.
# - AUROC {glue:text}`c04-auroc` out of fold on {glue:text}`c04-n` {glue:text}`c04-kind`: a number with its interval,
#   resampled by study, and its sample size.
