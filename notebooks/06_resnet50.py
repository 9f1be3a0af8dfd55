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
# (chap:resnet50)=
# # 06 · ResNet50
#
# :::{admonition} In this chapter
# **You will be able to** build the bottleneck of ResNet50, show by an experiment why very deep chains are hard to
# train without skip connections, remove whole blocks from a trained network and measure the effect, and evaluate the
# network out of fold.
#
# **You need** {ref}`chap:densenet121`, for the loss, the training step, the folds and the threshold.
#
# **It takes** twenty minutes of reading. In this run, training took {glue:text}`c06-train-minutes` minutes, one job
# after the other.
# :::

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
shown_fold = 0  # blocks are removed from the network for which this fold was held out

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from dernet_utils.book.classifier_chapter import glue_run_facts, show_out_of_fold, show_training
from dernet_utils.book.figures import show_figure
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core import machine
from dernet_utils.metrics import classification, intervals
from dernet_utils.triage import networks, training
from dernet_utils.triage.crossvalidation import triage_images
from dernet_utils.triage.networks import batch_norm

# %%
workspace = open_chapter(profile)
numbers = workspace.profile
images = triage_images(workspace)
train = images[images["split"] == "train"]
recipe = training.TriageRecipe.of(numbers)
sample = training.Sample.load(train, recipe.image_px)
network = networks.build_network("resnet50", seed=numbers.seed)
glue_run_facts("c06", workspace, train)

# %% [markdown]
# ## The skip connection
#
# More layers should not make a network worse: a deeper one could copy a shallower one and let its other layers do
# nothing. In practice deep plain chains got *worse*, even on the images that they were trained on {cite}`he2016`. To
# do nothing, a plain layer has to learn the identity, which is hard. For a residual block it is easy:
#
# $$
# \mathbf{x}_{\ell+1} = \mathrm{ReLU}\big(\mathbf{x}_\ell + F_\ell(\mathbf{x}_\ell)\big).
# $$ (eq:residual)
#
# The block has to learn only a *change* to its input; the input itself bypasses it through the *skip connection*.
# When the gradient of the loss is propagated back to $\mathbf{x}_\ell$, the sum passes it on undiminished: $\partial
# \mathbf{x}_{\ell+1} / \partial \mathbf{x}_\ell = I + \partial F / \partial \mathbf{x}_\ell$ (where ReLU is active).
# A product of many such factors always contains the term $I \cdot I \cdots I$, which does not depend on any weight.
# The exceptions are the four blocks that have a 1 × 1 convolution on the skip connection, because the shape of the
# maps changes there.
#
# ### The bottleneck by hand
#
# In ResNet50 $F$ consists of three convolutions: 1 × 1 down to a quarter of the channels, 3 × 3 at that width, and 1
# × 1 up again, each with batch normalisation as in {ref}`chap:densenet121`. As there, we compare our block with
# timm's after one pass in training mode.


# %%
def bottleneck(x, block):
    """Narrow, combine neighbours, widen, add the input."""
    out = F.relu(batch_norm(F.conv2d(x, block.conv1.weight), block.bn1))
    out = F.relu(batch_norm(F.conv2d(out, block.conv2.weight, padding=1), block.bn2))
    return F.relu(x + batch_norm(F.conv2d(out, block.conv3.weight), block.bn3))


x = networks.as_input(sample.pixels[:4])
with torch.no_grad():
    network.train()(x)
    network.eval()
    block = network.layer1[1]
    stem = network.maxpool(network.act1(network.bn1(network.conv1(x))))
    x1 = network.layer1[0](stem)
    assert torch.allclose(bottleneck(x1, block), block(x1), atol=1e-4)
x1.shape

# %% [markdown]
# Where training starts from random weights, the last scale $\gamma$ of a block determines how much of its change is
# added at first. At zero, timm's choice for ResNet, 12 of the 16 blocks at first only pass on their input, and gain
# influence during training {cite}`goyal2017`. This book starts the residual blocks of ResNet50 and EfficientNetV2-S at
# one half. The choice rests on unrecorded pilot runs on another virtual cohort, one seed each: one half had a higher
# AUROC than zero, and than one for EfficientNetV2-S, on images not used for training ({ref}`sec:chosen`). So few runs
# do not show which value is best.

# %%
fresh = networks.build_network("resnet50", seed=numbers.seed)
assert all(one.bn3.weight.eq(0.5).all() for stage in (fresh.layer1, fresh.layer4) for one in stage)

# %% [markdown]
# ### Counting
#
# A block that narrows from $c$ channels to $c/4$ and widens again has $c \cdot c/4 + 9 (c/4)^2 + c/4 \cdot c = 17 c^2
# / 16$ weights in its convolutions; two full 3 × 3 convolutions would have $18 c^2$. The difference is what the
# bottleneck saves. The stages have 3, 4, 6 and 3 blocks. The first block of each stage also has a 1 × 1 convolution
# on its skip connection, since the number of channels changes there.


