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
# **You will be able to** export trained networks to files that other runtimes can read, explain what a runtime
# changes in them and why that makes them faster, round a network's weights to sixteen or eight bits by hand, and show
# whether its outputs stay the same, or by how much they differ.
#
# **You need** {ref}`chap:pipeline` for the pipeline, {ref}`chap:statistics` for intervals.
#
# **It takes** half an hour of reading, and some minutes to run on two cores.
# :::
#
# The paper serves its networks with ONNX Runtime and calls the result "low-latency inference on standard clinical
# hardware" {cite}`dernet`; it gives no time. This chapter takes the same step, measures the time, and asks what it
# costs in accuracy.

# %% tags=["parameters"]
profile = ""  # smoke, laptop, night or paper; empty: DERNET_PROFILE, else laptop
allowed = 0.005  # loss of AUROC and of mAP that is accepted for an engine

# %%
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

# %%
from dernet_utils.book.figures import show_figure
from dernet_utils.book.figures_practice import draw_latency
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
rounds = numbers.timings  # per engine; the engines alternate
folder = workspace.models
export.export_run(workspace, folder, int8=True)
manifest = onnx_backend.read_export(folder)
data = images.detection_images(workspace)
test = data.test.reset_index(drop=True)
truth = data.boxes[data.boxes["image_id"].isin(test["image_id"])]
draws = {"resamples": numbers.bootstrap, "seed": numbers.seed}

# %% tags=["remove-cell"]
glue_values("c16", {
    "profile": numbers.name, "n": len(test), "n-studies": test["study_id"].nunique(), "boxes": len(truth),
    "allowed": f"{allowed:g}", "folds": numbers.folds, "rounds": rounds, "machine": machine.processor_name(),
    "kind": workspace.image_kind,
    "calibration": min(export.CALIBRATION_IMAGES, len(data.training)), "px": numbers.triage_px,
    "timed-px": numbers.timed_px, "timed-view": "{} × {}".format(*numbers.timed_size),
})

# %% [markdown]
# ## What is in the file
#
# An ONNX file holds a network's operations and weights in a format that is independent of any library. Ours take the
# enhanced image as it is, in 8-bit grey, and do everything else inside: the division by 255 and, for triage,
# ImageNet's mean and standard deviation, the mirrored image, and the networks of all {glue:text}`c16-folds` folds. So
# a user of the file cannot forget any of these steps. A manifest beside the files records the rest: input sizes,
# weights of the vote, temperatures, thresholds, and each file's SHA-256.


# %%
def contents(path):
    """Size of a file, its operations, and its outputs."""
    graph = onnx.load(path).graph
    kinds = pd.Series([node.op_type for node in graph.node]).value_counts()
    return {
        "MB": path.stat().st_size / 1e6, "operations": len(graph.node),
        "convolutions": kinds.get("Conv", 0), "normalisations": kinds.get("BatchNormalization", 0),
        "outputs": ", ".join(one.name for one in graph.output),
    }


files = {
    NETWORK_NAMES.get(name, "YOLO11-L"): folder / own["float32"]["file"]
    for name, own in (manifest["triage"] | {"yolo11l": manifest["detector"]}).items()
}
inside = pd.DataFrame({name: contents(path) for name, path in files.items()}).T
inside.astype({"MB": float}).round({"MB": 0})

