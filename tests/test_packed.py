"""Weights in 8 bits: their error, their size, and files that are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dernet_utils.core.errors import DernetError
from dernet_utils.core.packed import LEAST, SCALE, pack, read_weights, unpack, write_packed
from dernet_utils.triage.networks import build_network


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return build_network("resnet50").state_dict()


def test_each_number_is_off_by_half_a_step_at_most(state):
    packed = pack(state)
    back = unpack(packed)
    assert back.keys() == state.keys()
    rounded = [name for name in state if name + SCALE in packed]
    assert len(rounded) > 40
    for name, tensor in state.items():
        assert back[name].shape == tensor.shape and back[name].dtype == tensor.dtype
        if name not in rounded:
            assert torch.equal(back[name], tensor)
            continue
        half = packed[name + SCALE].view(-1, *[1] * (tensor.ndim - 1)) / 2
        assert ((back[name] - tensor).abs() <= half * 1.001).all()


def test_a_channel_of_zeros_stays_zero():
    weight = torch.zeros(2, LEAST)
    weight[1] = 0.5
    assert torch.equal(unpack(pack({"w": weight}))["w"], weight)


def test_a_file_takes_a_quarter_of_the_size_and_comes_back(tmp_path: Path, state):
    whole, packed = tmp_path / "whole.safetensors", tmp_path / "packed.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, whole)
    write_packed(packed, state, {"network": "resnet50"})
    assert packed.stat().st_size < 0.27 * whole.stat().st_size
    tensors, facts = read_weights(packed)
    assert facts == {"network": "resnet50"}
    assert all(torch.equal(tensors[k], v) for k, v in unpack(pack(state)).items())
    assert all(torch.equal(v, state[k]) for k, v in read_weights(whole)[0].items())


def test_missing_and_damaged_files_are_refused_in_a_sentence(tmp_path: Path, state):
    path = write_packed(tmp_path / "w.safetensors", {"w": state["conv1.weight"]}, {})
    content = path.read_bytes()
    for damaged in (b"", content[:5], content[:200], content[:-1], b"PK\x03\x04" + content):
        path.write_bytes(damaged)
        with pytest.raises(DernetError, match="damaged"):
            read_weights(path)
    path.unlink()
    with pytest.raises(DernetError, match="There is no"):
        read_weights(path)