# %%
def count_parameters():
    """Parameters of ResNet50 with one logit."""
    total, c = 3 * 64 * 7**2 + 2 * 64, 64
    for width, blocks in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        for number in range(blocks):
            total += c * width + 9 * width**2 + width * 4 * width
            total += 2 * (width + width + 4 * width)
            if not number:
                total += c * 4 * width + 2 * 4 * width
            c = 4 * width
    return total + c + 1


total = sum(parameter.numel() for parameter in network.parameters())
assert count_parameters() == total
total

# %% [markdown]
# We compute operations and receptive field as for DenseNet121 and compare the two networks:

# %%
way = [(7, 2), (3, 2)]
for stage, blocks in enumerate((3, 4, 6, 3)):
    way += [(3, 2 if stage and not block else 1) for block in range(blocks)]
reach = networks.receptive_field(way)
operations = networks.count_operations(network, recipe.image_px)
other = networks.build_network("densenet121")
other_way = [(7, 2), (3, 2)]
for layers in (6, 12, 24, 16):
    other_way += [(3, 1)] * layers + [(2, 2)] * (layers != 16)
assert total > 3 * sum(parameter.numel() for parameter in other.parameters())
assert operations > networks.count_operations(other, recipe.image_px)
assert reach < networks.receptive_field(other_way)
reach, operations

# %% tags=["remove-cell"]
glue_values("c06", {
    "parameters": f"{total:,}",
    "reach": f"{reach:,}",
    "operations": f"{operations / 1e9:.1f}",
})

# %% [markdown]
# ResNet50 has {glue:text}`c06-parameters` parameters, {glue:text}`c06-operations` billion operations at
# {glue:text}`c06-px` px, and a receptive field of {glue:text}`c06-reach` px. It has more weights, more operations and
# a smaller receptive field than DenseNet121, whose longest path has many more windows.

# %% [markdown]
# ## An experiment: the same depth with and without skip connections
#
# Take a chain of 48 layers $\tanh(W\mathbf{x})$ with random weights, once plain and once with each layer's input
# added to its output, and measure the size of the gradient at each layer. If each layer shrinks the gradient by some
# factor, the plain chain shrinks it by that factor to the power of its depth. In the other chain each layer's output
# is divided by the depth before the input is added to it; otherwise the gradient would grow. In ResNet50, the
# normalisation within each block and the 1 × 1 convolution at the start of each stage limit this growth.


# %%
def gradient_sizes(around, depth=48, width=64, gain=0.9):
    """Size of the loss's gradient at each layer's input, over that at the last."""
    generator = torch.Generator().manual_seed(numbers.seed)
    state = torch.randn(32, width, generator=generator, requires_grad=True)
    states = [state]
    for _ in range(depth):
        weight = gain * torch.randn(width, width, generator=generator) / width**0.5
        change = torch.tanh(states[-1] @ weight)
        states.append(states[-1] + change / depth if around else change)
        states[-1].retain_grad()
    states[-1].sum().backward()
    return np.array([float(each.grad.norm()) for each in states]) / float(states[-1].grad.norm())


plain, residual = gradient_sizes(around=False), gradient_sizes(around=True)
assert plain[0] < 1e-2 and 0.1 < residual[0] < 10

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(7.2, 2.8))
ax.semilogy(residual, "-", label="with the input added")
ax.semilogy(plain, "--", label="plain")
ax.set(xlabel="layer, from input to output", ylabel="gradient, relative to the last")
ax.legend(fontsize=8)
show_figure("c06-fig-gradient", fig)

# %% [markdown]
# ```{glue:figure} c06-fig-gradient
# :name: fig:residual-gradient
# :alt: Size of the gradient by layer on a logarithmic scale. With the input added it stays near one, in the plain
# :  chain it falls by several powers of ten towards the input.
# Size of the gradient at each layer of two untrained chains of 48 layers with the same random weights; where the
# input is added, each layer's output is divided by 48. The experiment does not depend on data or profile.
# ```
#
# In {numref}`fig:residual-gradient` the first layers of the plain chain receive almost no gradient, so they learn
# almost nothing from it. Practical networks also normalise, which preserves the size of the gradient in plain chains
# too; the skip connection preserves it even without normalisation.

# %% [markdown]
# ## Training, fold by fold
#
# Loss, step, augmentation, crops and folds are those of {ref}`chap:densenet121`; only the network differs, and
# `show_training` does the work. {glue:text}`c06-start` Networks that the run has already trained are loaded; missing
# ones are trained now.