# %% [markdown]
# Besides the probability, a triage file outputs a heat map, by the formula of {ref}`chap:explainability`, and an
# embedding, which {ref}`chap:outliers` needs.
#
# ## What a runtime changes: fewer operations
#
# In evaluation, batch normalisation is a multiplication and an addition with fixed numbers, and the convolution
# before it is linear. So the two together are one convolution:
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
# The export merges every such pair, hence the zeros in the column *normalisations*. DenseNet121 keeps about half of
# its normalisations: those *before* a convolution ({ref}`chap:densenet121`), where the activation in between prevents
# merging. A runtime goes further: it fuses activations into convolutions and removes duplicate computations. We let
# ONNX Runtime save the optimised graph, and count the operations that remain. One later step is not in this count: it
# rearranges the feature maps in memory to suit the convolutions of this processor.


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
# *bfloat16* is float32 without its last sixteen bits: the same range, and a relative error of at most $2^{-8}$ when
# they are rounded off. *int8* stores an integer from −128 to 127 and one scale per channel,
#
# $$
# q = \operatorname{clip}\bigl( \operatorname{round}(w / s), -128, 127 \bigr),
# \qquad \hat w = s\,q, \qquad s = \frac{\max |w|}{127} ,
# $$ (eq:int8)
#
# so that no weight changes by more than $s/2$. We round the same layer by hand in both ways, and compare bfloat16
# with torch's and int8 with the quantised file:


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
arrays = [onnx.numpy_helper.to_array(one) for one in forms["openvino-int8"].initializer]
same = [own for own in arrays if own.shape == q.shape and own.dtype == np.int8]
apart = min(int(np.abs(own.astype(int) - q).max()) for own in same)
assert apart <= 1  # a tie may be rounded either way
pd.Series({
    "int8": np.abs(W - s * q).mean() / np.abs(W).mean(),
    "bfloat16": np.abs(to_bfloat16(W) - W).mean() / np.abs(W).mean(),
}).round(4).to_frame("mean |error| / mean |weight|, first layer of ResNet50")

# %% [markdown]
# The weights are known in advance; the feature maps between the layers are not, and they need scales too. These come
# from the maps' ranges on {glue:text}`c16-calibration` images of the *training* split; a map is stored as integers
# from 0 to 255 with a zero point of its own. *Where* to quantise the maps is a choice. OpenVINO fuses a convolution,
# the activation after it, and the quantisation of the result into one operation: it needs one quantisation step per
# convolution, on the input. ONNX Runtime recognises an integer convolution by a quantisation step on either side, the
# second before the activation. So each engine gets a file of its own, from the same calibration:

# %%
pd.Series({
    engine: sum(node.op_type == "QuantizeLinear" for node in graph.node) for engine, graph in forms.items()
}).to_frame("quantisation steps for feature maps, ResNet50")

# %% [markdown]
# ## Are the outputs the same?
#
# Every image of the test split goes through five engines: ONNX Runtime in float32 and int8, and OpenVINO in float32,
# bfloat16 and int8. OpenVINO reads the same float32 files and rounds them to bfloat16 itself; in int8 it has files of
# its own. We compare all five with torch: with the predictions of {ref}`chap:ensemble` and
# {ref}`chap:yolo11-training`, and with the detector's raw output, every box at every anchor before any is discarded.

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
        pipeline.detect(image, (row.height, row.width)).assign(image_id=row.image_id)
        for image, row in zip(enhanced, test.itertuples(), strict=True)
    ]
    return columns, raw, pd.concat(found_boxes, ignore_index=True)


with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # engines in parallel
    results = dict(zip(onnx_backend.ENGINES, pool.map(run_all, onnx_backend.ENGINES), strict=True))


# %%
def largest_box_error(own):
    """Greatest distance, px, of a torch box above 0.05 from the nearest one of its image and lesion type."""
    worst, groups = 0.0, dict(list(own.groupby(["image_id", "lesion_type"])))
    confident = boxes_by_torch[boxes_by_torch["score"] > 0.05]
    for key, theirs in confident.groupby(["image_id", "lesion_type"]):
        mine = groups[key][list(CORNERS)].to_numpy() if key in groups else np.full((1, 4), np.inf)
        gaps = np.abs(theirs[list(CORNERS)].to_numpy()[:, None] - mine[None]).max(axis=2)
        worst = max(worst, gaps.min(axis=1).max())
    return worst


