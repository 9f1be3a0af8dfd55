"""A run's networks as ONNX files, with a manifest that says all that a pipeline needs.

One file a triage network: all folds' networks and the mirrored film in it, so that a reader of the
file cannot leave one out. One file for the detector.
"""

import hashlib
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

from dernet_utils.core.files import write_whole
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
EARLY = 1  # of a network's stages, from 0: its maps are a quarter as wide as the film
SMALLEST = 1e-12  # a map whose sum is below it is one of zeros
CALIBRATION_IMAGES = 64  # training films from which int8's scales are taken; ours
GATE_NETWORK = "resnet50"  # whose early maps say whether a film is like those learnt from; ours
SAMPLE_IMAGES = 6  # films to try
QUANTIZED = ["Conv"]  # nearly all of the arithmetic; what follows the last maps stays in float32
# Operations whose outputs an engine leaves as they are. ONNX Runtime knows a convolution of
# integers by rounding on both sides. OpenVINO joins a convolution, its activation and the next
# one's rounding into one; a rounding before the activation parts them, for time and digits.
INT8 = {"onnxruntime-int8": [], "openvino-int8": QUANTIZED}


class TriageModule(nn.Module):
    """The networks of all folds as one."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, film: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `pipeline.Look` holds.

        Args:
            film: uint8, shape (n, 1, px, px).

        Returns:
            Probability of abnormal, the mean over folds, and over the film and its mirror image,
            shape (n,); Grad-CAM, each fold's with a sum of 1, their mean, shape (n, h, w); and the
            means of the first fold's early maps, shape (n, D).
        """
        both = as_input(torch.cat([film, film.flip(-1)]))
        prob, heat, embeddings = [], [], []
        for network in self.networks:
            maps, (early,) = network.forward_intermediates(both, indices=[EARLY])
            prob.append(network.forward_head(maps).sigmoid().unflatten(0, (2, -1))[..., 0])
            upright = maps.unflatten(0, (2, -1))[0]
            # Average and one linear layer follow: the gradient is that layer's weight, up to h w.
            own = torch.einsum("k,nkij->nij", network.get_classifier().weight[0], upright).relu()
            heat.append(own / own.sum(dim=(1, 2), keepdim=True).clamp(min=SMALLEST))
            embeddings.append(early.unflatten(0, (2, -1))[0].mean(dim=(2, 3)))
        return torch.stack(prob).mean(dim=(0, 1)), torch.stack(heat).mean(dim=0), embeddings[0]


class DetectorModule(nn.Module):
    """The detector as `pipeline.Pipeline` asks it."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, film: Tensor) -> Tensor:
        """Return what `yolo.Detector.answers` says of films, uint8 (n, 1, H, W)."""
        return self.detector.answers((film.float() / 255).expand(-1, 3, -1, -1))


def write_onnx(network: TriageModule | DetectorModule, shape: tuple[int, int], path: Path) -> Path:
    """Write a network as ONNX: ``film`` comes in, uint8 (n, 1, height, width), for any n.

    Out come ``prob``, ``heat`` and ``embedding``, or ``boxes``.

    Args:
        network: Its weights are left as they are; its memory may be laid out anew.
        shape: Height and width of an image, fixed in the file.
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
    """Return a network's operations as torch exports them, nothing folded yet."""
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

    Tracing a network takes a minute on some machines, and the folds' differ in their weights only.

    Args:
        first: As `_trace` returns it for the first fold alone.
        network: All folds.

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
            raise RuntimeError("The exporter has renamed weights: a fold's would be lost.")
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
    """Keep back what torch says of anchors in ultralytics' head that our answers do not read."""
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
    """Write an ONNX file's convolutions in 8-bit integers, weights with a scale a channel.

    Args:
        path: As `write_onnx` wrote it.
        films: Training films as the network sees them, uint8 (height, width); the ranges of all
            maps on them become the scales.

    Returns:
        A file beside `path` for each engine of `INT8`.
    """
    written = {engine: path.with_suffix(f".{engine}.onnx") for engine in INT8}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        folded, ranges = Path(folder) / "folded.onnx", Path(folder) / "ranges.json"
        # Batch normalisation must be in the convolutions before they are rounded.
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
    def __init__(self, films: Iterable[np.ndarray]):
        self._films = iter(films)

    def get_next(self) -> dict | None:
        film = next(self._films, None)
        return None if film is None else {"film": film[None, None]}


