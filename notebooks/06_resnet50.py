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
# **You will be able to** build the bottleneck of ResNet50, show by an experiment why very deep chains
# do not learn without a way around, take whole blocks out of a trained network and see what
# happens, and judge the network out of fold.
#
# **You need** {ref}`chap:densenet121`, for loss, step, folds and threshold.
#
# **It takes** twenty minutes of reading. Training took {glue:text}`c06-train-minutes` minutes of one
# job after the other.
# :::

# %% tags=["parameters"]
profile = ""  # smoke, laptop or paper; empty: DERNET_PROFILE, else laptop
shown_fold = 0  # whose network loses blocks below: it held this fold out

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from dernet_utils.book import figures
from dernet_utils.book.figures import show_figure
from dernet_utils.book.paper import compare_with_table_2
from dernet_utils.book.progress import epoch_bars
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core import machine
from dernet_utils.metrics import classification, intervals
from dernet_utils.triage import networks, training
from dernet_utils.triage.crossvalidation import cross_validate, triage_images
from dernet_utils.triage.networks import batch_norm

# %%
workspace = open_chapter(profile)
numbers = workspace.profile
images = triage_images(workspace)
train = images[images["split"] == "train"]
recipe = training.TriageRecipe.of(numbers)
sample = training.Sample.load(train, recipe.image_px)
network = networks.build_network("resnet50", seed=numbers.seed)

# %% tags=["remove-cell"]
glue_values("c06", {
    "profile": numbers.name,
    "kind": "virtual radiographs" if numbers.virtual else "radiographs",
    "px": recipe.image_px,
    "folds": numbers.folds,
    "n": len(train),
    "n-studies": train["study_id"].nunique(),
})

# %% [markdown]
# ## A way around
#
# Stack more layers, and a network should get better; a deeper one could always copy the shallower one
# and let the rest do nothing. In practice deep plain chains got *worse*, even on the images that
# they learnt from {cite}`he2016`. To do nothing is hard for a layer: it has to learn the identity. A
# residual block makes it the easiest thing there is,
#
# $$
# \mathbf{x}_{\ell+1} = \mathrm{ReLU}\big(\mathbf{x}_\ell + F_\ell(\mathbf{x}_\ell)\big).
# $$ (eq:residual)
#
# The block has to learn only what is to be *changed*. And when the loss goes back to $\mathbf{x}_\ell$,
# the sum hands it on whole: $\partial \mathbf{x}_{\ell+1} / \partial \mathbf{x}_\ell = I + \partial F /
# \partial \mathbf{x}_\ell$ (where ReLU is on). A product of many such factors always holds the path
# $I \cdot I \cdots I$, which no weight can close, but for the four blocks where a 1 × 1 convolution
# stands on it because the image's shape changes.
#
# ### The bottleneck by hand
#
# In ResNet50 $F$ is three convolutions: 1 × 1 down to a quarter of the channels, 3 × 3 there, 1 × 1 up
# again, each with batch normalisation as in {ref}`chap:densenet121`.


# %%
def bottleneck(x, block):
    """Narrow, look around, widen, add the input."""
    out = F.relu(batch_norm(F.conv2d(x, block.conv1.weight), block.bn1))
    out = F.relu(batch_norm(F.conv2d(out, block.conv2.weight, padding=1), block.bn2))
    return F.relu(x + batch_norm(F.conv2d(out, block.conv3.weight), block.bn3))


# %%
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
# Where training starts from random weights, the last scale $\gamma$ of a block says how much of its
# change is there at first. At zero, timm's choice for ResNet, 12 of the 16 blocks do nothing but hand
# on their input, and each earns its influence by training {cite}`goyal2017`; over many epochs that is
# the steadier start. In a few hundred steps a start in between was better on held-out films
# ({ref}`sec:chosen`), so this book starts all of them at one half.

# %%
fresh = networks.build_network("resnet50", seed=numbers.seed)
assert all(one.bn3.weight.eq(0.5).all() for stage in (fresh.layer1, fresh.layer4) for one in stage)