# %%
study, rows, losses = test["study_id"].to_numpy(), {}, {}
area_torch = classification.weighted_auroc(y, by_torch)
map_torch = detection.mean_average_precision(truth, boxes_by_torch)[0]
for engine, (columns, raw, own) in results.items():
    score = decision.prob(columns)
    area = classification.weighted_auroc(y, score)
    losses[engine] = {
        "AUROC minus torch's": intervals.bootstrap(lambda w, a=area: a(w) - area_torch(w), study, **draws),
        "mAP minus torch's": detection.mean_difference(truth, own, boxes_by_torch, test, **draws),
    }
    rows[engine] = {
        "score": np.abs(score - by_torch).max(), "any network": np.abs(columns - prob).max(),
        "box, px": largest_box_error(own), "raw box, px": np.abs(raw - raw_torch)[:, :4].max(),
        "raw confidence": np.abs(raw - raw_torch)[:, 4:].max(), "AUROC": classification.auroc(y, score),
        "mAP@0.5": detection.mean_average_precision(truth, own)[0],
    }
parity = pd.DataFrame(rows).T
columns = [("largest difference from torch", name) for name in parity.columns[:5]]
parity.round(4).set_axis(pd.MultiIndex.from_tuples([*columns, ("", "AUROC"), ("", "mAP@0.5")]), axis=1)

# %% [markdown]
# In float32 an engine must compute what torch computes. The next cell asserts it at every profile: the score, each
# network's probability before the vote (the vote could hide one) and the detector's raw confidences agree to within
# $10^{-4}$, raw and reported boxes to within half a pixel. AUROC and mAP are compared only where the detector has
# learnt, that is, where some box has a confidence above 0.05. Barely trained networks, such as those of profile
# smoke, give every image and every box nearly the same score. The order of such scores is decided by the last bit of
# a sum, which differs between processors, and AUROC and mAP depend on nothing but that order.

# %%
for engine in ("onnxruntime", "openvino"):
    row = rows[engine]
    assert row["score"] < 1e-4 and row["box, px"] < 0.5
    assert row["any network"] < 1e-4
    assert row["raw box, px"] < 0.5 and row["raw confidence"] < 1e-4
    if boxes_by_torch["score"].max() > 0.05:
        assert abs(row["AUROC"] - classification.auroc(y, by_torch)) < 5e-4
        assert abs(row["mAP@0.5"] - map_torch) < 5e-4
good = [name for name, own in losses.items() if min(loss.value for loss in own.values()) > -allowed]
glue_values("c16", {
    "good": ", ".join(good) or "none", "torch-map": f"{map_torch:.4f}",
    "torch-auroc": f"{classification.auroc(y, by_torch):.4f}",
})
pd.DataFrame(losses).T.map("{:+.4f}".format)

# %% [markdown]
# The tables rest on {glue:text}`c16-n` {glue:text}`c16-kind` of {glue:text}`c16-n-studies` studies with
# {glue:text}`c16-boxes` boxes; torch has an AUROC of {glue:text}`c16-torch-auroc` and a mAP of
# {glue:text}`c16-torch-map`; intervals are by study. For eight bits, see the column *any network*: a vote hides
# errors of a network with a small weight, so neither the score nor AUROC shows them. Engines whose AUROC and mAP are
# less than {glue:text}`c16-allowed` below torch's: {glue:text}`c16-good`. This selection uses point estimates, and an
# interval in the table may be wider than {glue:text}`c16-allowed`. It also uses the test split, to show what each
# engine costs; choose an engine for deployment on held-out training images, and on the processor that will run it: an
# x86 processor without VNNI instructions adds 8-bit products pairwise in 16 bits. Large sums
# [saturate](https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html) there, so int8 outputs of
# ONNX Runtime differ between processors.
#
# ## How fast
#
# We now time the engines, at {glue:text}`c16-timed-px` px for triage and {glue:text}`c16-timed-view` px for the
# detector (the paper's sizes are 384 and 640 px). The weights hardly affect the time, so the networks are untrained:
# one network per backbone, run on the image and its mirror image, as everywhere in this book. Engines are timed
# alternately, so that a busy moment of the machine affects all alike. PyTorch runs with its defaults, except that
# feature maps are stored channels last.
#
# Training jobs of this book run with further settings (`graph.TRAINING_ENVIRONMENT` in `dernet_utils.book.graph`).
# Keeping freed memory would make PyTorch faster here too, and lower the factors below; putting waiting threads to
# sleep would make it slower on an otherwise idle machine, and raise them. So neither is set.

