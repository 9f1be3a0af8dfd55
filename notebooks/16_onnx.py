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
# (chap:onnx)=
# # 16 · Networks without torch
#
# :::{admonition} In this chapter
# **You will be able to** write trained networks as files that any runtime reads, say what a runtime changes in them and why that makes them
# faster, round a network to sixteen or eight bits by hand, and prove that the answers are still the same, or say by how much they are not.
#
# **You need** {ref}`chap:pipeline` for the pipeline, {ref}`chap:statistics` for intervals.
#
# **It takes** half an hour of reading, and some minutes to run on two cores.
# :::
#
# The paper serves its networks by ONNX Runtime and calls the result "low-latency inference on standard clinical hardware" {cite}`dernet`; it gives no
# time. This chapter takes the same step, measures it, and asks what it costs in accuracy.

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
allowed = 0.005  # of AUROC and of mAP, that an engine may give up

# %%
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import onnx
import onnxruntime
import pandas as pd
import torch
from myst_nb import glue
from torch.utils.flop_counter import FlopCounterMode

from dernet_utils.book.figures import show_figure
from dernet_utils.book.teaching import glue_values, open_chapter
from dernet_utils.core import machine
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES, NETWORK_NAMES, NETWORKS
from dernet_utils.detection import images, prediction, yolo
from dernet_utils.detection.training import load_detector
from dernet_utils.imaging.boxes import letterbox
from dernet_utils.imaging.enhance import load_cached
from dernet_utils.inference import export, onnx_backend
from dernet_utils.inference.models import read_models
from dernet_utils.inference.pipeline import NetworkOutput, Pipeline
from dernet_utils.metrics import classification, detection, intervals
from dernet_utils.triage import networks, training
from dernet_utils.triage.crossvalidation import cross_validate, open_test_labels, read_decision

# %%
workspace = open_chapter(profile)
numbers = workspace.profile
rounds = numbers.timings  # of each engine, by turns
folder = workspace.models
manifest_file = export.export_run(workspace, folder, int8=True)
manifest = onnx_backend.read_export(folder)
films = images.detection_images(workspace)
test = films.test.reset_index(drop=True)
truth = films.boxes[films.boxes["image_id"].isin(test["image_id"])]
draws = {"resamples": numbers.bootstrap, "seed": numbers.seed}

# %% tags=["remove-cell"]
glue_values("c16", {
    "profile": numbers.name, "n": len(test), "n-studies": test["study_id"].nunique(),
    "boxes": len(truth), "allowed": f"{allowed:g}", "folds": numbers.folds, "rounds": rounds, "machine": machine.processor_name(),
    "kind": "virtual radiographs" if numbers.virtual else "radiographs",
    "calibration": min(export.CALIBRATION_IMAGES, len(films.training)), "px": numbers.triage_px,
    "timed-px": numbers.timed_px, "timed-view": "{} × {}".format(*numbers.timed_size),
})  # fmt: skip

# %% [markdown]
# ## What is in the file
#
# An ONNX file is a list of operations and the numbers that they need, in a form that belongs to no library. Ours take the enhanced film as it is, 8-bit grey, and do
# all the rest inside: the division by 255, ImageNet's mean and deviation, the mirrored film, and the networks of all {glue:text}`c16-folds` folds. What is inside cannot be
# forgotten outside. A manifest beside the files says what is not inside: sizes, weights of the vote, temperature, thresholds, and each file's SHA-256.


# %%
def contents(path):
    """Size of a file, its operations, and what comes in and out."""
    graph = onnx.load(path).graph
    kinds = pd.Series([node.op_type for node in graph.node]).value_counts()
    return {
        "MB": path.stat().st_size / 1e6, "operations": len(graph.node),
        "convolutions": kinds.get("Conv", 0), "normalisations": kinds.get("BatchNormalization", 0),
        "out": ", ".join(one.name for one in graph.output),
    }  # fmt: skip


files = {
    NETWORK_NAMES.get(name, "YOLO11-L"): folder / own["float32"]["file"]
    for name, own in (manifest["triage"] | {"yolo11l": manifest["detector"]}).items()
}
inside = pd.DataFrame({name: contents(path) for name, path in files.items()}).T
inside.astype({"MB": float}).round({"MB": 0})

# %% [markdown]
# Beside the probability a triage file gives out a heat map, by the formula of {ref}`chap:explainability`, and an embedding, which {ref}`chap:outliers` needs.
#
# ## What a runtime changes: one convolution less to read
#
# In evaluation batch normalisation is a multiplication and an addition with fixed numbers, and the convolution before it is linear. So both are one convolution:
#
# $$
# W' = \frac{\gamma}{\sqrt{\sigma^2 + \varepsilon}}\, W, \qquad
# b' = \beta + \frac{\gamma}{\sqrt{\sigma^2 + \varepsilon}}\,(b - \mu) .
# $$ (eq:fold)
#
# By hand, for the first layer of ResNet50:

# %%
found = {name: cross_validate(workspace, name) for name in NETWORKS}
resnet = training.load_network("resnet50", found["resnet50"].checkpoints[0])[0].eval()
conv, norm = resnet.conv1, resnet.bn1
factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
W_folded = factor.view(-1, 1, 1, 1) * conv.weight
b_folded = norm.bias - factor * norm.running_mean
pixels = training.load_pixels(test["cached_path"].head(2), numbers.triage_px)
with torch.no_grad():
    x = networks.as_input(pixels)
    one = torch.nn.functional.conv2d(x, W_folded, b_folded, conv.stride, conv.padding)
    two = norm(conv(x))
assert torch.allclose(one, two, atol=1e-4)

# %% [markdown]
# The exporter has done so for every pair that it found, hence the zeros in the column of normalisations. DenseNet121 keeps half of its own: those that stand *before* a convolution
# ({ref}`chap:densenet121`), with an activation between the two, where there is nothing linear to join. A runtime goes on from there: it joins activations to convolutions, and drops what
# is computed twice. We let ONNX Runtime write down what it is left with. What it does after that, it lays maps out as its convolutions on this machine read them best, is not in the count:


# %%
def operations_left(path):
    """Operations after ONNX Runtime has optimised a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    left = contents(folder / "optimised.onnx")["operations"]
    (folder / "optimised.onnx").unlink()
    return left


left = pd.Series({name: operations_left(path) for name, path in files.items()})
pd.DataFrame({"operations in the file": inside["operations"], "after ONNX Runtime": left})

# %% [markdown]
# ## Fewer bits, by hand
#
# *bfloat16* is float32 without its last sixteen bits: the same range, and a relative error of at most $2^{-8}$ when they are rounded off. *int8* keeps a whole number from −128 to 127 and a scale for each
# channel,
#
# $$
# q = \operatorname{clip}\bigl( \operatorname{round}(w / s), -128, 127 \bigr), \qquad \hat w = s\,q, \qquad s = \frac{\max |w|}{127} ,
# $$ (eq:int8)
#
# so that no weight is off by more than $s/2$. Both by hand, for the same layer, and beside what the quantised file holds:


# %%
def to_bfloat16(values):
    """Round to the nearest number whose last sixteen bits are zero, ties to even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


W = conv.weight.detach().numpy()
assert (to_bfloat16(W) == conv.weight.detach().bfloat16().float().numpy()).all()
W = W_folded.detach().numpy()
s = np.abs(W).max(axis=(1, 2, 3), keepdims=True) / 127
q = np.clip(np.rint(W / s), -128, 127).astype(np.int8)
assert (np.abs(W - s * q) <= s / 2 * 1.001).all()
relative = (np.abs(to_bfloat16(W) - W)[W != 0] / np.abs(W[W != 0])).max()
assert relative <= 2**-8

# %%
forms = {
    engine: onnx.load(folder / manifest["triage"]["resnet50"][engine]["file"]).graph
    for engine in export.INT8
}
small = forms["openvino-int8"]
arrays = {one.name: onnx.numpy_helper.to_array(one) for one in small.initializer}
same = [own for own in arrays.values() if own.shape == q.shape and own.dtype == np.int8]
apart = min(int(np.abs(own.astype(int) - q).max()) for own in same)
assert apart <= 1  # a tie may be rounded either way
mean_error = np.abs(W - s * q).mean() / np.abs(W).mean()
pd.Series({
    "int8, mean error over mean weight": mean_error, "bfloat16": np.abs(to_bfloat16(W) - W).mean() / np.abs(W).mean(),
}).round(4).to_frame("first layer of ResNet50")  # fmt: skip

# %% [markdown]
# Weights are known; the maps between the layers are not, and need scales too. They come from the ranges on {glue:text}`c16-calibration` films of the *training* split; a map is kept as 0 to 255 from a zero
# of its own. *Where* to round them is a choice. OpenVINO makes one operation of a convolution, the activation after it, and the rounding of what comes out: it wants one rounding a convolution, of its input. ONNX
# Runtime knows a convolution of integers by a rounding on either side, before the activation too. So each engine has a file of its own, from one calibration:

# %%
pd.Series({
    engine: sum(node.op_type == "QuantizeLinear" for node in graph.node) for engine, graph in forms.items()
}).to_frame("roundings of maps, ResNet50")  # fmt: skip

# %% [markdown]
# ## Are the answers the same?
#
# Every film of the test split, through five engines: ONNX Runtime in float32 and int8; OpenVINO, which reads the same files in float32 and rounds them to bfloat16 itself, and its own in int8. Beside them what torch said in
# {ref}`chap:ensemble` and {ref}`chap:yolo11-training`.

