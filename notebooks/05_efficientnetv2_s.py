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
# (chap:efficientnetv2-s)=
# # 05 · EfficientNetV2-S
#
# :::{admonition} In this chapter
# **You will be able to** build the two blocks of EfficientNetV2 from convolutions, explain what a depthwise
# convolution saves and what it does not, weight channels by squeeze and excitation, calculate how operations grow
# with depth, width and resolution, and evaluate the network out of fold.
#
# **You need** {ref}`chap:densenet121`, for the loss, the training step, the folds and the threshold.
#
# **It takes** twenty minutes of reading. In this run, training took {glue:text}`c05-train-minutes` minutes, one job
# after the other.
# :::

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
shown_fold = 0  # the network whose gates are shown below is the one for which this fold was held out

# %% tags=["hide-input"]
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from dernet_utils.book.classifier_chapter import glue_run_facts, show_out_of_fold, show_training
from dernet_utils.book.figures import show_figure
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.vocabulary import NETWORK_NAMES, NETWORKS
from dernet_utils.metrics import classification
from dernet_utils.triage import networks, training
from dernet_utils.triage.crossvalidation import triage_images
from dernet_utils.triage.networks import batch_norm, count_operations

# %%
workspace = open_chapter(profile)
numbers = workspace.profile
images = triage_images(workspace)
train = images[images["split"] == "train"]
recipe = training.TriageRecipe.of(numbers)
sample = training.Sample.load(train, recipe.image_px)
network = networks.build_network("tf_efficientnetv2_s", seed=numbers.seed)
glue_run_facts("c05", workspace, train)

# %% [markdown]
# ## What a convolution costs
#
# A convolution with a window of $s \times s$ from $c$ to $d$ channels has $cds^2$ weights. Each is used once at each
# of $H \times W$ positions, which makes $HWcds^2$ multiplications and as many additions. The convolution does two
# things at once: it combines neighbouring pixels, and it mixes channels. A *depthwise* convolution only combines
# neighbouring pixels, in each channel separately, with $cs^2$ weights; a 1 × 1 convolution only mixes channels, with
# $cd$ weights. Together the two are far cheaper than one full convolution.
#
# The *inverted residual* of MobileNets and EfficientNets {cite}`tan2021`, MBConv, widens $c$ channels to $ec$ by a 1
# × 1 convolution, applies a depthwise convolution, and narrows to $c$ again by 1 × 1. The authors of EfficientNetV2
# found that early in the network, where feature maps are large and channels few, the *fused* form is faster: one full
# 3 × 3 convolution replaces the first two steps. The numbers of weights are
#
# $$
# \underbrace{ec^2 + ecs^2 + ec^2}_{\text{MBConv}} \quad\text{and}\quad
# \underbrace{ec^2s^2 + ec^2}_{\text{fused}} .
# $$ (eq:mbconv)


# %%
def mbconv_weights(c, e=4, s=3):
    return e * c * c + e * c * s**2 + e * c * c


def fused_weights(c, e=4, s=3):
    return e * c * c * s**2 + e * c * c


assert fused_weights(48) > 4 * mbconv_weights(48)
fused_weights(48) / mbconv_weights(48)

# %% [markdown]
# ## Both blocks by hand
#
# The activation is SiLU, $x \, \sigma(x)$, smooth where ReLU has a corner. Each convolution is followed by batch
# normalisation as in {ref}`chap:densenet121`. The last one of a block has no activation, and where the block keeps
# the shape of its input, the input is added to its output.


# %%
def silu(x):
    return x / (1 + torch.exp(-x))


def fused_mbconv(x, block):
    """Widen and combine neighbours at once, then narrow, then add the input."""
    wide = silu(batch_norm(F.conv2d(x, block.conv_exp.weight, padding=1), block.bn1))
    return x + batch_norm(F.conv2d(wide, block.conv_pwl.weight), block.bn2)


# %% [markdown]
# MBConv has one more part, *squeeze and excitation*, which uses information from the whole image: each channel is
# averaged over all positions, two small layers turn these means into a gate between 0 and 1 per channel, and the
# channels are multiplied by their gates. A finding in one corner can thus strengthen a channel in the whole image.