# %% [markdown]
# ### Counting
#
# A block from $c$ channels through $c/4$ has $c \cdot c/4 + 9 (c/4)^2 + c/4 \cdot c = 17 c^2 / 16$
# weights in its convolutions; two full 3 × 3 convolutions would have $18 c^2$. That is the
# bottleneck's gain. The blocks number 3, 4, 6 and 3. The first of a stage also has a 1 × 1
# convolution on the way around, since channels double there.


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
# {glue:text}`c06-parameters` parameters, {glue:text}`c06-operations` billion operations at
# {glue:text}`c06-px` px, and a reach of {glue:text}`c06-reach` px: more weights, more work and
# less reach than DenseNet121, whose chain of windows is much longer.

# %% [markdown]
# ## An experiment: the same depth, with and without
#
# Take a chain of 48 layers $\tanh(W\mathbf{x})$ with random weights, once plain and once with the
# input added to the change, and ask how large the gradient still is when it has come back to each
# layer. What a layer shrinks, the plain chain shrinks to the power of its depth. The change is
# divided by the depth; added whole, the changes make the gradient grow instead, which in ResNet50 the
# normalisation within each block and the new start at each stage keep within bounds.


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
# :alt: Size of the gradient by layer on a logarithmic scale. With the input added it stays near one, in the plain chain it falls by several powers of ten towards the input.
# Size of the gradient at each layer of two untrained chains of 48 layers with the same random weights;
# where the input is added, changes are divided by 48. The experiment does not depend on data or
# profile.
# ```
#
# In {numref}`fig:residual-gradient` the first layers of the plain chain hear next to nothing of the
# loss. Real networks also normalise, which keeps sizes up in plain chains too; the way around does
# without it.

# %% [markdown]
# ## Training, fold by fold
#
# Loss, step, augmentation, crops and folds are those of {ref}`chap:densenet121`; only the network is
# another. {glue:text}`c06-start` What a job of the run has trained is loaded here; what is
# missing is trained.

# %% tags=["remove-output"]
found = cross_validate(workspace, "resnet50", epoch_bars("resnet50", numbers))

# %%
scored = found.out_of_fold
y, prob = scored["label"].to_numpy(), scored["prob"].to_numpy()
assert scored["image_id"].tolist() == train["image_id"].tolist()  # each image, once
found.curves.groupby("fold").tail(1).set_index("fold").drop(columns="seconds").round(5)

# %% tags=["hide-input", "remove-output"]
show_figure("c06-fig-curve", figures.draw_learning_curves(found.curves))
start = networks.starting_sentence("resnet50", networks.starting_weights("resnet50"))
glue_values("c06", {
    "start": start,
    "train-minutes": f"{found.curves['seconds'].sum() / 60:.1f}",
})

# %% [markdown]
# ```{glue:figure} c06-fig-curve
# :name: fig:resnet-curve
# :alt: Two panels over epochs, a colour a fold. Left, the loss on images learnt from and held out. Right, the AUROC on the held-out fold.
# Learning curves of ResNet50 over {glue:text}`c06-folds` folds; epochs on crops lie on grey.
# Held-out losses above 1.5 are cut off. n = {glue:text}`c06-n` {glue:text}`c06-kind`, profile
# {glue:text}`c06-profile`.
# ```
#
# Beside {numref}`fig:densenet-curve`: does this network, with more than three times the
# parameters, overfit earlier in {numref}`fig:resnet-curve`? Look for held-out losses that rise
# while the others fall.

# %% [markdown]
# ## How good, and how sure
#
# Threshold by Youden's index and intervals by study, both out of fold. Since the threshold was chosen
# on these very images, sensitivity, specificity and F1 look slightly too good here; AUROC does not.

# %%
draws = {"resamples": numbers.bootstrap, "seed": numbers.seed}
tau = classification.youden_threshold(y, prob)
scores = classification.classification_table(y, prob, scored["study_id"], tau, **draws)
interval = intervals.Interval(**scores.loc["auroc"])
assert interval.n_images == len(train) and interval.low <= interval.value <= interval.high
scores.round(3)