# %% tags=["remove-output"]
found, last_epochs = show_training("c06", workspace, "resnet50")

# %%
last_epochs

# %% [markdown]
# ```{glue:figure} c06-fig-curve
# :name: fig:resnet-curve
# :alt: Two panels over epochs, a colour per fold. Left, the loss on training images and on held-out ones. Right, the
# :  AUROC on the held-out fold.
# Learning curves of ResNet50 over {glue:text}`c06-folds` folds; epochs on crops lie on grey. Held-out losses above
# 1.5 are cut off. n = {glue:text}`c06-n` {glue:text}`c06-kind`, profile {glue:text}`c06-profile`.
# ```
#
# Compare with {numref}`fig:densenet-curve`: does this network, with more than three times the parameters, overfit
# earlier in {numref}`fig:resnet-curve`? Overfitting shows as a held-out loss that rises while the training loss
# falls.

# %% [markdown]
# ## Performance, with intervals
#
# The threshold is Youden's and the intervals are by study, both out of fold, as in {ref}`chap:densenet121`. Since the
# threshold was chosen on these same images, sensitivity, specificity and F1 look slightly too good here; AUROC does
# not depend on it.

# %% tags=["remove-output"]
results = show_out_of_fold("c06", workspace, found, train)

# %%
scored, y, prob, scores = found.out_of_fold, results.y, results.prob, results.scores
scores.round(3)

# %% [markdown]
# ```{glue:figure} c06-fig-roc
# :name: fig:resnet-roc
# :alt: Receiver operating characteristic of ResNet50 out of fold with a shaded band, the diagonal of chance and a
# :  star at the threshold.
# Receiver operating characteristic of ResNet50 out of fold, with a pointwise 95 % band from resampled studies. AUROC
# {glue:text}`c06-auroc`, n = {glue:text}`c06-n` {glue:text}`c06-kind` of {glue:text}`c06-n-studies` studies, profile
# {glue:text}`c06-profile`.
# ```
#
# The star of {numref}`fig:resnet-roc` lies where the curve is farthest above the diagonal, since Youden's index
# measures that distance.
#
# ### Right and wrong predictions
#
# ```{glue:figure} c06-fig-examples
# :name: fig:resnet-examples
# :alt: Four spine radiographs. Above, an abnormal one that was found and a normal one that was called normal. Below,
# :  an abnormal one that was missed and a normal one that was called abnormal.
# The most confident out-of-fold prediction of each outcome by ResNet50; rings mark lesions. Out of n =
# {glue:text}`c06-n` {glue:text}`c06-kind`, profile {glue:text}`c06-profile`.
# ```
#
# Compare {numref}`fig:resnet-examples` with {numref}`fig:densenet-examples`. Where two networks err on different
# radiographs, their vote can be better than either of them; {ref}`chap:ensemble` measures that.

# %% [markdown]
# ## Paper beside ours
#
# In per cent, ours with 95 % intervals. The first column quotes the paper's Table 2, on 2,078 test images of people;
# the second is this run's, out of fold, on other images. They cannot be compared: neither is better or worse than the
# other.

# %% tags=["hide-input"]
results.beside_paper

# %% [markdown]
# ## Removing blocks
#
# If a block changes its input only a little, the network should still work without it. In a trained network we
# replace by the identity, one at a time, each block that preserves the shape of its input, and score held-out
# radiographs again.

# %%
trained, _ = training.load_network("resnet50", found.checkpoints[shown_fold], recipe)
rows = np.flatnonzero(scored["fold"] == shown_fold)[:80]
x = networks.as_input(sample.pixels[rows].to(machine.device()))


@torch.no_grad()
def score():
    """Probabilities of the radiographs as they are, without their mirror images."""
    return trained(x).squeeze(1).sigmoid().cpu().numpy()


prob_whole, probs = score(), {}
for number in (1, 2, 3, 4):
    stage = getattr(trained, f"layer{number}")
    for position in range(1, len(stage)):
        taken, stage[position] = stage[position], torch.nn.Identity()
        probs[f"{number}.{position + 1}"] = score()
        stage[position] = taken
assert len(probs) == 12
assert np.array_equal(score(), prob_whole)  # all blocks are in their positions again


# %%
def fall(prob_without):
    """How much removing a block lowers the AUROC, with the interval by study."""

    def statistic(picked):
        labels = y[rows][picked]
        with_block, without_block = prob_whole[picked], prob_without[picked]
        return classification.auroc(labels, with_block) - classification.auroc(labels, without_block)

    draws = {"resamples": numbers.bootstrap, "seed": numbers.seed}
    return intervals.bootstrap_by_study(statistic, scored["study_id"].iloc[rows], **draws)