# %%
def eager(module):
    """Run a module as PyTorch does: one operation after the other."""
    module.to(memory_format=torch.channels_last)

    def run(batch):
        with torch.no_grad():
            out = module(torch.from_numpy(batch))
        return [one.numpy() for one in (out if isinstance(out, tuple) else (out,))]

    return run


decision = read_decision(workspace)
scored = found[NETWORKS[0]].test["image_id"]
prob = np.column_stack([found[name].test["prob"] for name in NETWORKS])
prob = pd.DataFrame(prob, scored).reindex(test["image_id"]).to_numpy()
by_torch = decision.prob(prob)
y = pd.Series(open_test_labels(workspace), scored).reindex(test["image_id"]).to_numpy()
boxes_by_torch = pd.read_parquet(workspace.tables / "yolo11l_test_boxes.parquet")
enhanced = [load_cached(path) for path in test["cached_path"]]
stored = list(zip(test["height"], test["width"], strict=True))
letterboxed = [letterbox(image, numbers.detect_size)[0] for image in enhanced]
detector, _ = load_detector(workspace.weights / read_models(workspace)["detector"])
by_eager = eager(export.DetectorModule(detector.cpu()))
raw_torch = np.stack([by_eager(image[None, None])[0][0] for image in letterboxed])  # (n, 4 + 7, anchors)


# %%
def run_all(engine):
    """Each network's probability of every test image by one engine, the raw boxes, and those kept."""
    pipeline = onnx_backend.open_pipeline(folder, engine, threads=1)
    pipeline = replace(pipeline, score_threshold=prediction.MIN_SCORE)
    outputs = [pipeline.run_triage(image) for image in enhanced]
    columns = np.array([[output.prob for output in own.values()] for own in outputs])
    raw = np.stack([pipeline.detector(image) for image in letterboxed])
    found_boxes = [
        pipeline.detect(film, shape).assign(image_id=image_id)
        for film, shape, image_id in zip(enhanced, stored, test["image_id"], strict=True)
    ]
    return columns, raw, pd.concat(found_boxes, ignore_index=True)


with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # as many engines in parallel
    results = dict(zip(onnx_backend.ENGINES, pool.map(run_all, onnx_backend.ENGINES), strict=True))


# %%
def furthest_box(own):
    """Greatest distance, px, of a torch box above 0.05 from the nearest one of its film and type."""
    worst, groups = 0.0, dict(list(own.groupby(["image_id", "lesion_type"])))
    for key, sure in boxes_by_torch[boxes_by_torch["score"] > 0.05].groupby(
        ["image_id", "lesion_type"]
    ):
        mine = groups[key][list(CORNERS)].to_numpy() if key in groups else np.full((1, 4), np.inf)
        gaps = np.abs(sure[list(CORNERS)].to_numpy()[:, None] - mine[None]).max(axis=2)
        worst = max(worst, gaps.min(axis=1).max())
    return worst


study, rows, falls = test["study_id"].to_numpy(), {}, {}
area_torch = classification.weighted_auroc(y, by_torch)
map_torch = detection.mean_average_precision(truth, boxes_by_torch)[0]
for engine, (columns, raw, own) in results.items():
    score = decision.prob(columns)
    area = classification.weighted_auroc(y, score)
    fall = intervals.bootstrap(lambda w, a=area: a(w) - area_torch(w), study, **draws)
    in_map = detection.mean_difference(truth, own, boxes_by_torch, test, **draws)
    falls[engine] = fall.value, in_map.value
    rows[engine] = {
        "score, furthest": np.abs(score - by_torch).max(),
        "any network's, furthest": np.abs(columns - prob).max(), "box, furthest, px": furthest_box(own),
        "raw box, furthest, px": np.abs(raw - raw_torch)[:, :4].max(),
        "raw confidence, furthest": np.abs(raw - raw_torch)[:, 4:].max(),
        "AUROC": classification.auroc(y, score), "less torch's": f"{fall:+.4f}",
        "mAP@0.5": detection.mean_average_precision(truth, own)[0], "less torch's ": f"{in_map:+.4f}",
    }  # fmt: skip
exact = rows["onnxruntime"], rows["openvino"]
assert all(row["score, furthest"] < 1e-4 and row["box, furthest, px"] < 0.5 for row in exact)
assert all(row["any network's, furthest"] < 1e-4 for row in exact)  # a vote may hide one
assert all(row["raw box, furthest, px"] < 0.5 for row in exact)
assert all(row["raw confidence, furthest"] < 1e-4 for row in exact)
# An untrained detector gives every box nearly the same score: their order, and with it AUROC and
# mAP, is then decided by the last bit of a sum, which differs between processors.
if boxes_by_torch["score"].max() > 0.05:
    assert all(abs(row["AUROC"] - classification.auroc(y, by_torch)) < 5e-4 for row in exact)
    assert all(abs(row["mAP@0.5"] - map_torch) < 5e-4 for row in exact)
