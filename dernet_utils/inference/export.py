"""A run's networks as ONNX files, with a manifest of everything else that a pipeline needs.

Each triage network has one file, which holds the networks of all folds and also runs the mirrored
image, so that a user of the file cannot omit either. The detector has one file.
"""

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxscript.optimizer
import torch
from joblib import Parallel, delayed
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from dernet_utils.core.files import file_digest, write_whole
from dernet_utils.core.vocabulary import LESION_TYPES, NOTICE
from dernet_utils.core.workspace import Workspace, commit
from dernet_utils.detection.images import detection_images
from dernet_utils.detection.training import load_detector
from dernet_utils.detection.yolo import Detector
from dernet_utils.imaging.boxes import letterbox
from dernet_utils.imaging.enhance import load_cached
from dernet_utils.inference.models import read_models
from dernet_utils.inference.onnx_backend import MANIFEST, SAMPLES, open_network
from dernet_utils.inference.ood import fit_embedding_gate
from dernet_utils.triage.crossvalidation import read_decision, triage_images
from dernet_utils.triage.networks import as_input
from dernet_utils.triage.training import load_network, load_pixels

OPSET = 20
EARLY = 1  # index of the stage for embeddings: its maps are a quarter as wide as the image
SMALLEST = 1e-12  # a map with a smaller sum counts as zero
CALIBRATION_IMAGES = 64  # training images from which int8's scales are set; ours
GATE_NETWORK = "resnet50"  # its embedding is checked by the out-of-distribution gate; ours
SAMPLE_IMAGES = 6  # sample radiographs for users without their own
QUANTIZED = ["Conv"]  # nearly all of the arithmetic; the layers after the last maps stay in float32
# Each engine has a file of its own. ONNX Runtime recognises an integer convolution by the
# quantisation of both its input and its output. OpenVINO fuses a convolution with its activation
# and the next quantisation; a quantisation before the activation would prevent that, at a cost of
# time and precision.
INT8 = ("onnxruntime-int8", "openvino-int8")


class TriageModule(nn.Module):
    """The networks of all folds as one."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parts of `pipeline.NetworkOutput`.

        Args:
            image: Images, uint8, shape (n, 1, px, px).

        Returns:
            Probability of abnormal, shape (n,): the mean over the folds, and over the image and
            its mirror image. Grad-CAM, shape (n, h, w): the mean of the folds' maps, each with a
            sum of 1. Embedding, shape (n, D): the means of the first fold's early maps.
        """
        both = as_input(torch.cat([image, image.flip(-1)]))
        prob, heat, embeddings = [], [], []
        for network in self.networks:
            maps, (early,) = network.forward_intermediates(both, indices=[EARLY])
            prob.append(network.forward_head(maps).sigmoid().unflatten(0, (2, -1))[..., 0])
            upright = maps.unflatten(0, (2, -1))[0]
            # Pooling and a linear layer follow: the gradient is its weight, up to the factor h w.
            own = torch.einsum("k,nkij->nij", network.get_classifier().weight[0], upright).relu()
            heat.append(own / own.sum(dim=(1, 2), keepdim=True).clamp(min=SMALLEST))
            embeddings.append(early.unflatten(0, (2, -1))[0].mean(dim=(2, 3)))
        return torch.stack(prob).mean(dim=(0, 1)), torch.stack(heat).mean(dim=0), embeddings[0]


