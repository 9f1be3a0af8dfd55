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
# For each engine, operations whose outputs are not quantised. ONNX Runtime recognises an integer
# convolution by the quantisation of both its input and its output. OpenVINO fuses a convolution
# with its activation and the next quantisation; a quantisation before the activation would prevent
# that, at a cost of time and precision.
INT8 = {"onnxruntime-int8": [], "openvino-int8": QUANTIZED}


class TriageModule(nn.Module):
    """The networks of all folds as one."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, film: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parts of `pipeline.NetworkOutput`.

        Args:
            film: Images, uint8, shape (n, 1, px, px).

        Returns:
            Probability of abnormal, shape (n,): the mean over the folds, and over the image and
            its mirror image. Grad-CAM, shape (n, h, w): the mean of the folds' maps, each with a
            sum of 1. Embedding, shape (n, D): the means of the first fold's early maps.
        """
        both = as_input(torch.cat([film, film.flip(-1)]))
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

    def forward(self, film: Tensor) -> Tensor:
        """Return what `yolo.Detector.answers` returns for images, uint8 (n, 1, H, W)."""
        return self.detector.answers((film.float() / 255).expand(-1, 3, -1, -1))


def write_onnx(network: TriageModule | DetectorModule, shape: tuple[int, int], path: Path) -> Path:
    """Write a network as ONNX.

    The input is ``film``, uint8 (n, 1, height, width) for any n; the outputs are ``prob``,
    ``heat`` and ``embedding``, or ``boxes``.

    Args:
        network: Its weights stay the same; their memory layout may change.
        shape: Height and width of the input, px, fixed in the file.
        path: The file.

    Returns:
        `path`.
    """
    network = network.eval().cpu().to(memory_format=torch.contiguous_format)
    if isinstance(network, TriageModule):
        outputs = ["prob", "heat", "embedding"]
        model = _joined_folds(_trace(TriageModule(network.networks[:1]), shape, outputs), network)
    else:
        model = _trace(network, shape, ["boxes"])
    model = onnxscript.optimizer.optimize(model)
    return write_whole(path, lambda part: onnx.save(model, part))


def _trace(network: nn.Module, shape: tuple[int, int], outputs: list[str]) -> onnx.ModelProto:
    """Return a network's operations as torch exports them, before any optimisation."""
    images = torch.zeros(2, 1, *shape, dtype=torch.uint8)
    with _quiet_exporter():
        program = torch.onnx.export(
            network, (images,), input_names=["film"], output_names=outputs, opset_version=OPSET,
            dynamic_shapes={"film": {0: torch.export.Dim("n")}}, dynamo=True, verbose=False,
            optimize=False,
        )  # fmt: skip
    return program.model_proto


def _joined_folds(first: onnx.ModelProto, network: TriageModule) -> onnx.ModelProto:
    """Return the model of all folds, from that of the first.

    Tracing a network takes a minute on some machines, and the folds differ in their weights only.

    Args:
        first: As `_trace` returns it for the first fold alone.
        network: The networks of all folds.

    Returns:
        A model whose ``prob`` and ``heat`` are means over folds, and whose ``embedding`` is the
        first fold's.
    """
    parts = []
    for fold, own in enumerate(network.networks):
        part = onnx.compose.add_prefix(first, f"fold{fold}/", rename_inputs=False)
        tensors = {f"fold{fold}/networks.0.{name}": t for name, t in own.state_dict().items()}
        replaced = 0
        for stored in part.graph.initializer:
            if stored.name in tensors:
                array = tensors[stored.name].numpy()
                stored.CopyFrom(onnx.numpy_helper.from_array(array, stored.name))
                replaced += 1
        counters = sum(name.endswith("num_batches_tracked") for name in tensors)
        if replaced < len(tensors) - counters:
            raise RuntimeError("The exporter has renamed weights: those of a fold would be lost.")
        parts.append(part)
    joined = parts[0]
    for part in parts[1:]:
        joined.graph.node.extend(part.graph.node)
        joined.graph.initializer.extend(part.graph.initializer)
        joined.graph.value_info.extend(part.graph.value_info)
        joined.functions.extend(part.functions)
    for output, wanted in zip(joined.graph.output, first.graph.output, strict=True):
        every = [output.name.replace("fold0/", f"fold{fold}/", 1) for fold in range(len(parts))]
        made = (every[:1], "Identity") if wanted.name == "embedding" else (every, "Mean")
        joined.graph.node.append(onnx.helper.make_node(made[1], made[0], [wanted.name]))
        output.name = wanted.name
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


def quantize(path: Path, images: Iterable[np.ndarray]) -> dict[str, Path]:
    """Quantise an ONNX file's convolutions to 8-bit integers, with one weight scale per channel.

    Args:
        path: As `write_onnx` wrote it.
        images: Training images of the network's input size, uint8 (height, width); the scales are
            set from the ranges of the feature maps on them.

    Returns:
        The file for each engine of `INT8`, beside `path`.
    """
    written = {engine: path.with_suffix(f".{engine}.onnx") for engine in INT8}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        folded, ranges = Path(folder) / "folded.onnx", Path(folder) / "ranges.json"
        # Batch normalisation must be folded into the convolutions before they are quantised.
        quant_pre_process(path, folded, skip_symbolic_shape=True)
        for engine, out in written.items():
            part = Path(folder) / out.name
            quantize_static(
                folded, part, _CalibrationImages(images), quant_format=QuantFormat.QDQ,
                op_types_to_quantize=QUANTIZED, per_channel=True, weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8, calibrate_method=CalibrationMethod.MinMax,
                extra_options={"OpTypesToExcludeOutputQuantization": INT8[engine]},
                calibration_cache_path=ranges,  # written for the first engine, read for the others
            )  # fmt: skip
            part.replace(out)
    return written


class _CalibrationImages(CalibrationDataReader):
    def __init__(self, images: Iterable[np.ndarray]):
        self._images = iter(images)

    def get_next(self) -> dict | None:
        image = next(self._images, None)
        return None if image is None else {"film": image[None, None]}


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
        "virtual": numbers.virtual,
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
    if numbers.virtual:
        _copy_samples(workspace, out / SAMPLES)
    path = out / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return path


def training_embeddings(workspace: Workspace, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the embeddings of the training split by a file's first network, for the gate.

    Args:
        workspace: The run.
        path: A triage network as `write_onnx` wrote it.

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
        onnx.utils.extract_model(path, early, ["film"], ["embedding"])
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
        path = workspace.data_root / "test_images" / f"{image.image_id}.dicom"
        shutil.copyfile(path, folder / f"virtual-{number}.dcm")


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
        network, shape, path: As `write_onnx` takes them.
        shown: Calibration images, as `quantize` takes them; if empty, only float32 is written.

    Returns:
        ``file`` and ``sha256`` of each form, by its name.
    """
    files = {"float32": write_onnx(network, shape, path)}
    if len(shown):
        files |= quantize(path, shown)
    return {form: _facts(file) for form, file in files.items()}


def _facts(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": file_digest(path)}
