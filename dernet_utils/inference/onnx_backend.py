"""The pipeline from exported ONNX files, run by ONNX Runtime or OpenVINO, without torch."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import file_digest
from dernet_utils.core.workspace import Workspace
from dernet_utils.inference.ood import EmbeddingGate
from dernet_utils.inference.pipeline import NetworkOutput, Pipeline
from dernet_utils.triage.ensemble import Decision

# Seen where it may use SSE only: an exception, or empty arrays.
OPENVINO_FAILED = (
    "OpenVINO cannot run this network on this processor, which may lack AVX: choose the engine "
    "onnxruntime."
)
MANIFEST = "manifest.json"
MANIFEST_KEYS = {
    "made_by", "triage", "detector", "gate", "decision", "lesion_types", "score_threshold",
    "triage_px", "detect_size", "cache_px", "clip_limit", "tiles",
}  # fmt: skip
SAMPLES = "samples"  # folder of sample radiographs, beside the manifest
# For each engine: the runtime, the form of a network's file, and the inference precision.
ENGINES = {
    "onnxruntime": ("onnxruntime", "float32", "f32"),
    "onnxruntime-int8": ("onnxruntime", "onnxruntime-int8", "f32"),
    "openvino": ("openvino", "float32", "f32"),
    "openvino-bfloat16": ("openvino", "float32", "bf16"),
    "openvino-int8": ("openvino", "openvino-int8", "f32"),
}
Run = Callable[[np.ndarray], list[np.ndarray]]  # takes uint8 (n, 1, height, width)


def require_export(workspace: Workspace) -> Path:
    """Return the folder of a run's exported networks.

    Raises:
        DernetError: They have not been exported yet.
    """
    if not (workspace.models / MANIFEST).is_file():
        name = workspace.profile.name
        raise DernetError(
            f"The profile {name!r} has no exported networks yet: `make book PROFILE={name}` trains "
            "and exports them."
        )
    return workspace.models


def read_export(folder: Path) -> dict:
    """Return the manifest of exported networks.

    Args:
        folder: As `export.export_run` wrote it.

    Raises:
        DernetError: The manifest is missing or damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DernetError(f"There is no {path}: write one with `dernet export --out {folder}`.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        missing = MANIFEST_KEYS - manifest.keys()
    except (ValueError, AttributeError) as error:
        raise DernetError(f"{path} is damaged ({error}): export the networks again.") from error
    if missing:
        names = ", ".join(sorted(missing))
        raise DernetError(f"{path} is damaged (it lacks {names}): export the networks again.")
    return manifest


def _decision(folder: Path, manifest: dict) -> Decision:
    """Return the manifest's decision; refuse one that lacks a part, as an older export's does."""
    try:
        return Decision(**manifest["decision"])
    except (TypeError, ValueError) as error:
        raise DernetError(
            f"{folder / MANIFEST} has no decision that this version can read ({error}): export the "
            "networks again."
        ) from error


def _checked(folder: Path, facts: dict) -> Path:
    """Return the path of a file in the manifest; refuse a file with another digest."""
    path = Path(folder) / facts["file"]
    if path.is_file() and file_digest(path) == facts["sha256"]:
        return path
    raise DernetError(
        f"{path} is missing or not the file that {Path(folder) / MANIFEST} names: export the "
        "networks again."
    )


def open_pipeline(
    folder: Path,
    engine: str = "onnxruntime",
    threads: int | None = None,
    threshold: str = "youden",
) -> Pipeline:
    """Return the pipeline of exported networks.

    Args:
        folder: As `export.export_run` wrote it.
        engine: One of `ENGINES`.
        threads: Threads per network; None for as many as there are cores.
        threshold: Name of the decision's threshold.

    Raises:
        DernetError: The engine is unknown, its files were not exported, a file differs from the
            manifest's, its decision is damaged or an older version's, or as `read_export` raises.
    """
    if engine not in ENGINES:
        raise DernetError(f"The engine is one of {', '.join(ENGINES)}, not {engine!r}.")
    folder, manifest = Path(folder), read_export(folder)
    form = ENGINES[engine][1]
    networks = [*manifest["triage"].values(), manifest["detector"]]
    if any(form not in network for network in networks):
        raise DernetError(
            f"{folder} has no networks for {engine}: export them with `dernet export --int8 "
            f"--out {folder}`."
        )
    decision = _decision(folder, manifest)
    with ThreadPoolExecutor(1) as pool:  # checks each file while the previous one is loaded
        paths = pool.map(lambda network: _checked(folder, network[form]), networks)
        *runs, detector = (open_network(path, engine, threads) for path in paths)
    triage = {
        name: _triage_function(run) for name, run in zip(manifest["triage"], runs, strict=True)
    }
    return Pipeline(
        triage,
        lambda filled: detector(filled[None, None])[0][0],
        decision,
        tuple(manifest["lesion_types"]),
        manifest["score_threshold"],
        manifest["triage_px"],
        tuple(manifest["detect_size"]),
        manifest["cache_px"],
        manifest["clip_limit"],
        manifest["tiles"],
        threshold,
    )


def open_embedding_gate(folder: Path) -> tuple[str, EmbeddingGate]:
    """Return the name of the network whose embedding the gate checks, and the gate.

    Args:
        folder: As `export.export_run` wrote it.

    Raises:
        DernetError: As `read_export` and `EmbeddingGate.load` raise, or the gate's file differs
            from the manifest's.
    """
    facts = read_export(folder)["gate"]
    return facts["network"], EmbeddingGate.load(_checked(folder, facts))


def _triage_function(run: Run) -> Callable[[np.ndarray], NetworkOutput]:
    def run_one(square: np.ndarray) -> NetworkOutput:
        prob, heat, embedding = run(square[None, None])
        return NetworkOutput(float(prob[0]), heat[0], embedding[0])

    return run_one


def open_network(path: Path, engine: str = "onnxruntime", threads: int | None = None) -> Run:
    """Return a function that runs an ONNX file.

    Args:
        path: As `export.write_all` wrote it.
        engine, threads: As `open_pipeline` takes them.

    Returns:
        A function of images, uint8 (n, 1, height, width); it returns all outputs of the file, and
        raises DernetError where OpenVINO computes none on this processor.
    """
    library, _, precision = ENGINES[engine]
    if library == "onnxruntime":
        return _onnxruntime(path, threads)
    return _openvino(path, precision, threads)


def _onnxruntime(path: Path, threads: int | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Each network has its own threads. By default they keep spinning when the network has finished,
    # on cores that the next network needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images})


def _openvino(path: Path, precision: str, threads: int | None) -> Run:
    import openvino

    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if threads:
        hints["INFERENCE_NUM_THREADS"] = threads
    compiled = openvino.Core().compile_model(path, "CPU", hints)

    def run(images: np.ndarray) -> list[np.ndarray]:
        try:
            outputs = [np.array(one) for one in compiled(images).values()]
        except RuntimeError as error:
            raise DernetError(OPENVINO_FAILED) from error
        if any(len(one) != len(images) for one in outputs):
            raise DernetError(OPENVINO_FAILED)
        return outputs

    return run
