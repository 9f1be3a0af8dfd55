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
# (chap:pipeline)=
# # 14 · The gated pipeline
#
# :::{admonition} In this chapter
# **You will be able to** run the paper's Algorithm 1 from a file to boxes, say what a gate in front of a detector can
# win and what it must lose, measure both on the same films, and say what the gate costs in time.
#
# **You need** {ref}`chap:ensemble` for the score and its threshold, {ref}`chap:yolo11-training` for boxes and average
# precision, {ref}`chap:statistics` for intervals.
#
# **It takes** twenty minutes of reading, and about a minute to run: nothing is trained.
# :::
#
# The paper puts DERNet in front of its detector: a film that triage calls normal is not searched {cite}`dernet`. It calls this a
# "conditional hard-attention gate" and says that it removes false positives and so drives the mean average precision of the whole
# system. This chapter builds that system, and examines the claim.

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
alarms_allowed = 1.0  # false alarms a film of fold 0, at which boxes are reported
threshold = "youden"  # or f1, or cautious: which of the chosen thresholds the gate uses

# %%
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from dernet_utils.book.figures import (
    draw_arrow,
    draw_stage,
    show_boxes,
    show_figure,
    show_radiograph,
)
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core.vocabulary import NETWORK_NAMES, NETWORKS
from dernet_utils.detection import images, prediction, training
from dernet_utils.imaging.reader import read_radiograph
from dernet_utils.inference import models, torch_backend
from dernet_utils.metrics import detection, froc, intervals, matching
from dernet_utils.triage.crossvalidation import cross_validate, open_test_labels, read_decision
from dernet_utils.triage.networks import predict_probabilities, starting_weights
from dernet_utils.triage.training import load_network

# %%
workspace = open_chapter(profile)
numbers = workspace.profile
films = images.detection_images(workspace)
test, boxes = films.test, films.boxes
truth = boxes[boxes["image_id"].isin(test["image_id"])]
found = pd.read_parquet(workspace.tables / "yolo11l_test_boxes.parquet")  # of every test film
triage = {name: cross_validate(workspace, name) for name in NETWORKS}
decision = read_decision(workspace)
scored = triage[NETWORKS[0]].test.drop(columns="prob")
prob = np.column_stack([triage[name].test["prob"] for name in NETWORKS])
S = pd.Series(decision.prob(prob), scored["image_id"]).reindex(test["image_id"]).to_numpy()
abnormal = pd.Series(open_test_labels(workspace), scored["image_id"])
abnormal = abnormal.reindex(test["image_id"]).to_numpy()
assert (abnormal == test["image_id"].isin(truth["image_id"])).all()
draws = {"resamples": numbers.bootstrap, "seed": numbers.seed}

# %% tags=["remove-cell"]
kind = "virtual radiographs" if numbers.virtual else "radiographs"
glue_values("c14", {
    "profile": numbers.name, "kind": kind, "test": len(test), "truth": len(truth),
    "test-studies": test["study_id"].nunique(), "normal": int((~abnormal).sum()),
    "abnormal": int(abnormal.sum()), "alarms": f"{alarms_allowed:g}", "threshold": threshold,
})  # fmt: skip

# %% [markdown]
# ## Phase III, line by line
#
# The score of a film is line 16, and line 17 opens the gate if it exceeds $\tau_{optimal}$, which {ref}`chap:ensemble` chose
# out of fold. Line 18 keeps, of overlapping boxes of a type, the surest. In code it is short, and with the networks' answers
# at hand it is shorter still:


# %%
def phase_three(score, tau, boxes_of_film):
    """Lines 17 to 22: the boxes of a film whose gate opens, and none for another."""
    return boxes_of_film if score > tau else boxes_of_film.iloc[:0]


tau = decision.thresholds[threshold]
of_film = dict(list(found.groupby("image_id")))
none = found.iloc[:0]
passed = [
    phase_three(score, tau, of_film.get(image_id, none))
    for image_id, score in zip(test["image_id"], S, strict=True)
]
gated = pd.concat(passed, ignore_index=True)
opened = tau < S
assert set(gated["image_id"]) <= set(test["image_id"][opened])

# %% [markdown]
# From which score on a box is *reported* is chosen on fold 0, where neither the detector's weights nor the test split had a say, as in
# {ref}`chap:yolo11-training`: at most {glue:text}`c14-alarms` false alarms a film. With it the pipeline is complete, and is written down for those who use it: the
# command `dernet predict`, and the web page.