parity = pd.DataFrame(rows).T
parity.drop(columns=["less torch's", "less torch's "]).astype(float).round(4)

# %%
parity[["less torch's", "less torch's "]].set_axis(
    ["AUROC, less torch's", "mAP, less torch's"], axis=1
)

# %% tags=["remove-cell"]
good = [name for name, fall in falls.items() if min(fall) > -allowed]
glue_values("c16", {
    "good": ", ".join(good),
    "torch-auroc": f"{classification.auroc(y, by_torch):.4f}",
    "torch-map": f"{map_torch:.4f}",
})

# %% [markdown]
# {glue:text}`c16-n` {glue:text}`c16-kind` of {glue:text}`c16-n-studies` studies with {glue:text}`c16-boxes` boxes; torch has an AUROC of
# {glue:text}`c16-torch-auroc` and a mAP of {glue:text}`c16-torch-map`; intervals by study. In float32 scores agree to four decimals, those of each network before the vote too, and boxes to half a pixel, which the cell
# asserts. In eight bits look at that second column: a vote hides what becomes of a network with a small weight, and neither score nor AUROC tells. Engines whose AUROC and mAP are not lower than torch's by {glue:text}`c16-allowed` or more: {glue:text}`c16-good`. That is a sieve by point values, and an interval in the table may be wider than {glue:text}`c16-allowed`. It is also one by the test
# split: it tells what each engine costs, and whoever takes one into use should choose it on films held out of training.
#
# ## How fast
#
# Now at {glue:text}`c16-timed-px` px for triage and {glue:text}`c16-timed-view` px for the detector (the paper's sizes are 384 and 640 px). Weights do not matter for time, so the networks are untrained; one network a backbone, and the film with its mirror image, as
# everywhere in this book. By turns, so that a busy moment of the machine hits all alike. PyTorch runs as it comes, but for
# maps that lie channels last. Trainings of this book are given settings besides (`workflow.COMPUTE`): that memory is kept makes PyTorch faster here too, and would bring the factors below down; that threads sleep while they
# wait makes it slower, alone on a machine, and would raise them. So neither is set.

# %%
speed = folder / "timed"
speed.mkdir(exist_ok=True)
squares = [cv2.resize(film, (numbers.timed_px,) * 2) for film in enhanced[:8]]
filled = [letterbox(film, numbers.timed_size)[0] for film in enhanced[:8]]
modules = {
    name: export.TriageModule([networks.build_network(name, seed=numbers.seed)]).eval() for name in NETWORKS
}
modules["yolo11l"] = export.DetectorModule(yolo.build_detector(LESION_TYPES, numbers.seed)).eval()
sized = {name: speed / f"{name}.onnx" for name in modules}
seen = {name: filled if name == "yolo11l" else squares for name in modules}
written = export.write_each([
    (module, seen[name][0].shape, sized[name], seen[name]) for name, module in modules.items()
])  # fmt: skip


# %%
def made(ask):
    """The pipeline at these sizes, its gate open, from functions that run networks."""
    open_gate = replace(decision, thresholds={"youden": -1.0})
    return Pipeline(
        {name: lambda square, name=name: NetworkOutput(*(one[0] for one in ask[name](square[None, None])))
         for name in NETWORKS},
        lambda film: ask["yolo11l"](film[None, None])[0][0],
        open_gate, LESION_TYPES, 0.5, numbers.timed_px, numbers.timed_size, numbers.cache_px,
        numbers.clip_limit, numbers.tiles,
    )  # fmt: skip


asked = {"PyTorch eager": {name: eager(module) for name, module in modules.items()}}
for engine, (_, form, _) in onnx_backend.ENGINES.items():
    suffix = ".onnx" if form == "float32" else f".{form}.onnx"
    asked[engine] = {
        name: onnx_backend.open_network(path.with_suffix(suffix), engine) for name, path in sized.items()
    }
engines = {name: made(own) for name, own in asked.items()}


# %%
def stages(pipeline, grey):
    """Milliseconds of each stage for one film."""
    marks = [time.perf_counter()]
    film = pipeline.enhance(grey)
    marks.append(time.perf_counter())
    looks = {}
    square = cv2.resize(film, (numbers.timed_px,) * 2, interpolation=cv2.INTER_AREA)
    for name, ask in pipeline.triage.items():
        looks[name] = ask(square)
        marks.append(time.perf_counter())
    pipeline.decide(looks, film, grey.shape)
    marks.append(time.perf_counter())
    return 1000 * np.diff(marks)


