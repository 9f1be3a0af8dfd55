"""A run's networks as ONNX files, with a manifest of everything else that a pipeline needs.

One file per triage network: it holds the networks of all folds and also runs the mirrored image,
so that a user of the file cannot leave one out. One file for the detector.
"""

import hashlib
import json
import logging
import os
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

from dernet_utils.core.vocabulary import LESION_TYPES, NOTICE
from dernet_utils.core.workspace import Workspace, commit
from dernet_utils.dataset.prepared import load_cached
from dernet_utils.detection.images import detection_images
from dernet_utils.detection.training import load_detector
from dernet_utils.detection.yolo import Detector
from dernet_utils.imaging.boxes import letterbox
from dernet_utils.inference.models import read_models
from dernet_utils.inference.onnx_backend import MANIFEST, SAMPLES, open_network
from dernet_utils.inference.ood import fit_embedding_gate
from dernet_utils.triage.crossvalidation import read_decision, triage_images
from dernet_utils.triage.networks import as_input
from dernet_utils.triage.training import load_network, load_pixels

OPSET = 20
EARLY = 1  # index of the stage for embeddings: its maps are a quarter as wide as the image
SMALLEST = 1e-12  # a map with a smaller sum counts as zero
CALIBRATION_IMAGES = 64  # training images that set the scales of int8; ours
GATE_NETWORK = "resnet50"  # its embedding is checked by the out-of-distribution gate; ours
SAMPLE_IMAGES = 6  # sample radiographs for users without their own
QUANTIZED = ["Conv"]  # nearly all of the arithmetic; the layers after the last maps stay in float32
# Operations whose outputs are not quantised for an engine. ONNX Runtime recognises an integer
# convolution by quantisation of both input and output. OpenVINO fuses a convolution with its
# activation and the next quantisation; one before the activation would prevent that, which costs
# time and precision.
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
            Probability of abnormal, the mean over folds, and over the image and its mirror image,
            shape (n,); Grad-CAM, the mean of the folds' maps, each with a sum of 1, shape
            (n, h, w); and the means of the first fold's early maps, shape (n, D).
        """
        both = as_input(torch.cat([film, film.flip(-1)]))
        prob, heat, embeddings = [], [], []
        for network in self.networks:
            maps, (early,) = network.forward_intermediates(both, indices=[EARLY])
            prob.append(network.forward_head(maps).sigmoid().unflatten(0, (2, -1))[..., 0])
            upright = maps.unflatten(0, (2, -1))[0]
            # Pooling and one linear layer follow: the gradient is that layer's weight, up to h w.
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
    outputs = ["boxes"] if isinstance(network, DetectorModule) else ["prob", "heat", "embedding"]
    network = network.eval().cpu().to(memory_format=torch.contiguous_format)
    films = torch.zeros(2, 1, *shape, dtype=torch.uint8)
    with _quiet_exporter():
        program = torch.onnx.export(
            network, (films,), input_names=["film"], output_names=outputs, opset_version=OPSET,
            dynamic_shapes={"film": {0: torch.export.Dim("n")}}, dynamo=True, verbose=False,
        )  # fmt: skip
    part = path.with_name(f".{path.name}.{os.getpid()}")
    program.save(part, external_data=False)
    part.replace(path)
    return path


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppress torch's warnings on anchors in ultralytics' head, which our outputs do not use."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attributes")
            yield
    finally:
        log.setLevel(level)


def quantize(path: Path, films: Iterable[np.ndarray]) -> dict[str, Path]:
    """Quantise an ONNX file's convolutions to 8-bit integers, with one weight scale per channel.

    Args:
        path: As `write_onnx` wrote it.
        films: Training images of the network's input size, uint8 (height, width); the ranges of
            the feature maps on them become the scales.

    Returns:
        The file of each engine of `INT8`, beside `path`.
    """
    written = {engine: path.with_suffix(f".{engine}.onnx") for engine in INT8}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        folded, ranges = Path(folder) / "folded.onnx", Path(folder) / "ranges.json"
        # Batch normalisation must be folded into the convolutions before they are quantised.
        quant_pre_process(path, folded, skip_symbolic_shape=True)
        for engine, out in written.items():
            part = Path(folder) / out.name
            quantize_static(
                folded, part, _CalibrationImages(films), quant_format=QuantFormat.QDQ,
                op_types_to_quantize=QUANTIZED, per_channel=True, weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8, calibrate_method=CalibrationMethod.MinMax,
                extra_options={"OpTypesToExcludeOutputQuantization": INT8[engine]},
                calibration_cache_path=ranges,  # written by the first, read by the others
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
        workspace: The run; its chapter on the pipeline has been executed.
        out: The folder, created if missing; files of an earlier export are replaced.
        int8: Whether each network is also written in 8-bit integers.

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
    """Return the embeddings of the training split, for the gate, by a file's first network.

    Args:
        workspace: The run.
        path: A triage network as `write_onnx` wrote it.

    Returns:
        Shape (n, D), of the images of all folds but the first, on which that network was trained;
        shape (m, D), of the first fold's, which were held out.
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
        # joblib replaces a process whose memory has grown, as these do, and warns of it.
        warnings.filterwarnings("ignore", message="A worker stopped")
        return Parallel(n_jobs=beside)(delayed(write_all)(*job) for job in jobs)


def write_all(
    network: TriageModule | DetectorModule,
    shape: tuple[int, int],
    path: Path,
    shown: list[np.ndarray],
) -> dict[str, dict[str, str]]:
    """Write a network in each form.

    Args:
        network, shape, path: As `write_onnx` takes them.
        shown: Calibration images, as `quantize` takes them; empty: only float32 is written.

    Returns:
        ``file`` and ``sha256`` of each form, by name.
    """
    files = {"float32": write_onnx(network, shape, path)}
    if len(shown):
        files |= quantize(path, shown)
    return {form: _facts(file) for form, file in files.items()}


def _facts(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