# %%
recipe = images.DetectorRecipe.of(numbers)
start = starting_weights("yolo11l")
trained = training.train_detector(
    films.training, films.validation, boxes, recipe, workspace.weights, start
)  # finds the checkpoint of chapter 10
held = prediction.predict_boxes(trained.network, films.validation, recipe.input_size)
held_truth = boxes[boxes["image_id"].isin(films.validation["image_id"])]
curve = froc.froc_curve(held_truth, held, films.validation)
score_threshold = float(curve["score"][curve["false_alarms_per_film"] <= alarms_allowed].iloc[-1])
checkpoints = {name: list(own.checkpoints) for name, own in triage.items()}
models.write_models(workspace, checkpoints, trained.checkpoint, score_threshold)
pipeline = torch_backend.run_pipeline(workspace, threshold)

# %% [markdown]
# Does the pipeline, asked for a file, say what the tables say? On the test film with the highest score:

# %%
row = int(np.argmax(S))
film = test.iloc[row]
folder = "train_images" if film["split"] == "train" else "test_images"
path = Path(workspace.data_root) / folder / f"{film['image_id']}.dicom"
grey = read_radiograph(path).pixels
answer = pipeline.predict(grey)
assert np.isclose(answer.score, S[row], atol=1e-5) and answer.abnormal == opened[row]
reported = of_film.get(film["image_id"], none)
expected = reported[reported["score"] >= score_threshold] if opened[row] else none
assert abs(len(answer.boxes) - len(expected)) <= 1  # one may lie at the line itself
both = min(len(answer.boxes), len(expected))
assert np.allclose(answer.boxes["score"].head(both), expected["score"].head(both), atol=1e-4)
pd.Series({NETWORK_NAMES[n]: p for n, p in answer.network_probs.items()} | {"DERNet": answer.score}).round(3)

# %% tags=["hide-input", "remove-output"]
enhanced = pipeline.enhance(grey)
fig, ax = plt.subplots(figsize=(8, 3.3))
ax.set(xlim=(0, 16), ylim=(0.2, 6.6))
ax.set_axis_off()


def picture(x, image, title, shown=None):
    """A small film with a title, and boxes where there are any."""
    inset = ax.inset_axes((x / 16, 0.17, 0.13, 0.66))
    show_radiograph(inset, image)
    inset.set_title(title, fontsize=8)
    if shown is not None:
        show_boxes(inset, shown, image.shape[0] / grey.shape[0], names=False)


picture(0.0, grey, "DICOM, PNG, JPEG")
picture(2.7, enhanced, "CLAHE")
for level, (name, p) in enumerate(answer.network_probs.items()):
    draw_stage(ax, 5.6, 4.9 - 1.9 * level, f"{NETWORK_NAMES[name]}\n{p:.2f}", 2.6)
    draw_arrow(ax, (4.95, 3.5), (5.5, 5.35 - 1.9 * level))
    draw_arrow(ax, (8.35, 5.35 - 1.9 * level), (8.9, 3.6))
draw_stage(ax, 9.0, 3.0, f"vote {answer.score:.2f}\n> {tau:.2f} ?", 1.9, "#f6e7c8")
draw_arrow(ax, (11.0, 3.5), (11.9, 3.5), "yes" if answer.abnormal else "")
draw_arrow(ax, (9.95, 2.9), (9.95, 1.6), "")
ax.text(10.1, 2.2, "no", fontsize=8)
draw_stage(ax, 9.0, 0.4, "normal:\nno boxes", 1.9, "0.93")
draw_stage(ax, 12.0, 3.0, "YOLO11-L\nNMS 0.5", 1.7)
picture(13.9, enhanced, "boxes", answer.boxes)
show_figure("c14-fig-pipeline", fig)

# %% [markdown]
# ```{glue:figure} c14-fig-pipeline
# :name: fig:phase-three
# :alt: From left to right a radiograph, the same after CLAHE, three networks with their probabilities, the vote compared with its threshold, the detector, and the radiograph with boxes.
# The pipeline, the counterpart of the paper's Fig. 2, on the test film with the highest score (one of {glue:text}`c14-test` {glue:text}`c14-kind`; profile
# {glue:text}`c14-profile`; boxes from a score of {glue:text}`c14-least-score`, colours as in all chapters).
# ```
#
# {numref}`fig:phase-three` shows all that happens to a film. What the detector can still do is decided on the way: it never sees a
# film whose gate is shut.
#
# ## What a gate can win, and must lose
#
# Average precision falls with every false alarm that outranks a hit. On a normal film every box is a false alarm, so a gate that shuts on
# normal films can only help there. On an abnormal film that it shuts on by mistake, every lesion is missed. With $\pi$ the share of abnormal films,
#
# ```{math}
# :label: eq:gate
# \begin{aligned}
# \text{false alarms on normal films, left} &= 1 - Sp, \\
# \text{lesions given up before any search} &\approx 1 - Se, \\
# \text{films searched} &= \pi\, Se + (1 - \pi)(1 - Sp) .
# \end{aligned}
# ```
#
# On this run's test split:

# %%
Se, Sp, pi = opened[abnormal].mean(), (~opened)[~abnormal].mean(), abnormal.mean()
assert np.isclose(opened.mean(), pi * Se + (1 - pi) * (1 - Sp))
shut = test["image_id"][~opened]
given_up = truth["image_id"].isin(shut).mean()
pd.Series(
    {"Se": Se, "Sp": Sp, "films searched": opened.mean(), "lesions given up": given_up}
).round(3)

# %% [markdown]
# ## Does the gate help?
#
# Three systems on the same films: no gate, this gate, and a gate that knows the truth. The last cannot be built; it says
# how much false alarms on normal films cost the detector, and so what any gate could win.

# %%
perfect = found[found["image_id"].isin(truth["image_id"])]
systems = {"no gate": found, "gate": gated, "perfect gate": perfect}
tables = {name: detection.detection_table(truth, own, test, **draws) for name, own in systems.items()}
change = {
    name: detection.mean_difference(truth, own, found, test, **draws)
    for name, own in systems.items()
    if name != "no gate"
}
rows = {n: "{value:.3f} [{low:.3f}, {high:.3f}]".format(**t.loc["mAP"]) for n, t in tables.items()}
pd.DataFrame({"mAP@0.5": rows, "less no gate": {n: f"{d:+.3f}" for n, d in change.items()}}).fillna(
    ""
)

# %% tags=["remove-cell"]
glue_values("c14", {
    "least-score": f"{score_threshold:.2f}",
    "change": f"{change['gate']:+.3f}",
    "perfect": f"{change['perfect gate']:+.3f}",
})
verdict = "The interval holds zero: on these films it cannot be said whether the gate helps the mean average precision."
if change["gate"].low > 0:
    verdict = "On these films the gate raises the mean average precision."
if change["gate"].high < 0:
    verdict = "On these films the gate lowers the mean average precision: what it gives up is worth more than what it spares."
glue_values("c14", {
    "verdict": verdict,
})

# %% [markdown]
# The gate changes mAP@0.5 by {glue:text}`c14-change`. {glue:text}`c14-verdict` Even the perfect gate would change it by no more than
# {glue:text}`c14-perfect`: that is what false alarms on normal films cost. All intervals are of 95 %, by study,
# {glue:text}`c14-truth` boxes on {glue:text}`c14-test` {glue:text}`c14-kind`.
#
# A mean average precision is one thing, what a reader sees another. At the score from which boxes are reported: false alarms a normal film, and
# the share of lesions that nobody marks.


# %%
def per_film(own):
    """Of each test film: boxes reported, lesions found."""
    sure = own[own["score"] >= score_threshold]
    order, hits = test["image_id"].tolist(), np.zeros(len(test))
    for name in truth["lesion_type"].unique():
        matches = matching.match_boxes(truth, sure, name, order)
        hits += np.bincount(matches.film, matches.hit, len(test))
    shown = sure["image_id"].value_counts().reindex(order, fill_value=0).to_numpy(float)
    return shown, hits


lesions = truth["image_id"].value_counts().reindex(test["image_id"], fill_value=0).to_numpy(float)


def reader(own):
    """False alarms a normal film and share of lesions missed, with intervals by study."""
    shown, hits = per_film(own)

    def alarms(w):
        return (w @ (shown * ~abnormal)) / (w @ (~abnormal).astype(float))

    def missed(w):
        return 1 - (w @ hits) / (w @ lesions)

    study = test["study_id"].to_numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        return [intervals.bootstrap(one, study, **draws) for one in (alarms, missed)]


# %%
seen = {name: reader(own) for name, own in systems.items()}
heads = ["false alarms a normal film", "lesions missed"]
pd.DataFrame({n: [f"{own[0]:.2f}", f"{own[1]:.1%}"] for n, own in seen.items()}, heads).T