greys = [np.repeat(np.repeat(film, 2, axis=0), 2, axis=1) for film in enhanced[:8]]
taken = {name: [] for name in engines}
for turn in range(-1, rounds):
    for name, pipeline in engines.items():
        one = stages(pipeline, greys[turn % len(greys)])
        if turn >= 0:  # the first round warms up
            taken[name].append(one)
labels = ["CLAHE", *(NETWORK_NAMES[name] for name in NETWORKS), "YOLO11-L"]
medians = pd.DataFrame({n: np.median(own, axis=0) for n, own in taken.items()}, labels).T
whole = {name: np.sum(own, axis=1) for name, own in taken.items()}
medians["one film"] = [np.median(own) for own in whole.values()]

# %% [markdown]
# How fast could they be? Each needs a certain number of multiplications and additions, and the machine does so many a second at best. We measure that on one large convolution, and in int8,
# which torch does not convolve, on a product of matrices:


# %%
def peak(operation, count, times=8):
    """Operations a second, the best of some repetitions of one that needs `count`."""
    best = np.inf
    for _ in range(times):
        begun = time.perf_counter()
        operation()
        best = min(best, time.perf_counter() - begun)
    return count / best


def convolve(maps, kernel):
    """A convolution of 3 × 3 with 512 channels in and out."""
    with torch.no_grad():
        return torch.conv2d(maps, kernel, padding=1)


maps = torch.randn(1, 512, 64, 64).to(memory_format=torch.channels_last)
kernel = torch.randn(512, 512, 3, 3).to(memory_format=torch.channels_last)
needed = 2 * maps[0, 0].numel() * kernel.numel()
peaks = {}
for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
    peaks[kind] = peak(partial(convolve, maps.to(dtype), kernel.to(dtype)), needed)
whole_numbers = torch.randint(-100, 100, (2048, 2048), dtype=torch.int8)
peaks["int8"] = peak(lambda: torch._int_mm(whole_numbers, whole_numbers), 2 * 2048**3)
counts = {}
for name, module in modules.items():
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.from_numpy(seen[name][0])[None, None])
    counts[name] = counter.get_total_flops()
operations = sum(counts.values())
bits = {"openvino-bfloat16": "bfloat16"} | {n: "int8" for n in engines if n.endswith("int8")}
limit = {name: 1000 * operations / peaks[bits.get(name, "float32")] for name in engines}
medians["limit"] = pd.Series(limit)
medians["of the limit"] = medians["limit"] / medians["one film"]

# %%
rng = np.random.default_rng(numbers.seed)