# %%
speed = folder / "timed"
speed.mkdir(exist_ok=True)
modules = {
    name: export.TriageModule([networks.build_network(name, seed=numbers.seed)]).eval() for name in NETWORKS
}
modules["yolo11l"] = export.DetectorModule(yolo.build_detector(LESION_TYPES, numbers.seed)).eval()
sized = {name: speed / f"{name}.onnx" for name in modules}
squares = [cv2.resize(image, (numbers.timed_px,) * 2) for image in enhanced[:8]]
filled = [letterbox(image, numbers.timed_size)[0] for image in enhanced[:8]]
inputs = {name: filled if name == "yolo11l" else squares for name in modules}
export.write_each([
    (module, inputs[name][0].shape, sized[name], inputs[name]) for name, module in modules.items()
])
runs = {"PyTorch eager": {name: eager(module) for name, module in modules.items()}}
for engine, (_, form, _) in onnx_backend.ENGINES.items():
    suffix = ".onnx" if form == "float32" else f".{form}.onnx"
    runs[engine] = {
        name: onnx_backend.open_network(path.with_suffix(suffix), engine) for name, path in sized.items()
    }


# %%
def pipeline_of(run):
    """The pipeline at these sizes, its gate open, from functions that run networks."""
    def triage(name):
        return lambda square: NetworkOutput(*(out[0] for out in run[name](square[None, None])))

    return Pipeline(
        {name: triage(name) for name in NETWORKS}, lambda image: run["yolo11l"](image[None, None])[0][0],
        replace(decision, thresholds={"youden": -1.0}), LESION_TYPES, 0.5, numbers.timed_px,
        numbers.timed_size, numbers.cache_px, numbers.clip_limit, numbers.tiles,
    )


def time_stages(pipeline, grey):
    """Milliseconds of each stage for one image."""
    outputs, marks = {}, [time.perf_counter()]
    image = pipeline.enhance(grey)
    marks.append(time.perf_counter())
    square = cv2.resize(image, (numbers.timed_px,) * 2, interpolation=cv2.INTER_AREA)
    for name, run in pipeline.triage.items():
        outputs[name] = run(square)
        marks.append(time.perf_counter())
    pipeline.decide(outputs, image, grey.shape)
    return 1000 * np.diff([*marks, time.perf_counter()])


# %%
engines = {name: pipeline_of(own) for name, own in runs.items()}
greys = [np.repeat(np.repeat(image, 2, axis=0), 2, axis=1) for image in enhanced[:8]]
taken = {name: [] for name in engines}
for turn in range(-1, rounds):
    for name, pipeline in engines.items():
        milliseconds = time_stages(pipeline, greys[turn % len(greys)])
        if turn >= 0:  # the first round warms up
            taken[name].append(milliseconds)
labels = ["CLAHE", *(NETWORK_NAMES[name] for name in NETWORKS), "YOLO11-L"]
medians = pd.DataFrame({n: np.median(own, axis=0) for n, own in taken.items()}, labels).T
whole = {name: np.sum(own, axis=1) for name, own in taken.items()}
medians["per image"] = [np.median(own) for own in whole.values()]

# %% [markdown]
# How fast could they be? The networks need a certain number of multiplications and additions, and the machine
# performs at most so many per second. We measure that peak on one large convolution, and for int8, for which torch
# has no convolution, on a product of matrices in ONNX Runtime. A processor without instructions for bfloat16
# converts to float32 and computes there, so its peak is at least that of float32:


# %%
def peak(operation, count, times=8):
    """Operations per second: the best of several runs of an operation that needs `count`."""
    best = np.inf
    for _ in range(times):
        started = time.perf_counter()
        with torch.no_grad():
            operation()
        best = min(best, time.perf_counter() - started)
    return count / best