def export_run(workspace: Workspace, out: Path, int8: bool = False) -> Path:
    """Write a run's networks as ONNX, and the manifest that `runtime.open_pipeline` reads.

    Args:
        workspace: The run; its chapter on the pipeline has been executed.
        out: A folder, made where it is not there; files of an export before are replaced.
        int8: Whether each network is written in 8-bit integers too.

    Returns:
        The manifest.

    Raises:
        DernetError: The run has no pipeline yet, or a checkpoint is missing.
    """
    models, numbers, folder = read_models(workspace), workspace.profile, workspace.weights
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)  # what it says is no longer so
    shown = _calibration(workspace) if int8 else []
    px, size = numbers.triage_px, numbers.detect_size
    squares = [cv2.resize(film, (px, px), interpolation=cv2.INTER_AREA) for film in shown]
    filled = [letterbox(film, size)[0] for film in shown]
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
    """Return the embeddings of training films that a file's first network learnt from, and others.

    Args:
        workspace: The run.
        path: A triage network as `write_onnx` wrote it.

    Returns:
        Shape (n, D) of the films of all folds but the first; (m, D) of the first fold's.
    """
    images = triage_images(workspace)
    training = images[images["split"] == "train"]
    pixels = load_pixels(training["cached_path"], workspace.profile.triage_px).numpy()
    parts = np.array_split(pixels, max(1, len(pixels) // 16))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        early = Path(folder) / path.name  # the part of the network that they come from
        onnx.utils.extract_model(path, early, ["film"], ["embedding"])
        run = open_network(early)
        embeddings = np.concatenate([run(part)[0] for part in parts])
    held_out = (training["fold"] == 0).to_numpy()
    return embeddings[~held_out], embeddings[held_out]


def _calibration(workspace: Workspace) -> list[np.ndarray]:
    """Enhanced films of the training split, drawn by the run's seed."""
    training = detection_images(workspace).training
    some = min(CALIBRATION_IMAGES, len(training))
    return [
        load_cached(path)
        for path in training["cached_path"].sample(some, random_state=workspace.profile.seed)
    ]


def _copy_samples(workspace: Workspace, folder: Path) -> None:
    """Copy virtual films of the test split, to be tried by who has none."""
    folder.mkdir(exist_ok=True)
    for number, film in enumerate(
        detection_images(workspace).test.head(SAMPLE_IMAGES).itertuples(), start=1
    ):
        path = workspace.data_root / "test_images" / f"{film.image_id}.dicom"
        shutil.copyfile(path, folder / f"virtual-{number}.dcm")


def write_each(jobs: Sequence[tuple]) -> list[dict[str, dict[str, str]]]:
    """Write several networks beside one another, on as many cores as torch may use.

    Args:
        jobs: Of each network what `write_all` takes.

    Returns:
        What it returns, in the same order.
    """
    beside = min(len(jobs), torch.get_num_threads())
    with warnings.catch_warnings():
        # joblib replaces a process that has grown, as these do, and warns of it.
        warnings.filterwarnings("ignore", message="A worker stopped")
        return Parallel(n_jobs=beside)(delayed(write_all)(*job) for job in jobs)


def write_all(
    network: TriageModule | DetectorModule,
    shape: tuple[int, int],
    path: Path,
    shown: list[np.ndarray],
) -> dict[str, dict[str, str]]:
    """Write a network in each form; return file and digest of each."""
    files = {"float32": write_onnx(network, shape, path)}
    if len(shown):
        files |= quantize(path, shown)
    return {form: _facts(file) for form, file in files.items()}


def _facts(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