whole = classification.auroc(y[rows], prob_whole)
without = {name: classification.auroc(y[rows], one) for name, one in probs.items()}

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(7.2, 2.8))
ax.bar(list(without), list(without.values()), color="C0")
ax.axhline(whole, color="black", lw=1, label="with all blocks")
ax.axhline(0.5, color="0.4", lw=0.8, ls=":", label="chance")
ax.set(xlabel="stage and block removed", ylabel="AUROC", ylim=(0, 1))
ax.legend(fontsize=8, loc="lower right")
show_figure("c06-fig-without", fig)
worst = max(without, key=lambda name: whole - without[name])
glue_values("c06", {
    "n-without": len(rows),
    "idle": sum(abs(whole - value) < 0.005 for value in without.values()),
    "taken": worst,
    "worst": f"{fall(probs[worst]):+.2f}",
})

# %% [markdown]
# ```{glue:figure} c06-fig-without
# :name: fig:resnet-without
# :alt: A bar for each of twelve blocks with the AUROC of the network without it, beside a line for the whole network.
# AUROC of the trained network with one block replaced by the identity. n = {glue:text}`c06-n-without` held-out
# {glue:text}`c06-kind`, profile {glue:text}`c06-profile`.
# ```
#
# Removing any one of {glue:text}`c06-idle` of the twelve blocks changes the AUROC by less than 0.005
# ({numref}`fig:resnet-without`). Removing block {glue:text}`c06-taken` has the largest effect: the AUROC falls by
# {glue:text}`c06-worst` (95 % interval by study). The largest of twelve differences tends to be too large by chance,
# and the interval does not account for this selection. If the AUROC of the whole network is near one half, the figure
# is not informative.

# %% [markdown]
# ## Exercises
#
# First change the chapter: call `gradient_sizes(around=False, gain=1.6)` in a new cell. If each layer enlarges the
# gradient by some factor, the plain chain enlarges it by that factor to the power of its depth. What happens in the
# other chain?
#
# ```{exercise}
# :label: ex:resnet-paths
#
# By hand: unroll {eq}`eq:residual` without its ReLU over $n$ blocks. How many paths lead from input to output, and
# through how many blocks does a path pass on average?
# ```

# %% [markdown]
# ````{solution-start} ex:resnet-paths
# :class: dropdown
# ````
# At each block a path goes either through $F$ or around it, so there are $2^n$ paths of mean length $n / 2$. Removing
# one block closes half of them; the other half remain.

# %%
n = 16
lengths = np.array([bin(path).count("1") for path in range(2**n)])
assert len(lengths) == 2**n and lengths.mean() == n / 2

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:resnet-bottleneck
#
# By hand: a bottleneck from $c$ channels narrows to $c/r$. How does its number of weights depend on $r$, and which
# $r$ gives about as many as two full 3 × 3 convolutions with $c/4$ channels?
# ```

# %% [markdown]
# ````{solution-start} ex:resnet-bottleneck
# :class: dropdown
# ````
# It has $2c^2/r + 9c^2/r^2$ weights. Two full convolutions with $c/4$ channels have $18 c^2/16$, and $r = 4$ gives
# $17 c^2 / 16$: about as many, with four times the channels between blocks.

# %%
c = 256
narrow = {r: 2 * c * c // r + 9 * (c // r) ** 2 for r in (2, 4, 8)}
assert narrow[4] == 17 * c * c // 16 and narrow[4] < 18 * (c // 4) ** 2 < narrow[2]

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:resnet-recall
#
# A question about the paper: it says that ResNet50 favours recall. By how much does this run's sensitivity change
# when the threshold moves from Youden's to the one with the best F1?
# ```

# %% [markdown]
# ````{solution-start} ex:resnet-recall
# :class: dropdown
# ````
# For calibrated scores, the threshold of the best F1 is half that F1, and Youden's is the fraction of abnormal
# radiographs. Where about half are abnormal, as in VinDr-SpineXR, the former is lower: F1 does not count normal
# radiographs that are called normal, so a low threshold reduces it less. Recall depends on the threshold, not only on
# the architecture.

# %%
by_f1 = classification.operating_point(y, prob, classification.f1_threshold(y, prob))
assert by_f1["f1"] >= scores.loc["f1", "value"] - 1e-9
by_f1["sensitivity"] - scores.loc["sensitivity", "value"]

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - A residual block learns a change to its input; it can easily learn to do nothing.
# - The sum passes the gradient on undiminished, so that the first layers of deep networks are trained too.
# - When a block is removed, other paths through the network remain; the experiment measures the loss in AUROC.
# - AUROC {glue:text}`c06-auroc` out of fold on {glue:text}`c06-n` {glue:text}`c06-kind`.