# %%
def gates(x, se):
    """Squeeze the image to a mean per channel; excite: a gate per channel."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    small = silu(F.conv2d(mean, se.conv_reduce.weight, se.conv_reduce.bias))
    return torch.sigmoid(F.conv2d(small, se.conv_expand.weight, se.conv_expand.bias))


def mbconv(x, block):
    """Widen, combine neighbours per channel, weight channels, narrow, add the input."""
    wide = silu(batch_norm(F.conv2d(x, block.conv_pw.weight), block.bn1))
    groups = wide.shape[1]
    near = F.conv2d(wide, block.conv_dw.weight, padding=1, groups=groups)
    near = silu(batch_norm(near, block.bn2))
    near = near * gates(near, block.se)
    return x + batch_norm(F.conv2d(near, block.conv_pwl.weight), block.bn3)


# %% [markdown]
# Do these equal timm's blocks? We pass a few radiographs through the network in training mode, so that its running
# means and variances are no longer 0 and 1, and then compare our block of each kind with timm's.

# %%
x = networks.as_input(sample.pixels[:4])
with torch.no_grad():
    network.train()(x)
    network.eval()
    early = network.blocks[0](network.bn1(network.conv_stem(x)))
    early = network.blocks[1][0](early)
    fused, plain = network.blocks[1][1], network.blocks[3][1]
    assert torch.allclose(fused_mbconv(early, fused), fused(early), atol=1e-4)
    late = network.blocks[3][0](network.blocks[2](network.blocks[1][1:](early)))
    assert torch.allclose(mbconv(late, plain), plain(late), atol=1e-4)
early.shape, late.shape

# %% [markdown]
# Their convolutions have as many weights as {eq}`eq:mbconv` says. Each batch normalisation adds two parameters per
# channel, and squeeze and excitation adds those of its two small layers.

# %%
convolutions = [fused.conv_exp, fused.conv_pwl]
assert sum(conv.weight.numel() for conv in convolutions) == fused_weights(48)
convolutions = [plain.conv_pw, plain.conv_dw, plain.conv_pwl]
assert sum(conv.weight.numel() for conv in convolutions) == mbconv_weights(128)

# %% [markdown]
# ## The whole network
#
# Six stages follow the stem. The first consists of plain 3 × 3 convolutions, the next two are fused; none of these
# three has squeeze and excitation.

# %%
rows = []
for number, stage in enumerate(network.blocks, start=1):
    first, last = stage[0], stage[-1]
    kinds = {"ConvBnAct": "3 × 3", "EdgeResidual": "fused", "InvertedResidual": "MBConv"}
    narrow = last.conv if hasattr(last, "conv") else last.conv_pwl
    weights = sum(parameter.numel() for parameter in stage.parameters())
    rows.append((number, kinds[type(first).__name__], len(stage), narrow.out_channels, weights))
columns = ["stage", "block", "blocks", "channels", "parameters"]
stages = pd.DataFrame(rows, columns=columns).set_index("stage")
total = sum(parameter.numel() for parameter in network.parameters())
ends = [network.conv_stem, network.bn1, network.conv_head, network.bn2, network.classifier]
outside = sum(parameter.numel() for part in ends for parameter in part.parameters())
assert stages["parameters"].sum() + outside == total
stages

# %% [markdown]
# Most parameters are at the end, where there are many channels. For the receptive field we follow the path from input
# to output: it passes one 3 × 3 window per block, and stages 2, 3, 4 and 6 halve the feature maps in their first
# block.

# %%
way = [(3, 2)]
for number, blocks in enumerate(stages["blocks"], start=1):
    halves = number in (2, 3, 4, 6)
    way += [(3, 2 if halves and not block else 1) for block in range(blocks)]
reach = networks.receptive_field(way)
operations = count_operations(network, recipe.image_px)
assert np.prod([stride for _, stride in way]) == 32
reach, operations

# %% [markdown]
# ### Fewer operations, less time?
#
# The number of operations does not determine the time. A depthwise convolution computes so little for each number it
# reads that the processor often waits for memory. We time the convolutions of both kinds of block on the same input
# of 48 channels, without normalisation and gates, in alternation on this machine:

# %%
pair = {
    "fused": torch.nn.Sequential(
        torch.nn.Conv2d(48, 192, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(192, 48, 1)
    ),
    "MBConv": torch.nn.Sequential(
        torch.nn.Conv2d(48, 192, 1), torch.nn.SiLU(),
        torch.nn.Conv2d(192, 192, 3, padding=1, groups=192), torch.nn.SiLU(),
        torch.nn.Conv2d(192, 48, 1),
    ),
}  # fmt: skip
maps = torch.randn(8, 48, 32, 32).contiguous(memory_format=torch.channels_last)
seconds = {name: [] for name in pair}
with torch.no_grad():
    for _ in range(12):
        for name, block in pair.items():
            started = time.perf_counter()
            block.to(memory_format=torch.channels_last)(maps)
            seconds[name].append(time.perf_counter() - started)
work = fused_weights(48) / mbconv_weights(48)
took = np.median(seconds["fused"][2:]) / np.median(seconds["MBConv"][2:])
print(f"fused over MBConv: {work:.1f} times the operations, {took:.1f} times the time")

# %% tags=["remove-cell"]
glue_values("c05", {
    "parameters": f"{total:,}",
    "operations": f"{operations / 1e9:.1f}",
    "reach": f"{reach:,}",
    "work": f"{work:.1f}",
    "took": f"{took:.1f}",
})

# %% [markdown]
# The fused block has {glue:text}`c05-work` times the operations and took {glue:text}`c05-took` times as long (medians
# of ten rounds). How much the two ratios differ depends on the machine. Because they differ, the architecture search
# for EfficientNetV2 used measured training time. The whole network has {glue:text}`c05-parameters` parameters,
# {glue:text}`c05-operations` billion operations at {glue:text}`c05-px` px and, from its windows alone, a receptive
# field of {glue:text}`c05-reach` px; through the gates each output depends on the whole image.
#
# ## Growing in three directions
#
# A network can be made deeper or wider, or be given larger images. Operations grow in proportion to depth, and with
# the *square* of width and of resolution. Compound scaling, which the first EfficientNet introduced, increases all
# three by one exponent $\varphi$,
#
# $$
# \text{depth} = \alpha^\varphi, \quad \text{width} = \beta^\varphi, \quad
# \text{resolution} = \gamma^\varphi, \qquad \alpha \beta^2 \gamma^2 \approx 2,
# $$ (eq:compound)
#
# so that each step of $\varphi$ doubles the operations. The authors of the first EfficientNet found $\alpha = 1.2$,
# $\beta = 1.1$, $\gamma = 1.15$ by a small search.

# %%
alpha, beta, gamma = 1.2, 1.1, 1.15
assert abs(alpha * beta**2 * gamma**2 - 2) < 0.1
sides = [64, 128, 256, 512]
work_at = [count_operations(network, side) for side in sides]
growth = np.diff(np.log2(work_at))
assert np.allclose(growth, 2, atol=0.02)  # twice the side, four times the operations
growth

# %% tags=["hide-input", "remove-output"]
facts = {}
for name in NETWORKS:
    one = networks.build_network(name)
    facts[name] = [count_operations(one, side) / 1e9 for side in sides]
fig, ax = plt.subplots(figsize=(6, 3.2))
for name, line, size in zip(NETWORKS, ("o-", "s--", "^-."), (10, 5, 6), strict=True):
    ax.loglog(sides, facts[name], line, ms=size, label=NETWORK_NAMES[name])
paper_px = get_profile("paper").triage_px
for side, word in {recipe.image_px: "this run", paper_px: "paper's protocol"}.items():
    ax.axvline(side, color="0.4", lw=0.8, ls=":")
    foot = {"transform": ax.get_xaxis_transform(), "va": "bottom", "rotation": 90}
    ax.text(side * 1.02, 0.04, word, fontsize=8, **foot)
two = np.array([facts["densenet121"], facts["tf_efficientnetv2_s"]])
assert np.allclose(two[0], two[1], rtol=0.1)
ax.set(xlabel="side of the image, px", ylabel="billion operations per image")
ax.set_xticks(sides, [str(side) for side in sides])
ax.minorticks_off()
ax.legend(fontsize=8)
show_figure("c05-fig-work", fig)

# %% [markdown]
# ```{glue:figure} c05-fig-work
# :name: fig:work
# :alt: Billion operations per image against the side of the image on logarithmic axes, three parallel lines, one per
# :  network.
# Operations per image of each network of the ensemble, against the image's side. The architecture does not depend on
# data or profile; dotted lines mark this run's side and that of the paper's protocol.
# ```
#
# The lines of {numref}`fig:work` are parallel with slope 2, and two of them coincide: DenseNet121 needs as many
# operations as EfficientNetV2-S, to within a tenth, with a third of the parameters. An image of 384 px, as in the
# paper's companion code, needs nine times as many operations as one of 128 px, in each network.

# %% [markdown]
# ## Training, fold by fold
#
# Loss, step, augmentation, crops and folds are those of {ref}`chap:densenet121`; only the network differs, and
# `show_training` does the work. {glue:text}`c05-start` Networks that the run has already trained are loaded; missing
# ones are trained now.

# %% tags=["remove-output"]
found, last_epochs = show_training("c05", workspace, "tf_efficientnetv2_s")

# %%
last_epochs

# %% [markdown]
# ```{glue:figure} c05-fig-curve
# :name: fig:efficientnet-curve
# :alt: Two panels over epochs, a colour per fold. Left, the loss on training images and on held-out ones. Right, the
# :  AUROC on the held-out fold.
# Learning curves of EfficientNetV2-S over {glue:text}`c05-folds` folds; epochs on crops lie on grey. Held-out losses
# above 1.5 are cut off. n = {glue:text}`c05-n` {glue:text}`c05-kind`, profile {glue:text}`c05-profile`.
# ```
#
# Depthwise convolutions, gates and forty blocks may make this network slow to learn at first: compare the epochs at
# which the losses of {numref}`fig:efficientnet-curve` and {numref}`fig:densenet-curve` leave the dotted line. The
# authors of EfficientNetV2 train on small images first and on larger ones later {cite}`tan2021`.

# %% [markdown]
# ## Performance, with intervals
#
# The threshold is Youden's and the intervals are by study, both out of fold, as in {ref}`chap:densenet121`. Since the
# threshold was chosen on these same images, sensitivity, specificity and F1 look slightly too good here; AUROC does
# not depend on it.

# %% tags=["remove-output"]
results = show_out_of_fold("c05", workspace, found, train)

# %%
scored, y, prob = found.out_of_fold, results.y, results.prob
results.scores.round(3)

# %% [markdown]
# ```{glue:figure} c05-fig-roc
# :name: fig:efficientnet-roc
# :alt: Receiver operating characteristic of EfficientNetV2-S out of fold with a shaded band, the diagonal of chance
# :  and a star at the threshold.
# Receiver operating characteristic of EfficientNetV2-S out of fold, with a pointwise 95 % band from resampled
# studies. AUROC {glue:text}`c05-auroc`, n = {glue:text}`c05-n` {glue:text}`c05-kind` of {glue:text}`c05-n-studies`
# studies, profile {glue:text}`c05-profile`.
# ```
#
# The star of {numref}`fig:efficientnet-roc` lies where the curve is farthest above the diagonal, since Youden's index
# measures that distance.
#
# ### Right and wrong predictions
#
# ```{glue:figure} c05-fig-examples
# :name: fig:efficientnet-examples
# :alt: Four spine radiographs. Above, an abnormal one that was found and a normal one that was called normal. Below,
# :  an abnormal one that was missed and a normal one that was called abnormal.
# The most confident out-of-fold prediction of each outcome by EfficientNetV2-S; rings mark lesions. Out of n =
# {glue:text}`c05-n` {glue:text}`c05-kind`, profile {glue:text}`c05-profile`.
# ```
#
# Compare {numref}`fig:efficientnet-examples` with {numref}`fig:densenet-examples`. Where two networks err on
# different radiographs, their vote can be better than either of them; {ref}`chap:ensemble` measures that.

# %% [markdown]
# ## Paper beside ours
#
# In per cent, ours with 95 % intervals. The first column quotes the paper's Table 2, on 2,078 test images of people;
# the second is this run's, out of fold, on other images. They cannot be compared: neither is better or worse than the
# other.

# %% tags=["hide-input"]
results.beside_paper

# %% [markdown]
# ## Which channels respond to abnormal radiographs?
#
# After training, we can read the gates of a late block for each radiograph. If a gate differs between the labels, the
# network strengthens or weakens its channel for abnormal radiographs.

# %%
trained, _ = training.load_network("tf_efficientnetv2_s", found.checkpoints[shown_fold], recipe)
rows = np.flatnonzero(scored["fold"] == shown_fold)[:96]
block, seen = trained.blocks[5][-1], []
hook = block.se.register_forward_hook(
    lambda _, inputs, out: seen.append(gates(inputs[0], block.se))
)
networks.predict_probabilities(trained, sample.pixels[rows])
hook.remove()
gate = torch.cat(seen)[: len(rows), :, 0, 0].cpu().numpy()
assert gate.shape[0] == len(rows) and gate.min() >= 0 and gate.max() <= 1
difference = gate[y[rows]].mean(axis=0) - gate[~y[rows]].mean(axis=0)
mixed = np.random.default_rng(numbers.seed).permutation(y[rows])
by_chance = gate[mixed].mean(axis=0) - gate[~mixed].mean(axis=0)

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(7.2, 2.6))
reach_of_gates = max(np.abs(difference).max(), np.abs(by_chance).max(), 1e-3)
bins = np.linspace(-reach_of_gates, reach_of_gates, 61)
ax.hist(difference, bins, color="C0", label="true labels")
ax.hist(by_chance, bins, histtype="step", color="black", label="labels permuted")
ax.legend(fontsize=8)
ax.axvline(0, color="black", lw=0.8)
ax.set(xlabel="mean gate, abnormal minus normal radiographs", ylabel="channels")
show_figure("c05-fig-gates", fig)
glue_values("c05", {"n-gates": len(rows)})

# %% [markdown]
# ```{glue:figure} c05-fig-gates
# :name: fig:gates
# :alt: Histogram over channels of the difference between the mean gate of abnormal and of normal radiographs.
# Gates of the last block, by channel: abnormal minus normal radiographs, and the same with labels permuted at random.
# n = {glue:text}`c05-n-gates` held-out {glue:text}`c05-kind`, profile {glue:text}`c05-profile`.
# ```
#
# Means over few radiographs differ by chance, as the black outline shows. Only channels well beyond it in
# {numref}`fig:gates` suggest a relation to the label.

# %% [markdown]
# ## Exercises
#
# First change the chapter: set `shown_fold = 1` and run all cells. Do the gates of the other fold's network differ as
# much between the labels?
#
# ```{exercise}
# :label: ex:efficientnet-depthwise
#
# By hand: for which expansion ratio $e$ does the fused block have twice the weights of MBConv, at $c = 48$ and $s =
# 3$?
# ```

# %% [markdown]
# ````{solution-start} ex:efficientnet-depthwise
# :class: dropdown
# ````
# For none: $e$ is a factor of every term of {eq}`eq:mbconv` and cancels. The ratio, $(s^2 + 1)c / (2c + s^2)$, is
# 480 / 105 at $c = 48$.

# %%
assert all(np.isclose(fused_weights(48, e) / mbconv_weights(48, e), 480 / 105) for e in (1, 4, 6))

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:efficientnet-side
#
# In code: you can afford twice the operations of an image of 128 px. Which is the largest affordable side that is a
# multiple of 32?
# ```

# %% [markdown]
# ````{solution-start} ex:efficientnet-side
# :class: dropdown
# ````
# The side grows with the square root of the operations: 128 · √2 ≈ 181, so 160 is the largest multiple of 32.

# %%
budget = 2 * count_operations(network, 128)
fits = [side for side in range(128, 257, 32) if count_operations(network, side) <= budget]
assert fits[-1] == 160

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:efficientnet-specificity
#
# A question about the paper: its Table 2 gives this network the lowest sensitivity and the highest specificity of the
# three, and concludes that it "favours specificity". Is that a property of the network? Move this run's threshold
# until its specificity equals the paper's, and determine the sensitivity.
# ```

# %% [markdown]
# ````{solution-start} ex:efficientnet-specificity
# :class: dropdown
# ````
# Sensitivity and specificity are one point on a curve, and the threshold selects the point. With another threshold
# the same network favours sensitivity. Only the whole curve, or its area, describes the network.

# %%
normal_probs = prob[~y]
moved = np.quantile(normal_probs, 0.9112)
at = classification.operating_point(y, prob, moved)
one = 1 / len(normal_probs)  # equal scores cannot be separated by any threshold
assert (normal_probs < moved).mean() - one <= 0.9112 <= at["specificity"] + one
at["sensitivity"], at["specificity"]

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ## Takeaways
#
# - MBConv separates combining neighbours from mixing channels; the fused block does both at once. The number of
#   operations does not determine the time, so measure it.
# - Squeeze and excitation weights each channel by a gate computed from means over the whole image.
# - Twice the side means four times the operations; compound scaling increases depth, width and resolution together.
# - AUROC {glue:text}`c05-auroc` out of fold on {glue:text}`c05-n` {glue:text}`c05-kind`.
