"""Networks as ONNX files, and the pipeline that runs them without torch."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from exported import PX, SIZE, squares

from dernet_utils.core.errors import DernetError
from dernet_utils.core.vocabulary import NETWORKS
from dernet_utils.inference import onnx_backend
from dernet_utils.triage import networks as triage_networks
from dernet_utils.triage.explain import grad_cam
from dernet_utils.triage.networks import predict_probabilities

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_triage_agrees_with_torch(exported, networks, name, engine):
    run = onnx_backend.open_network(exported / f"{name}.onnx", engine)
    for n in (1, 3):
        images = squares(n, (PX, PX))
        prob, heat, embedding = run(images)
        pixels = torch.from_numpy(images)
        expected = np.mean([predict_probabilities(one, pixels) for one in networks[name]], axis=0)
        assert prob == pytest.approx(expected, abs=1e-5)
        maps = [grad_cam(name, one, pixels) for one in networks[name]]
        nonzero = [one.sum(axis=(1, 2)) > 0 for one in maps]
        assert heat.shape == (n, 2, 2) and (heat >= 0).all()
        assert heat.sum(axis=(1, 2)) == pytest.approx(np.mean(nonzero, axis=0), abs=1e-4)
        with torch.no_grad():
            stages = networks[name][0].forward_intermediates(
                triage_networks.as_input(pixels), intermediates_only=True
            )
        assert stages[1].shape[2:] == (PX // 4, PX // 4)
        assert embedding == pytest.approx(stages[1].mean(dim=(2, 3)).numpy(), abs=1e-4)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_detector_agrees_with_torch(exported, detector, engine):
    run = onnx_backend.open_network(exported / "yolo11l.onnx", engine)
    for n in (1, 3):
        images = squares(n, SIZE)
        with torch.no_grad():
            grey = torch.from_numpy(images).float() / 255
            expected = detector.answers(grey.expand(-1, 3, -1, -1)).numpy()
        (found,) = run(images)
        assert found[:, :4] == pytest.approx(expected[:, :4], abs=0.01)  # px
        assert found[:, 4:] == pytest.approx(expected[:, 4:], abs=1e-4)


def test_lower_precision_gives_nearly_the_same_embeddings(exported):
    images = squares(4, (PX, PX))
    expected = onnx_backend.open_network(exported / "resnet50.onnx")(images)[2]
    for engine in ("onnxruntime-int8", "openvino-bfloat16", "openvino-int8"):
        form = onnx_backend.ENGINES[engine][1]
        path = exported / ("resnet50.onnx" if form == "float32" else f"resnet50.{form}.onnx")
        embedding = onnx_backend.open_network(path, engine)(images)[2]
        difference = np.abs(embedding - expected).mean() / expected.mean()
        assert 0 < difference < 0.05


@pytest.mark.parametrize(("engine", "sides"), [("onnxruntime-int8", 2), ("openvino-int8", 1)])
def test_each_engine_has_its_own_quantised_file(exported, engine, sides):
    path = exported / f"resnet50.{engine}.onnx"
    assert path.stat().st_size < (exported / "resnet50.onnx").stat().st_size / 3
    graph = onnx.load(path).graph
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    producer = {name: node.op_type for node in graph.node for name in node.output}
    consumers = {(name, node.op_type) for node in graph.node for name in node.input}
    assert convolutions
    for node in convolutions:
        assert [producer[name] for name in node.input[:2]] == ["DequantizeLinear"] * 2
        assert ((node.output[0], "QuantizeLinear") in consumers) == (sides == 2)


@pytest.mark.parametrize("most", ["SSE41", "AVX"])
def test_on_an_older_processor_openvino_is_right_or_says_so(exported, most):
    """With SSE alone it returns empty arrays."""
    code = (
        "import sys; from pathlib import Path; import numpy as np; "
        "from dernet_utils.core.errors import DernetError; "
        "from dernet_utils.inference.onnx_backend import open_network\n"
        f"path = Path({str(exported / 'yolo11l.onnx')!r}); "
        f"images = np.full((2, 1, *{SIZE}), 90, 'u1')\n"
        "expected = open_network(path)(images)[0]\n"
        "try:\n"
        "    (found,) = open_network(path, 'openvino')(images)\n"
        "    sys.exit(0 if np.allclose(found, expected, atol=0.01) else 'another output')\n"
        "except DernetError as error:\n"
        "    sys.exit(0 if 'onnxruntime' in str(error) else str(error))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": most},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr


def test_no_thread_spins_after_a_run(exported):
    """Spinning threads of one network would occupy the cores that the next one needs."""
    run = onnx_backend.open_network(exported / "yolo11l.onnx", threads=2)
    run(squares(1, SIZE))
    before = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - before < 0.02


def test_the_detector_runs_only_above_the_threshold(exported):
    grey = squares(1, (200, 150))[0, 0]
    abnormal = onnx_backend.open_pipeline(exported).predict(grey)
    assert abnormal.abnormal and len(abnormal.boxes)
    normal = onnx_backend.open_pipeline(exported, threshold="shut").predict(grey)
    assert not normal.abnormal and normal.boxes.empty and normal.score == abnormal.score
    pipeline = onnx_backend.open_pipeline(exported)
    outputs = pipeline.run_triage(pipeline.enhance(grey))
    assert pipeline.heat(outputs).shape == (2, 2)
    name, gate = onnx_backend.open_embedding_gate(exported)
    assert gate.distance(outputs[name].embedding[None]).shape == (1,)


def test_serving_needs_no_torch(exported):
    code = (
        "import sys; from dernet_utils.serving import dicom_node, server, service, web; "
        f"service.InferenceService.open(__import__('pathlib').Path({str(exported)!r})); "
        "heavy = {'torch', 'timm', 'ultralytics', 'matplotlib', 'pandera'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_each_error_names_its_remedy(exported, tmp_path):
    with pytest.raises(DernetError, match="dernet export"):
        onnx_backend.open_pipeline(tmp_path)
    with pytest.raises(DernetError, match="onnxruntime-int8"):
        onnx_backend.open_pipeline(exported, "tensorrt")
    for damaged in ("{", "[]", "{}"):
        (tmp_path / onnx_backend.MANIFEST).write_text(damaged)
        with pytest.raises(DernetError, match="damaged"):
            onnx_backend.open_pipeline(tmp_path)
    manifest = json.loads((exported / onnx_backend.MANIFEST).read_text())
    older = {key: own for key, own in manifest["decision"].items() if key != "network_temperatures"}
    for decision in (older, manifest["decision"] | {"temperature": 0.0}):
        text = json.dumps(manifest | {"decision": decision})
        (tmp_path / onnx_backend.MANIFEST).write_text(text)
        with pytest.raises(DernetError, match="export the networks again"):
            onnx_backend.open_pipeline(tmp_path)
    del manifest["triage"]["resnet50"]["openvino-int8"]
    (tmp_path / onnx_backend.MANIFEST).write_text(json.dumps(manifest))
    networks = (*manifest["triage"].values(), manifest["detector"])
    for name in ("gate.npz", *(one["float32"]["file"] for one in networks)):
        (tmp_path / name).symlink_to(exported / name)
    with pytest.raises(DernetError, match="--int8"):
        onnx_backend.open_pipeline(tmp_path, "openvino-int8")
    (tmp_path / "resnet50.onnx").unlink()
    (tmp_path / "resnet50.onnx").write_bytes(b"another")
    with pytest.raises(DernetError, match="not the file"):
        onnx_backend.open_pipeline(tmp_path)