def integer_product(n):
    """A function that multiplies two n × n matrices of 8-bit integers in ONNX Runtime."""
    a = np.random.default_rng(numbers.seed).integers(0, 256, (n, n), dtype=np.uint8)
    b = (a // 4).astype(np.int8)  # below 64: two products fit into 16 bits
    product = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": {export.OPSET}]>
        product (uint8[{n}, {n}] a) => (int32[{n}, {n}] c) {{ c = MatMulInteger(a, b) }}"""
    )
    product.graph.initializer.append(onnx.numpy_helper.from_array(b, "b"))
    session = onnxruntime.InferenceSession(product.SerializeToString(), providers=["CPUExecutionProvider"])
    small = session.run(None, {"a": a})[0][:8, :8]
    assert (small == a[:8].astype(int) @ b[:, :8].astype(int)).all()
    return lambda: session.run(None, {"a": a})


# %%
maps = torch.randn(1, 512, 64, 64).to(memory_format=torch.channels_last)
kernel = torch.randn(512, 512, 3, 3).to(memory_format=torch.channels_last)  # 512 channels in and out
needed = 2 * maps[0, 0].numel() * kernel.numel()
peaks = {
    kind: peak(partial(torch.conv2d, maps.to(dtype), kernel.to(dtype), padding=1), needed)
    for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
}
peaks["bfloat16"] = max(peaks.values())
peaks["int8"] = peak(integer_product(2048), 2 * 2048**3)

# %%
counts = {}
for name, module in modules.items():
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.from_numpy(inputs[name][0])[None, None])
    counts[name] = counter.get_total_flops()
operations = sum(counts.values())
bits = {"openvino-bfloat16": "bfloat16"} | {n: "int8" for n in engines if n.endswith("int8")}
medians["limit"] = [1000 * operations / peaks[bits.get(name, "float32")] for name in engines]
medians["of the limit"] = medians["limit"] / medians["per image"]
rng = np.random.default_rng(numbers.seed)


def speedup(slow, fast):
    """Ratio of the median milliseconds of two ways, with an interval over rounds."""
    slow, fast = np.asarray(slow), np.asarray(fast)
    drawn = rng.integers(len(slow), size=(1000, len(slow)))
    ratios = np.median(slow[drawn], axis=1) / np.median(fast[drawn], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return intervals.Interval(np.median(slow) / np.median(fast), low, high, len(slow), len(slow), 1000)


faster = {name: speedup(whole["PyTorch eager"], whole[name]) for name in engines}
medians[labels].round(0).astype(int).rename_axis(columns="ms")

# %%
table = medians[["per image", "limit"]].round(0).astype(int).add_suffix(", ms")
table["of the limit"] = medians["of the limit"].map("{:.0%}".format)
table["times faster"] = [f"{faster[name]:.1f}" for name in engines]
table

# %% tags=["hide-input", "remove-output"]
best = max(good or ["onnxruntime"], key=lambda n: faster[n].value)  # untrained networks may leave none
eager_fraction = medians.loc["PyTorch eager", "of the limit"]
glue_values("c16", {
    "best": best, "best-faster": f"{faster[best]:.1f}", "ort-faster": f"{faster['onnxruntime']:.1f}",
    "best-ms": (best_ms := f"{medians.loc[best, 'per image']:.0f}"),
    "best-time": f"{best_ms} ms per image, {best}, {machine.processor_name()}",
    "eager-ms": f"{medians.loc['PyTorch eager', 'per image']:.0f}",
    "eager-limit": f"{eager_fraction:.0%}", "most": f"{1 / eager_fraction:.1f}",
    "best-limit": f"{medians.loc[best, 'of the limit']:.0%}", "gflop": f"{operations / 1e9:.0f}",
} | {f"peak-{name}": f"{value / 1e9:.0f}" for name, value in peaks.items()})
show_figure("c16-fig-latency", draw_latency(medians, labels))

# %% [markdown]
# ```{glue:figure} c16-fig-latency
# :name: fig:latency
# :alt: Bars of milliseconds per image for PyTorch and five engines, divided into stages, with marks for the limit.
# Median time per image at {glue:text}`c16-timed-px` px and {glue:text}`c16-timed-view` px, by stage, over
# {glue:text}`c16-rounds` rounds; {glue:text}`c16-machine`. The images are {glue:text}`c16-kind` of the test split;
# profile {glue:text}`c16-profile`. The mark shows what the arithmetic alone would take.
# ```
#
# ONNX Runtime in float32 is {glue:text}`c16-ort-faster` times as fast as PyTorch (95 % interval over rounds). The
# fastest engine that passed the selection above is {glue:text}`c16-best`: {glue:text}`c16-best-ms` ms against
# {glue:text}`c16-eager-ms`, {glue:text}`c16-best-faster` times as fast, at {glue:text}`c16-best-limit` of the
# machine's limit, the mark in {numref}`fig:latency`. One image takes {glue:text}`c16-gflop` billion operations; the
# machine performs {glue:text}`c16-peak-float32` billion per second in float32, {glue:text}`c16-peak-bfloat16` in
# bfloat16 and {glue:text}`c16-peak-int8` in int8. PyTorch itself reaches {glue:text}`c16-eager-limit` of the limit: a
# runtime that computed every convolution in full at the speed of this large one, and everything else in no time,
# would be {glue:text}`c16-most` times as fast as PyTorch in float32, against {glue:text}`c16-ort-faster` for ONNX
# Runtime.
#
# ## What is left to gain
#
# On what does ONNX Runtime spend its time? It can record how long each operation takes:


# %%
def by_operation(path, image):
    """Milliseconds of each kind of operation for one image, each the median of its repetitions."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.enable_profiling, options.profile_file_prefix = True, str(speed / "times")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for _ in range(1 + rounds):
        session.run(None, {"image": image})
    log = Path(session.end_profiling())
    events = [own for own in json.loads(log.read_text(encoding="utf-8")) if own["name"].endswith("_kernel_time")]
    log.unlink()
    took = pd.DataFrame([own["args"] | {"ms": own["dur"] / 1000} for own in events])
    took = took[took.groupby("node_index").cumcount() > 0]  # the first one warms up
    return took.groupby(["op_name", "node_index"])["ms"].median().groupby("op_name").sum()


inner = {name: by_operation(path, inputs[name][0][None, None]) for name, path in sized.items()}
convolving = {name: own[own.index.str.contains("Conv")].sum() for name, own in inner.items()}

# %%
parts = pd.DataFrame({
    "billion operations": pd.Series(counts) / 1e9, "convolutions, ms": convolving,
    "all else, ms": {name: own.sum() - convolving[name] for name, own in inner.items()},
}).rename(index=NETWORK_NAMES | {"yolo11l": "YOLO11-L"})
parts.loc["all four"] = parts.sum()
at_best = 1000 * parts["billion operations"] / parts["convolutions, ms"] / (peaks["float32"] / 1e9)
_, in_convolutions, otherwise = parts.loc["all four"]
fraction = in_convolutions / (in_convolutions + otherwise)
ours = medians.loc["onnxruntime"]
alone = ours["CLAHE"] + fraction * (ours["per image"] - ours["CLAHE"])
glue_values("c16", {
    "conv-limit": f"{at_best['all four']:.0%}", "conv-share": f"{fraction:.0%}",
    "conv-most": f"{medians.loc['PyTorch eager', 'per image'] / alone:.1f}",
})
parts.round(0).astype(int).assign(**{"convolutions, of the limit": at_best.map("{:.0%}".format)})

# %% [markdown]
# Convolutions take {glue:text}`c16-conv-share` of the time, and in them the machine reaches
# {glue:text}`c16-conv-limit` of its peak. If everything else took no time, ONNX Runtime would be
# {glue:text}`c16-conv-most` times as fast as PyTorch: fusing operations cannot give more than that. Beyond it, one
# needs fewer bits or fewer multiplications. The limit counts the multiplications of a convolution computed directly;
# algorithms that need fewer exist {cite}`lavin2016`, and {ref}`one of them <ex:onnx-winograd>` is an exercise below.
#
# ## Waiting threads
#
# ONNX Runtime gives each network its own threads. A thread that has finished its part does not sleep at once: it
# keeps checking for new work ("spinning"), because a thread that is awake starts sooner. That is meant for one
# network that processes image after image. Where four networks run in turn, the threads of the previous network
# occupy a core that the next one needs. So this book opens every network with `session.force_spinning_stop`: as soon
# as an output is ready, the threads sleep. We time the four networks in turn, opened with the library's defaults and
# by `onnx_backend.open_network`:


# %%
def in_turn(opened):
    """A function that runs all four networks, one after the other, on one image."""
    ready = [(opened(sized[name]), inputs[name][0][None, None]) for name in modules]
    return lambda: [run(image) for run, image in ready]


def opened_with(path, options=None):
    """A network in ONNX Runtime, by default with the library's options."""
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})