# %% tags=["remove-cell"]
before, after = seen["no gate"], seen["gate"]
glue_values("c14", {
    "alarms-before": f"{before[0]:.2f}",
    "alarms-after": f"{after[0]:.2f}",
    "missed-before": f"{before[1]:.1%}",
    "missed-after": f"{after[1]:.1%}",
})

# %% [markdown]
# On normal films the gate takes false alarms from {glue:text}`c14-alarms-before` to {glue:text}`c14-alarms-after` a film. The price:
# lesions missed rise from {glue:text}`c14-missed-before` to {glue:text}`c14-missed-after`. So the paper is right that a gate spares
# false positives; it cannot do otherwise. Whether the exchange is a good one depends on what a missed lesion costs.
#
# ## Along the threshold
#
# One $\tau$ is one exchange rate. All of them:

# %%
taus = np.unique(np.quantile(S, np.linspace(0, 0.95, 12)))
taus = np.concatenate([[0.0], taus])
along = []
for level in taus:
    own = found[found["image_id"].isin(test["image_id"][level < S])]
    mean = detection.mean_difference(truth, own, found, test, **draws)
    alarms, missed = reader(own)
    along.append({"tau": level, "mAP change": mean, "alarms": alarms, "missed": missed})
along = pd.DataFrame(along)
assert along["mAP change"].iloc[0].value == 0 and along["alarms"].iloc[0] == before[0]

# %% tags=["hide-input", "remove-output"]
fig, axes = plt.subplots(1, 3, figsize=(8, 3))
labels = ("mAP@0.5, less no gate", "false alarms a normal film", "share of lesions missed")
for ax, column, text in zip(axes, ("mAP change", "alarms", "missed"), labels, strict=True):
    own = pd.DataFrame([vars(interval) for interval in along[column]])
    ax.fill_between(along["tau"], own["low"], own["high"], alpha=0.25, lw=0, step=None)
    ax.plot(along["tau"], own["value"], "o-", ms=3)
    ax.axvline(tau, color="0.3", ls=":", label=f"{threshold} {tau:.2f}")
    ax.set(xlabel="threshold of the gate", ylabel=text)
axes[0].axhline(0, color="0.5", lw=1)
axes[1].set_ylim(0, None)
axes[2].set_ylim(0, 1.02)
axes[0].legend(fontsize=8)
show_figure("c14-fig-along", fig)

# %% [markdown]
# ```{glue:figure} c14-fig-along
# :name: fig:gate
# :alt: Three curves against the gate's threshold with bands: change of mean average precision, false alarms a normal film, and share of lesions missed.
# What the gate changes at each threshold, with 95 % bands by study; dotted, the threshold chosen out of fold. {glue:text}`c14-truth`
# boxes on {glue:text}`c14-test` {glue:text}`c14-kind`, {glue:text}`c14-normal` of them normal; boxes from a score of {glue:text}`c14-least-score`; profile {glue:text}`c14-profile`.
# ```
#
# At the left end of {numref}`fig:gate` the gate is open and changes nothing; at the right it is shut and nothing is found. A threshold chosen for
# triage is not a threshold chosen for the whole system. Choosing the best point of the left curve here would be choosing on the test split.
#
# Which lesions are given up? A gate asks whether *anything* is wrong, so it passes what is conspicuous and keeps back what is subtle.

# %%
lost = truth.assign(lost=truth["image_id"].isin(shut)).groupby("lesion_type")["lost"]
by_type = lost.agg(boxes="size", given_up="mean").sort_values("given_up", ascending=False)
assert np.isclose(np.average(by_type["given_up"], weights=by_type["boxes"]), given_up)
by_type.rename(columns={"given_up": "behind a shut gate"}).round(2)

# %% [markdown]
# ## What the gate costs, and saves
#
# A gate saves the detector's time on the films that it shuts on, and costs its own on all of them. In time units $c_1$ for triage and
# $c_2$ for the detector, a film takes
#
# $$
# c_1 + \bigl(\pi\, Se + (1 - \pi)(1 - Sp)\bigr)\, c_2
# \quad \text{in place of} \quad c_2 .
# $$ (eq:gate-cost)
#
# Measured here, on one film at a time, in the framework that trained the networks:

# %%
square = torch.zeros(1, 1, numbers.triage_px, numbers.triage_px, dtype=torch.uint8)
filled = np.zeros(recipe.input_size, np.uint8)
asked = {
    NETWORK_NAMES[name]: partial(predict_probabilities, load_network(name, checkpoints[name][0])[0], square)
    for name in NETWORKS
}
asked["YOLO11-L"] = lambda: pipeline.detector(filled)
seconds = {name: [] for name in asked}
for _ in range(6):
    for name, ask in asked.items():  # by turns, so that a busy moment hits all
        begun = time.perf_counter()
        ask()
        seconds[name].append(time.perf_counter() - begun)