class DetectorModule(nn.Module):
    """The detector as `pipeline.Pipeline` runs it."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> Tensor:
        """Return what `yolo.Detector.answers` returns for images, uint8 (n, 1, H, W)."""
        return self.detector.answers((image.float() / 255).expand(-1, 3, -1, -1))


def _write_parts(
    network: TriageModule | DetectorModule, shape: tuple[int, int], folder: Path
) -> list[Path]:
    """Write one ONNX file per fold of a triage network, or one for the detector.

    Tracing takes half a minute per network on some machines, and the folds of a network differ in
    their weights only. So the first is traced, and the others get their own weights.

    Args:
        network, shape: As `write_all` takes them.
        folder: Where the files are written.

    Returns:
        The files, whose inputs and outputs are those of `write_all`'s; only the first has an
        ``embedding``.
    """
    network = network.eval().cpu().to(memory_format=torch.contiguous_format)
    if isinstance(network, DetectorModule):
        models = [_trace(network, shape, ["boxes"])]
    else:
        folds = [TriageModule([own]) for own in network.networks]
        first = _trace(folds[0], shape, ["prob", "heat", "embedding"])
        models = [first, *(_with_weights(first, fold) for fold in folds[1:])]
        for model in models[1:]:
            del model.graph.output[-1]
    paths = [folder / f"{number}.onnx" for number in range(len(models))]
    for model, path in zip(models, paths, strict=True):
        onnx.save(onnxscript.optimizer.optimize(model), path)
    return paths


def _trace(network: nn.Module, shape: tuple[int, int], outputs: list[str]) -> onnx.ModelProto:
    """Return a network's operations as torch exports them, nothing folded yet."""
    images = torch.zeros(2, 1, *shape, dtype=torch.uint8)
    with _quiet_exporter():
        program = torch.onnx.export(
            network, (images,), input_names=["image"], output_names=outputs, opset_version=OPSET,
            dynamic_shapes={"image": {0: torch.export.Dim("n")}}, dynamo=True, verbose=False,
            optimize=False,
        )  # fmt: skip
    return program.model_proto


def _with_weights(traced: onnx.ModelProto, network: nn.Module) -> onnx.ModelProto:
    """Return a traced network with the weights of another one of the same architecture."""
    model = onnx.ModelProto()
    model.CopyFrom(traced)
    tensors = network.state_dict()
    replaced = 0
    for stored in model.graph.initializer:
        if stored.name in tensors:
            array = tensors[stored.name].numpy()
            stored.CopyFrom(onnx.numpy_helper.from_array(array, stored.name))
            replaced += 1
    counters = sum(name.endswith("num_batches_tracked") for name in tensors)
    if replaced < len(tensors) - counters:
        raise RuntimeError("The exporter has renamed weights: a fold's would be lost.")
    return model


def _join_folds(parts: list[onnx.ModelProto]) -> onnx.ModelProto:
    """Return the model of all folds, from the models of each, float or quantised.

    Returns:
        A model whose ``prob`` and ``heat`` are means over folds, and whose ``embedding`` is the
        first fold's.
    """
    if len(parts) == 1:
        return parts[0]
    parts = [
        onnx.compose.add_prefix(part, f"fold{fold}/", rename_inputs=False)
        for fold, part in enumerate(parts)
    ]
    joined = parts[0]
    for part in parts[1:]:
        joined.graph.node.extend(part.graph.node)
        joined.graph.initializer.extend(part.graph.initializer)
        joined.graph.value_info.extend(part.graph.value_info)
    for output in joined.graph.output:
        name = output.name.removeprefix("fold0/")
        every = [f"fold{fold}/{name}" for fold in range(len(parts))]
        made = ("Identity", every[:1]) if name == "embedding" else ("Mean", every)
        joined.graph.node.append(onnx.helper.make_node(*made, [name]))
        output.name = name
    return joined


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppress torch's warnings about anchors in ultralytics' head; our outputs do not use them."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attributes")
            yield
    finally:
        log.setLevel(level)