# %% tags=["hide-input", "remove-output"]
band = classification.roc_band(y, prob, scored["study_id"], **draws)
point = scores["value"]
star = {f"threshold {tau:.2f}": (point["sensitivity"], point["specificity"])}
show_figure("c06-fig-roc", figures.draw_roc({f"AUROC {interval.value:.2f}": band}, star))
answers = scored.assign(cached_path=train["cached_path"], lesions=train["lesions"])
show_figure("c06-fig-examples", figures.draw_most_confident(answers, tau))
glue_values("c06", {
    "auroc": f"{interval:.2f}",
})

# %% [markdown]
# ```{glue:figure} c06-fig-roc
# :name: fig:resnet-roc
# :alt: Receiver operating characteristic of ResNet50 out of fold with a shaded band, the diagonal of chance and a star at the threshold.
# Receiver operating characteristic of ResNet50 out of fold, with a pointwise 95 % band from
# resampled studies. AUROC {glue:text}`c06-auroc`, n = {glue:text}`c06-n` {glue:text}`c06-kind` of
# {glue:text}`c06-n-studies` studies, profile {glue:text}`c06-profile`.
# ```
#
# Mark the star of {numref}`fig:resnet-roc`: it lies where the curve is farthest above the diagonal,
# since that is what Youden's index measures.
#
# ### Right and wrong
#
# ```{glue:figure} c06-fig-examples
# :name: fig:resnet-examples
# :alt: Four spine radiographs. Above, an abnormal one that was found and a normal one left alone. Below, an abnormal one that was missed and a normal one that raised a false alarm.
# The surest out-of-fold answer of each kind by ResNet50; rings mark where lesions lie. Out of n =
# {glue:text}`c06-n` {glue:text}`c06-kind`, profile {glue:text}`c06-profile`.
# ```
#
# Set {numref}`fig:resnet-examples` beside {numref}`fig:densenet-examples`. Where two networks err
# on different films, a vote of them can be better than either; {ref}`chap:ensemble` measures that.

# %% [markdown]
# ## Paper beside ours
#
# Per cent, ours with 95 % intervals. The first column quotes the paper's Table 2, on 2,078 test
# images of people; the second is this run's, out of fold, on other images. Neither is better or
# worse than the other.

# %% tags=["hide-input"]
compare_with_table_2(numbers, {"out of fold": {"resnet50": scores}}, ("resnet50",))

# %% [markdown]
# ## Taking blocks out
#
# If a block only changes what passes it by, the network should survive without it. In a trained
# network we replace, one at a time, each block that does not change the image's shape by the
# identity, and score held-out films again.

# %%
trained, _ = training.load_network("resnet50", found.checkpoints[shown_fold], recipe)
rows = np.flatnonzero(scored["fold"] == shown_fold)[:80]
x = networks.as_input(sample.pixels[rows].to(machine.device()))


@torch.no_grad()
def score():
    """Probabilities of the films as they are, without their mirror images."""
    return trained(x).squeeze(1).sigmoid().cpu().numpy()


prob_whole, probs = score(), {}
for number in (1, 2, 3, 4):
    stage = getattr(trained, f"layer{number}")
    for position in range(1, len(stage)):
        taken, stage[position] = stage[position], torch.nn.Identity()
        probs[f"{number}.{position + 1}"] = score()
        stage[position] = taken
assert len(probs) == 12
assert np.array_equal(score(), prob_whole)  # all blocks are in their places again


# %%
def fall(prob_without):
    """What leaving a block out takes from the AUROC, with its interval by study."""

    def statistic(picked):
        y_drawn = y[rows][picked]
        return classification.auroc(y_drawn, prob_whole[picked]) - classification.auroc(
            y_drawn, prob_without[picked]
        )

    return intervals.bootstrap_by_study(statistic, scored["study_id"].iloc[rows], **draws)