def times_faster(slow, fast):
    """Median of one way's milliseconds over another's, with an interval over rounds."""
    slow, fast = np.asarray(slow), np.asarray(fast)
    drawn = rng.integers(len(slow), size=(1000, len(slow)))
    ratios = np.median(slow[drawn], axis=1) / np.median(fast[drawn], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return intervals.Interval(np.median(slow) / np.median(fast), low, high, len(slow), len(slow), 1000)


faster = {name: times_faster(whole["PyTorch eager"], whole[name]) for name in engines}
medians[labels].round(0).astype(int).rename_axis(columns="ms")

# %%
table = medians[["one film", "limit"]].round(0).astype(int)
table["of the limit"] = medians["of the limit"].map("{:.0%}".format)
table["times faster"] = [f"{faster[name]:.1f}" for name in engines]
table

# %% tags=["remove-cell"]
best = max((n for n in good), key=lambda n: faster[n].value)
glue_values("c16", {
    "best": best,
    "best-faster": f"{faster[best]:.1f}",
    "ort-faster": f"{faster['onnxruntime']:.1f}",
    "best-ms": f"{medians.loc[best, 'one film']:.0f}",
    "eager-ms": f"{medians.loc['PyTorch eager', 'one film']:.0f}",
})
eager_share = medians.loc["PyTorch eager", "of the limit"]
glue_values("c16", {
    "eager-limit": f"{eager_share:.0%}",
    "most": f"{1 / eager_share:.1f}",
    "best-limit": f"{medians.loc[best, 'of the limit']:.0%}",
    "gflop": f"{operations / 1e9:.0f}",
})
for name, value in peaks.items():
    glue(f"c16-peak-{name}", f"{value / 1e9:.0f}", display=False)

# %% tags=["hide-input", "remove-output"]
fig, ax = plt.subplots(figsize=(8, 3.4))
start = np.zeros(len(medians))
for stage, colour in zip(
    labels, plt.get_cmap("cividis")(np.linspace(0, 1, len(labels))), strict=True
):
    ax.barh(medians.index, medians[stage], left=start, label=stage, color=colour)
    start += medians[stage].to_numpy()
ax.plot(medians["limit"], np.arange(len(medians)), "D", color="#D55E00", ms=6, label="limit")
ax.invert_yaxis()
ax.set(xlabel="milliseconds a film")
ax.legend(fontsize=8, loc="lower right")
show_figure("c16-fig-latency", fig)

# %% [markdown]
# ```{glue:figure} c16-fig-latency
# :name: fig:latency
# :alt: Bars of milliseconds a film for PyTorch and five engines, divided into stages, each with a mark for the arithmetic limit.
# Median time of one film at {glue:text}`c16-timed-px` px and {glue:text}`c16-timed-view` px, by stage, over {glue:text}`c16-rounds` rounds; {glue:text}`c16-machine`. The films: {glue:text}`c16-kind` of the test
# split; profile {glue:text}`c16-profile`. The mark: what the arithmetic alone would take.
# ```
#
# ONNX Runtime in float32 is {glue:text}`c16-ort-faster` times as fast as PyTorch (95 % over rounds). The fastest engine that passed the sieve above is
# {glue:text}`c16-best`: {glue:text}`c16-best-ms` ms against {glue:text}`c16-eager-ms`, {glue:text}`c16-best-faster` times as fast, at {glue:text}`c16-best-limit` of the machine's
# limit, the mark in {numref}`fig:latency`. One film takes {glue:text}`c16-gflop` billion operations; the machine does {glue:text}`c16-peak-float32` billion a second in float32,
# {glue:text}`c16-peak-bfloat16` in bfloat16 and {glue:text}`c16-peak-int8` in int8. PyTorch itself is at {glue:text}`c16-eager-limit` of the limit: a runtime that did every convolution in full, and all else for nothing, at the speed of this large one,
# would be {glue:text}`c16-most` times as fast in float32; ONNX Runtime is {glue:text}`c16-ort-faster` times.
#
# ## What is left to gain
#
# What does ONNX Runtime do in the rest of the time? It writes down how long each operation takes, by its own clock:


# %%
def by_operation(path, film):
    """Milliseconds of each kind of operation of one film in ONNX Runtime, each the median of its repetitions."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.enable_profiling, options.profile_file_prefix = True, str(speed / "times")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for _ in range(1 + rounds):
        session.run(None, {"film": film})
    log = Path(session.end_profiling())
    events = [own for own in json.loads(log.read_text()) if own["name"].endswith("_kernel_time")]
    log.unlink()
    took = pd.DataFrame([own["args"] | {"ms": own["dur"] / 1000} for own in events])
    took = took[took.groupby("node_index").cumcount() > 0]  # the first one warms up
    return took.groupby(["op_name", "node_index"])["ms"].median().groupby("op_name").sum()


inner = {name: by_operation(path, seen[name][0][None, None]) for name, path in sized.items()}
is_conv = {name: own.index.str.contains("Conv") for name, own in inner.items()}
parts = pd.DataFrame({
    "billion operations": pd.Series(counts) / 1e9,
    "convolutions, ms": {name: own[is_conv[name]].sum() for name, own in inner.items()},
    "all else, ms": {name: own[~is_conv[name]].sum() for name, own in inner.items()},
}).rename(index=NETWORK_NAMES | {"yolo11l": "YOLO11-L"})  # fmt: skip
parts.loc["all four"] = parts.sum()
at_best = 1000 * parts["billion operations"] / parts["convolutions, ms"] / (peaks["float32"] / 1e9)
parts.round(0).astype(int).assign(**{"convolutions, of the limit": at_best.map("{:.0%}".format)})

# %% tags=["remove-cell"]
_, convolving, otherwise = parts.loc["all four"]
share = convolving / (convolving + otherwise)
ours = medians.loc["onnxruntime"]
alone = ours["CLAHE"] + share * (ours["one film"] - ours["CLAHE"])
glue_values("c16", {
    "conv-limit": f"{at_best['all four']:.0%}",
    "conv-share": f"{share:.0%}",
    "conv-most": f"{medians.loc['PyTorch eager', 'one film'] / alone:.1f}",
})

# %% [markdown]
# Convolutions take {glue:text}`c16-conv-share` of the time, and in them the machine does {glue:text}`c16-conv-limit` of its best. Were all else free, ONNX Runtime would be {glue:text}`c16-conv-most` times as fast as PyTorch:
# joining operations cannot give more than that. What is left is fewer bits, or fewer multiplications. The limit counts those of a convolution written out as its sum; algorithms that need fewer exist
# {cite}`lavin2016`, and {ref}`one of them <ex:onnx-winograd>` is an exercise below.
#
# ## A thread that waits
#
# ONNX Runtime gives each network threads of its own. A thread that has done its share does not sleep at once; it asks for more, over and over, because whoever is awake starts sooner. That is meant for one network that answers
# film after film. Where four take turns, the threads of the last one hold a core that the next one needs. So this book opens every network with `session.force_spinning_stop`: when an
# answer is given, its threads sleep. The four networks in turn, opened as the library does it by itself and as `runtime` does it:


# %%
def in_turn(opened):
    """All four networks, one after the other, on one film."""
    runs = [(opened(sized[name]), seen[name][0][None, None]) for name in modules]
    return lambda: [run(film) for run, film in runs]


def awake(path):
    """A network as ONNX Runtime opens it by itself."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda film: session.run(None, {"film": film})


def by_turns(ways):
    """Milliseconds of each way of asking, in rounds, after each has been asked once."""
    waited = {name: [] for name in ways}
    for _ in range(rounds):
        for name, ask in ways.items():
            begun = time.perf_counter()
            ask()
            waited[name].append(1000 * (time.perf_counter() - begun))
            time.sleep(0.1)  # whoever is still awake goes to sleep
    return waited


ways = {"stay awake": in_turn(awake), "sleep": in_turn(onnx_backend.open_network)}
answered = [[own for network in ask() for own in network] for ask in ways.values()]
assert all(np.array_equal(one, two) for one, two in zip(*answered, strict=True))
waited = by_turns(ways)
pd.DataFrame({"ms": pd.Series(waited).map(np.median).round().astype(int)}).rename_axis("threads")

# %% tags=["remove-cell"]
glue_values("c16", {
    "asleep": f"{times_faster(waited['stay awake'], waited['sleep']):.2f}",
})

# %% [markdown]
# Threads that sleep make it {glue:text}`c16-asleep` times as fast (95 % over rounds), without a bit of any answer changed. To see that one must let the networks take turns.
#
# ## Which step makes it faster
#
# The same round at three of ONNX Runtime's levels: the file as it is; with operations joined, as counted above; and with maps laid out for its convolutions besides, which is what every other table of this page shows.


# %%
LEVELS = {
    "as in the file": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "joined": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "joined and laid out": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def at_level(level, path):
    """A network as `runtime` opens it, at one of these levels."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda film: session.run(None, {"film": film})


ways = {name: in_turn(partial(at_level, level)) for name, level in LEVELS.items()}
for ask in ways.values():
    ask()
stepped = by_turns(ways)
as_it_is = stepped["as in the file"]
pd.DataFrame({
    "ms": pd.Series(stepped).map(np.median).round().astype(int),
    "times faster": {name: f"{times_faster(as_it_is, own):.2f}" for name, own in stepped.items()},
}).rename_axis("operations")  # fmt: skip

# %% [markdown]
# ## Many films, and the gate
#
# A server that has a queue may give several films to a network at once. Films a second of every stage and engine, {glue:text}`c16-at-once` at once (CLAHE takes one at a time):


# %%
def films_a_second(run, films_shown):
    """Films a second of one network, in a run after two that warm up: memory is found, then laid out."""
    for _ in range(2):
        run(films_shown)
    begun = time.perf_counter()
    run(films_shown)
    return len(films_shown) / (time.perf_counter() - begun)


at_once = {name: np.stack(seen[name][:4])[:, None] for name in modules}
rates = pd.DataFrame({
    engine: {name: films_a_second(run, at_once[name]) for name, run in own.items()}
    for engine, own in asked.items()
}).T.set_axis(labels[1:], axis=1)  # fmt: skip
rates.insert(0, labels[0], 1000 / medians[labels[0]])
rates.round(1).rename_axis(columns="films a second")

# %%
all_stages = pd.DataFrame({
    "one by one": 1000 / medians["one film"], f"{len(at_once['yolo11l'])} at once": 1 / (1 / rates).sum(axis=1)
})  # fmt: skip
gain = all_stages.iloc[:, 1] / all_stages.iloc[:, 0]
all_stages.round(2).rename_axis(columns="films a second")

# %% tags=["remove-cell"]
glue_values("c16", {
    "at-once": len(at_once["yolo11l"]),
    "gain-least": f"{gain.min():.2f}",
    "gain-most": f"{gain.max():.2f}",
})

# %% [markdown]
# All stages together do {glue:text}`c16-gain-least` to {glue:text}`c16-gain-most` times as many films a second so, by engine, each timed once. Where that is near 1 or below, one film keeps all cores busy, and a queue gains nothing by
# waiting for its next film. A film whose gate stays shut needs no detector, which is the cheapest of all speedups:

# %%
gate_open = (by_torch > decision.thresholds["youden"]).mean()
search = medians["YOLO11-L"]
gated = medians["one film"] - (1 - gate_open) * search
pd.DataFrame(
    {
        "gate open": medians["one film"],
        "gate shut": medians["one film"] - search,
        "this test split": gated,
    }
).round().astype(int)

# %% [markdown]
# ## Paper beside ours
#
# | | paper | this run |
# |---|---|---|
# | runtime | ONNX Runtime | ONNX Runtime, and OpenVINO on the same networks |
# | "low-latency inference on standard clinical hardware" | no time given | {glue:text}`c16-best-ms` ms a film, {glue:text}`c16-best`, {glue:text}`c16-machine` |
# | do the answers change? | not said | the table of parity above |
#
# ## Exercises
#
# Change the chapter first: set `export.CALIBRATION_FILMS = 4` before the export. Which of the two, AUROC or mAP, suffers more?
#
# ```{exercise}
# :label: ex:onnx-hand
# By hand: a convolution has weight 2 and no bias; its batch normalisation has mean 1, variance 4, $\varepsilon = 0$, $\gamma = 3$, $\beta = 5$. What single weight and bias do the
# same? Then round the weight to int8, if the largest of its channel is 6.
# ```

# %% [markdown]
# ````{solution-start} ex:onnx-hand
# :class: dropdown
# ````
# By {eq}`eq:fold` $W' = 2 \cdot 3 / 2 = 3$ and $b' = 5 - 1.5 = 3.5$. By {eq}`eq:int8` $s = 6/127$, $q = \operatorname{round}(63.5) = 64$ (ties to even), and $\hat w = 3.02$.

# %%
v = np.linspace(-2, 2, 9)
assert np.allclose(3 * (2 * v - 1) / 2 + 5, 3 * v + 3.5)
assert np.rint(3 / (6 / 127)) == 64

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:onnx-scale
# In code: how much worse is int8 with one scale for a whole layer, in place of one for each channel? Take the folded first layer.
# ```

# %% [markdown]
# ````{solution-start} ex:onnx-scale
# :class: dropdown
# ````

# %%
whole_scale = np.abs(W).max() / 127
once = np.abs(W - whole_scale * np.rint(W / whole_scale)).mean()
each = np.abs(W - s * q).mean()
assert once > each
print(f"mean error, one scale over a scale a channel: {once / each:.1f}")

# %% [markdown]
# Folding makes it so: it multiplies each channel by a number of its own, and the largest sets the scale of all.
#
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:onnx-winograd
# In code: two neighbouring outputs of a filter of three weights, $y_0 = d_0 g_0 + d_1 g_1 + d_2 g_2$ and $y_1 = d_1 g_0 + d_2 g_1 + d_3 g_2$, take six multiplications. Winograd does it in four {cite}`lavin2016`:
# $m_1 = (d_0 - d_2)\,g_0$, $m_2 = (d_1 + d_2)\,(g_0 + g_1 + g_2)/2$, $m_3 = (d_2 - d_1)\,(g_0 - g_1 + g_2)/2$, $m_4 = (d_1 - d_3)\,g_2$. Find $y_0$ and $y_1$ from these, and try it on a row of a film. How many multiplications does an
# output of a 3 × 3 convolution take, if both axes are done so?
# ```

# %% [markdown]
# ````{solution-start} ex:onnx-winograd
# :class: dropdown
# ````

# %%
y, x = np.array(enhanced[0].shape) // 2
d = enhanced[0][y, x : x + 4].astype(float)
g = W[0, 0, 3, :3].astype(float)
m = (
    (d[0] - d[2]) * g[0], (d[1] + d[2]) * (g[0] + g[1] + g[2]) / 2,
    (d[2] - d[1]) * (g[0] - g[1] + g[2]) / 2, (d[1] - d[3]) * g[2],
)  # fmt: skip
assert np.allclose([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], np.correlate(d, g))

# %% [markdown]
# Along both axes 4 × 4 products give 2 × 2 outputs: 4 an output, in place of 9. The sums of weights are known beforehand. The sums of $d$ are not: they are paid for in additions, in maps
# written and read once more, and in digits, so that it pays for large maps with many channels, if at all.
#
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:onnx-question
# Question the method: "our system runs in 30 ms". Which five things would you have to know before the number means something?
# ```
#
# ```{solution} ex:onnx-question
# :class: dropdown
# On what machine, and on how many of its cores; with which part of the way from the file to the answer; median or best of how many runs, and beside what other load;
# for a film whose gate opens or one whose gate stays shut; and whether the answers are still those whose accuracy was reported.
# ```
#
# ## What to take along
#
# - Put into the file what must not be forgotten: scaling, mirror image, folds.
# - A runtime is faster because it joins operations and lays maps out as its machine reads them; bits come after, and pay only where they do not part what was joined.
# - Measure networks as they will be used: four in turn are not one alone.
# - Rounding is a change of the method. Measure AUROC and mAP again.
# - Say how far from the machine's limit you are, and the next step shows itself.