def _quantize(path: Path, images: Iterable[np.ndarray]) -> dict[str, Path]:
    """Quantise an ONNX file's convolutions to 8-bit integers, with one weight scale per channel.

    Args:
        path: The file of one network. ONNX Runtime's quantisation takes a time that grows with the
            square of the number of operations, so folds are quantised before they are joined.
        images: Training images of the network's input size, uint8 (height, width); the ranges of
            the feature maps on them become the scales.

    Returns:
        The file of each engine of `INT8`, beside `path`.
    """
    folded = path.with_suffix(".folded.onnx")
    # Batch normalisation must be folded into the convolutions before they are quantised.
    quant_pre_process(path, folded, skip_symbolic_shape=True)
    both_sides, inputs_only = (path.with_suffix(f".{engine}.onnx") for engine in INT8)
    quantize_static(
        folded, both_sides, _CalibrationImages(images), quant_format=QuantFormat.QDQ,
        op_types_to_quantize=QUANTIZED, per_channel=True, weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8, calibrate_method=CalibrationMethod.MinMax,
    )  # fmt: skip
    onnx.save(_without_output_quantization(onnx.load(both_sides)), inputs_only)
    return dict(zip(INT8, (both_sides, inputs_only), strict=True))


def _without_output_quantization(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the quantisation of convolutions' outputs, except where a convolution reads it."""
    nodes = model.graph.node
    quantizer = {own.input[0]: own for own in nodes if own.op_type == "QuantizeLinear"}
    dequantizer = {own.input[0]: own for own in nodes if own.op_type == "DequantizeLinear"}
    convolutions = [own for own in nodes if own.op_type in QUANTIZED]
    read = {name for own in convolutions for name in own.input}
    renamed = {}
    for node in convolutions:
        first = quantizer[node.output[0]]
        second = dequantizer[first.output[0]]
        if second.output[0] not in read:
            renamed[second.output[0]] = node.output[0]
            nodes.remove(first)
            nodes.remove(second)
    for node in nodes:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
    used = {name for node in nodes for name in node.input}
    for stored in [own for own in model.graph.initializer if own.name not in used]:
        model.graph.initializer.remove(stored)
    return model


class _CalibrationImages(CalibrationDataReader):
    def __init__(self, images: Iterable[np.ndarray]):
        self._images = iter(images)

    def get_next(self) -> dict | None:
        image = next(self._images, None)
        return None if image is None else {"image": image[None, None]}


def export_run(workspace: Workspace, out: Path, int8: bool = False) -> Path:
    """Write a run's networks as ONNX, and the manifest that `onnx_backend.open_pipeline` reads.

    Args:
        workspace: The run; the chapter on the pipeline has been executed in it.
        out: The folder, created if missing; files of an earlier export are replaced.
        int8: Whether each network is also written with 8-bit convolutions.

    Returns:
        The manifest's path.

    Raises:
        DernetError: The run has no pipeline yet, or a checkpoint is missing.
    """
    models, numbers, folder = read_models(workspace), workspace.profile, workspace.weights
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)  # it does not describe the new files
    shown = _calibration(workspace) if int8 else []
    px, size = numbers.triage_px, numbers.detect_size
    squares = [cv2.resize(image, (px, px), interpolation=cv2.INTER_AREA) for image in shown]
    filled = [letterbox(image, size)[0] for image in shown]
    jobs = [
        (
            TriageModule([load_network(name, folder / one)[0] for one in own]),
            (px, px),
            out / f"{name}.onnx",
            squares,
        )
        for name, own in models["triage"].items()
    ]
    detector = DetectorModule(load_detector(folder / models["detector"])[0])
    *triage, found = write_each([*jobs, (detector, size, out / "yolo11l.onnx", filled)])
    seen = fit_embedding_gate(*training_embeddings(workspace, out / f"{GATE_NETWORK}.onnx"))
    manifest = {
        "notice": NOTICE,
        "made_by": f"dernet-utils {commit()}, torch {torch.__version__}, onnx {onnx.__version__}",
        "profile": numbers.name,
        "virtual": workspace.virtual,
        "triage": dict(zip(models["triage"], triage, strict=True)),
        "detector": found,
        "gate": {"network": GATE_NETWORK} | _facts(seen.save(out / "gate.npz")),
        "decision": asdict(read_decision(workspace)),
        "lesion_types": LESION_TYPES,
        "score_threshold": models["score_threshold"],
        "triage_px": px,
        "detect_size": size,
        "cache_px": numbers.cache_px,
        "clip_limit": numbers.clip_limit,
        "tiles": numbers.tiles,
    }
    if workspace.virtual:
        _copy_samples(workspace, out / SAMPLES)
    path = out / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return path