whole = classification.auroc(y[rows], prob_whole)
without = {name: classification.auroc(y[rows], one) for name, one in probs.items()}

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(7.2, 2.8))
ax.bar(list(without), list(without.values()), color="C0")
ax.axhline(whole, color="black", lw=1, label="with all blocks")
ax.axhline(0.5, color="0.4", lw=0.8, ls=":", label="chance")
ax.set(xlabel="stage and block left out", ylabel="AUROC", ylim=(0, 1))
ax.legend(fontsize=8, loc="lower right")
show_figure("c06-fig-without", fig)
glue_values("c06", {
    "n-without": len(rows),
})
taken = max(without, key=lambda name: whole - without[name])
idle = sum(abs(whole - value) < 0.005 for value in without.values())
glue_values("c06", {
    "idle": idle,
    "taken": taken,
    "worst": f"{fall(probs[taken]):+.2f}",
})

# %% [markdown]
# ```{glue:figure} c06-fig-without
# :name: fig:resnet-without
# :alt: A bar for each of twelve blocks with the AUROC of the network without it, beside a line for the whole network.
# AUROC of the trained network with one block replaced by the identity. n =
# {glue:text}`c06-n-without` held-out {glue:text}`c06-kind`, profile {glue:text}`c06-profile`.
# ```
#
# {glue:text}`c06-idle` of the twelve blocks move the AUROC by less than 0.005 when they are gone
# ({numref}`fig:resnet-without`). Block {glue:text}`c06-taken` costs most, {glue:text}`c06-worst` with its 95 %
# interval by study. The largest of twelve is too large by chance, and the interval does not know that
# it was picked. Where the whole network stands near one half, the figure says nothing.

# %% [markdown]
# ## Exercises
#
# Change the chapter first: call `gradient_sizes(around=False, gain=1.6)` in a new cell. What a layer
# stretches, the plain chain stretches to the power of its depth; what does the other chain do?
#
# ```{exercise}
# :label: ex:resnet-paths
#
# By hand: unroll {eq}`eq:residual` without its ReLU over $n$ blocks. How many ways lead from input to
# output, and through how many blocks does the average one pass?
# ```

# %% [markdown]
# ````{solution-start} ex:resnet-paths
# :class: dropdown
# ````
# At each block a way goes through $F$ or around it: $2^n$ ways, of mean length $n / 2$. Taking one
# block out closes half of them; the other half still works.

# %%
n = 16
lengths = np.array([bin(way).count("1") for way in range(2**n)])
assert len(lengths) == 2**n and lengths.mean() == n / 2

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:resnet-bottleneck
#
# By hand: a bottleneck from $c$ channels narrows to $c/r$. How do its weights depend on $r$, and which
# $r$ gives as many as two full 3 × 3 convolutions at $c/4$ channels?
# ```

# %% [markdown]
# ````{solution-start} ex:resnet-bottleneck
# :class: dropdown
# ````
# $2c^2/r + 9c^2/r^2$. Two full ones at $c/4$ have $18 c^2/16$, and $r = 4$ gives $17 c^2 / 16$:
# about the same work, at four times the channels for what is handed on.

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
# A question to the paper: it says that ResNet50 favours recall. By how much does this run's
# sensitivity change when the threshold moves from Youden's to the one of the best F1?
# ```

# %% [markdown]
# ````{solution-start} ex:resnet-recall
# :class: dropdown
# ````
# For calibrated scores the best F1 lies at a threshold of half that F1, as a rule below Youden's: F1
# gives no credit for normal films left alone. Recall follows the threshold at least as much as the
# architecture.

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
# - A residual block learns a change to what passes it by; to do nothing is easy for it.
# - The sum hands the gradient on whole, so that depth does not silence the first layers.
# - With a block taken out there is still a way through; what that costs is measured.
# - AUROC {glue:text}`c06-auroc` out of fold on {glue:text}`c06-n` {glue:text}`c06-kind`.