def time_alternately(ways):
    """Milliseconds of each way to run the networks, in rounds, after one run to warm up."""
    waited = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            waited[name].append(1000 * (time.perf_counter() - started))
            time.sleep(0.1)  # threads that still spin go to sleep
    return waited


# %%
ways = {"keep spinning": in_turn(opened_with), "sleep": in_turn(onnx_backend.open_network)}
outputs = [[own for network in run() for own in network] for run in ways.values()]
assert all(np.array_equal(one, two) for one, two in zip(*outputs, strict=True))
waited = time_alternately(ways)
glue_values("c16", {"asleep": f"{speedup(waited['keep spinning'], waited['sleep']):.2f}"})
pd.DataFrame({"ms": pd.Series(waited).map(np.median).round().astype(int)}).rename_axis("waiting threads")

# %% [markdown]
# With sleeping threads the four networks are {glue:text}`c16-asleep` times as fast (95 % interval over rounds), and
# every output is the same to the last bit. Timing one network alone would not show this: the networks have to run in
# turn.
#
# ## Which optimisation helps
#
# The same comparison at three of ONNX Runtime's optimisation levels: the file as it is; with operations fused, as
# counted above; and with feature maps also rearranged in memory for its convolutions, the setting of every other
# timing on this page.


# %%
LEVELS = {
    "as in the file": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "fused": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "fused and rearranged": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def at_level(level, path):
    """A network as `onnx_backend.open_network` opens it, at one of these levels."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.graph_optimization_level = level
    return opened_with(path, options)


ways = {name: in_turn(partial(at_level, level)) for name, level in LEVELS.items()}
for run in ways.values():
    run()
stepped = time_alternately(ways)
pd.DataFrame({
    "ms": pd.Series(stepped).map(np.median).round().astype(int),
    "times faster": {name: f"{speedup(stepped['as in the file'], own):.2f}" for name, own in stepped.items()},
}).rename_axis("operations")

# %% [markdown]
# ## Many images, and the gate
#
# A server with a queue may give a network several images at once. The table shows the images per second of every
# stage and engine, for batches of {glue:text}`c16-at-once` (CLAHE takes one at a time):


# %%
def images_per_second(run, batch):
    """Images per second of one network, after two runs to warm up: memory is allocated, then arranged."""
    for _ in range(2):
        run(batch)
    started = time.perf_counter()
    run(batch)
    return len(batch) / (time.perf_counter() - started)


batches = {name: np.stack(inputs[name][:4])[:, None] for name in modules}
rates = pd.DataFrame({
    engine: {name: images_per_second(run, batches[name]) for name, run in own.items()}
    for engine, own in runs.items()
}).T.set_axis(labels[1:], axis=1)
rates.insert(0, labels[0], 1000 / medians[labels[0]])
rates.round(1).rename_axis(columns="images per second")

# %%
at_once = len(batches["yolo11l"])
all_stages = pd.DataFrame({
    "one by one": 1000 / medians["per image"], f"batches of {at_once}": 1 / (1 / rates).sum(axis=1)
})
gain = all_stages.iloc[:, 1] / all_stages.iloc[:, 0]
glue_values("c16", {
    "at-once": at_once, "gain-least": f"{gain.min():.2f}", "gain-most": f"{gain.max():.2f}",
})
all_stages.round(2).rename_axis(columns="images per second")

# %% [markdown]
# In batches all stages together process {glue:text}`c16-gain-least` to {glue:text}`c16-gain-most` times as many
# images per second, depending on the engine; each was timed once. Where the factor is near 1 or below, batches gain
# nothing, and a queue need not wait for its next image. An image that triage calls normal needs no detector, which is
# the simplest way to save time:

# %%
gate_open = (by_torch > decision.thresholds["youden"]).mean()
without = medians["per image"] - medians["YOLO11-L"]
pd.DataFrame({
    "gate open, ms": medians["per image"], "gate closed, ms": without,
    "this test split, ms": without + gate_open * medians["YOLO11-L"],
}).round().astype(int)

# %% [markdown]
# ## Paper beside ours
#
# | | paper | this run |
# |---|---|---|
# | runtime | ONNX Runtime | ONNX Runtime, and OpenVINO on the same networks |
# | "low-latency inference on standard clinical hardware" | no time given | {glue:text}`c16-best-time` |
# | do the outputs change? | not stated | the tables of differences above |
#
# ## Exercises
#
# Change the chapter first: set `export.CALIBRATION_IMAGES = 4` before the export. Which falls more, AUROC or mAP?
#
# ```{exercise}
# :label: ex:onnx-hand
# By hand: a convolution has weight 2 and no bias; its batch normalisation has mean 1, variance 4, $\varepsilon = 0$,
# $\gamma = 3$, $\beta = 5$. What single weight and bias do the same? Then round the weight to int8, if the largest of
# its channel is 6.
# ```

# %% [markdown]
# ````{solution-start} ex:onnx-hand
# :class: dropdown
# ````
# By {eq}`eq:fold` $W' = 2 \cdot 3 / 2 = 3$ and $b' = 5 - 1.5 = 3.5$. By {eq}`eq:int8` $s = 6/127$,
# $q = \operatorname{round}(63.5) = 64$ (ties to even), and $\hat w = 3.02$.

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
# In code: how much worse is int8 with one scale for a whole layer instead of one per channel? Take the folded first
# layer.
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
print(f"mean error with one scale, relative to one scale per channel: {once / each:.1f}")

# %% [markdown]
# Folding is the reason: it multiplies each channel by a different factor, and with one scale the largest channel sets
# the scale of all.
#
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:onnx-winograd
# In code: two neighbouring outputs of a filter of three weights, $y_0 = d_0 g_0 + d_1 g_1 + d_2 g_2$ and
# $y_1 = d_1 g_0 + d_2 g_1 + d_3 g_2$, take six multiplications. Winograd does it in four {cite}`lavin2016`:
# $m_1 = (d_0 - d_2)\,g_0$, $m_2 = (d_1 + d_2)\,(g_0 + g_1 + g_2)/2$, $m_3 = (d_2 - d_1)\,(g_0 - g_1 + g_2)/2$,
# $m_4 = (d_1 - d_3)\,g_2$. Find $y_0$ and $y_1$ from these, and try it on a row of a radiograph. How many
# multiplications does one output of a 3 × 3 convolution take, if both axes are treated so?
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
)
assert np.allclose([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], np.correlate(d, g))

# %% [markdown]
# Along both axes 4 × 4 products give 2 × 2 outputs: 4 per output instead of 9. The sums of weights are computed once
# in advance. The sums of $d$ are not: they cost additions, feature maps that are written and read once more, and
# precision. So the algorithm pays, if at all, for large maps with many channels.
#
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise}
# :label: ex:onnx-question
# Question the method: "our system runs in 30 ms". Which five things do you have to know before the number means
# anything?
# ```
#
# ```{solution} ex:onnx-question
# :class: dropdown
# On which machine, and on how many of its cores; which steps between the file and the result are included; whether it
# is the median or the best, of how many runs, and under what other load; for a radiograph on which the gate opens or
# one on which it closes; and whether the outputs are still those whose accuracy was reported.
# ```
#
# ## Takeaways
#
# - Put into the file what must not be forgotten: scaling, mirror image, folds.
# - A runtime is faster because it fuses operations and arranges feature maps to suit the processor; fewer bits pay
#   only where they do not separate what was fused.
# - Measure networks as they will be used: four in turn behave differently from one alone.
# - Rounding is a change of the method. Measure AUROC and mAP again.
# - Report how far from the machine's limit you are; it shows which step to take next.