def training_embeddings(workspace: Workspace, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the embeddings of the training split by a file's first network, for the gate.

    Args:
        workspace: The run.
        path: A triage network as `write_all` wrote it.

    Returns:
        Those of the images on which this network was trained, all folds but the first, shape
        (n, D); those of the first fold's images, which were held out, shape (m, D).
    """
    images = triage_images(workspace)
    training = images[images["split"] == "train"]
    pixels = load_pixels(training["cached_path"], workspace.profile.triage_px).numpy()
    parts = np.array_split(pixels, max(1, len(pixels) // 16))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        early = Path(folder) / path.name  # the part of the network that computes embeddings
        onnx.utils.extract_model(path, early, ["image"], ["embedding"])
        run = open_network(early)
        embeddings = np.concatenate([run(part)[0] for part in parts])
    held_out = (training["fold"] == 0).to_numpy()
    return embeddings[~held_out], embeddings[held_out]


def _calibration(workspace: Workspace) -> list[np.ndarray]:
    """Return enhanced images of the training split, drawn with the run's seed."""
    training = detection_images(workspace).training
    some = min(CALIBRATION_IMAGES, len(training))
    return [
        load_cached(path)
        for path in training["cached_path"].sample(some, random_state=workspace.profile.seed)
    ]


def _copy_samples(workspace: Workspace, folder: Path) -> None:
    """Copy virtual radiographs of the test split, for users who have none of their own."""
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(
        detection_images(workspace).test.head(SAMPLE_IMAGES).itertuples(), start=1
    ):
        shutil.copyfile(image.dicom_path, folder / f"virtual-{number}.dcm")


def write_each(jobs: Sequence[tuple]) -> list[dict[str, dict[str, str]]]:
    """Write several networks in parallel, on as many cores as torch may use.

    Args:
        jobs: The arguments of `write_all`, for each network.

    Returns:
        The results of `write_all`, in the same order.
    """
    beside = min(len(jobs), torch.get_num_threads())
    with warnings.catch_warnings():
        # joblib replaces a process whose memory has grown, as happens here, and warns of it.
        warnings.filterwarnings("ignore", message="A worker stopped")
        return Parallel(n_jobs=beside)(delayed(write_all)(*job) for job in jobs)


def write_all(
    network: TriageModule | DetectorModule,
    shape: tuple[int, int],
    path: Path,
    shown: list[np.ndarray],
) -> dict[str, dict[str, str]]:
    """Write a network in float32 and, given calibration images, in int8.

    Args:
        network: Its weights stay the same; their memory layout may change.
        shape: Height and width of the input, px, fixed in the files.
        path: The float32 file; the others have its name and their engine's. The input is ``image``,
            uint8 (n, 1, height, width) for any n; the outputs are ``prob``, ``heat`` and
            ``embedding``, or ``boxes``.
        shown: Calibration images: training images of the input's size, uint8 (height, width); if
            empty, only float32 is written.

    Returns:
        ``file`` and ``sha256`` of each form, by its name.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        parts = _write_parts(network, shape, Path(folder))
        forms = {"float32": parts}
        if len(shown):
            quantized = [_quantize(part, shown) for part in parts]
            forms |= {engine: [own[engine] for own in quantized] for engine in INT8}
        files = {}
        for form, own in forms.items():
            suffix = ".onnx" if form == "float32" else f".{form}.onnx"
            joined = _join_folds([onnx.load(part) for part in own])
            written = write_whole(
                path.with_suffix(suffix), lambda part, model=joined: onnx.save(model, part)
            )
            files[form] = _facts(written)
    return files


def _facts(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": file_digest(path)}