milliseconds = pd.Series({name: 1000 * np.median(own[1:]) for name, own in seconds.items()})
c_1, c_2 = milliseconds.iloc[:3].sum(), milliseconds["YOLO11-L"]
with_gate = c_1 + opened.mean() * c_2
milliseconds.round(0).to_frame("milliseconds a film")

# %% tags=["remove-cell"]
glue_values("c14", {
    "with-gate": f"{with_gate:.0f}",
    "without": f"{c_2:.0f}",
    "both": f"{c_1 + c_2:.0f}",
    "saved": f"{1 - with_gate / (c_1 + c_2):.0%}",
})

# %% [markdown]
# With one network a vote, a gated film takes {glue:text}`c14-with-gate` ms on average; the detector alone takes {glue:text}`c14-without` ms, and both
# without a gate {glue:text}`c14-both` ms. So if triage is wanted anyway, the gate saves {glue:text}`c14-saved` of the time. If it is not, a gate of three
# networks is no way to save time, whatever its threshold. (The pipeline above asks the networks of all folds, and takes longer.)
#
# ## Paper beside ours
#
# | | paper | this run |
# |---|---|---|
# | mAP@0.5 of the detector | 40.10 (Table 3) | no gate, in the table above |
# | mAP@0.5 of the system behind the gate | 40.10 (discussion) | gate, in the table above |
# | what the gate does | "significantly mitigate detector false positives" | {glue:text}`c14-alarms-before` to {glue:text}`c14-alarms-after` a normal film |
# | what the gate costs | not said | lesions missed, {glue:text}`c14-missed-before` to {glue:text}`c14-missed-after` |
#
# The paper gives one number for both systems, so that its claim that the gate drives mAP cannot be checked on its pages
# ({ref}`chap:audit`). Nor does it say whether its Table 3 was computed on all test films or behind the gate; the other rows of that table have no gate.
#
# ## Exercises
#
# Change the chapter first: set `threshold = "cautious"` in the parameters. Which column of the tables moves most?
#
# ```{exercise}
# :label: ex:pipeline-hand
# By hand: sensitivity 0.85, specificity 0.82, half of all films abnormal. What share of the films does the detector search, and what share of
# lesions is given up at most, if abnormal films have equally many?
# ```

# %% [markdown]
# ````{solution-start} ex:pipeline-hand
# :class: dropdown
# ````
# $0.5 \cdot 0.85 + 0.5 \cdot 0.18 = 0.515$ of the films are searched, and 0.15 of the lesions are given up. At the paper's operating point a gate
# in front of a perfect detector loses every seventh lesion.

# %%
assert np.isclose(0.5 * 0.85 + 0.5 * (1 - 0.82), 0.515)

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:pipeline-soft
# In code: a *soft* gate multiplies each box's score by the film's $\mathcal{S}$ and removes none. Compare its mAP with no gate and
# with the hard one.
# ```

# %% [markdown]
# ````{solution-start} ex:pipeline-soft
# :class: dropdown
# ````

# %%
weight = found["image_id"].map(pd.Series(S, test["image_id"].to_numpy()))
soft = found.assign(score=found["score"] * weight)
gain = detection.mean_difference(truth, soft, found, test, **draws)
print(f"soft gate less no gate: {gain:+.3f}")

# %% [markdown]
# Nothing is given up: a lesion on a film with a low score only ranks lower. Average precision is about ranks, so this is the gate that it rewards.
#
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:pipeline-question
# Question the method: a detector is compared with others, and it alone runs behind a gate. Why is the comparison unfair, and which
# two further rows would make it fair?
# ```
#
# ```{solution} ex:pipeline-question
# :class: dropdown
# The gate removes false alarms on normal films for one detector and not for the others, so that the table compares systems with parts.
# One more row each: the new detector without the gate, and the best other detector behind the same gate. Their differences to the
# rows at hand part what the gate does from what the detector does.
# ```
#
# ## What to take along
#
# - Phase III is a threshold and a non-maximum suppression; all learning is before it.
# - A gate trades lesions for false alarms. Print both sides.
# - The perfect gate tells how much there is to win before one is built.
# - A gate saves time only where triage is wanted anyway.
