"""What the machine can do, and which process does which job."""

import os
import subprocess
import sys

import pytest
import torch

from dernet_utils.core import machine


@pytest.mark.parametrize("able", [{}, {"amx_bf16": True}, {"avx512_bf16": True}, {"avx2": True}])
def test_bfloat16_helps_where_a_cpu_has_instructions_for_it(able, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(machine, "_onednn_has_bfloat16", lambda: True)
    assert machine.bfloat16_helps(torch.device("cpu")) == any("bf16" in name for name in able)
    monkeypatch.setattr(machine, "_onednn_has_bfloat16", lambda: False)
    assert not machine.bfloat16_helps(torch.device("cpu"))


def test_instructions_hidden_from_onednn_do_not_count():
    code = "from dernet_utils.core import machine as m; print(m.bfloat16_helps(m.device()))"
    hidden = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX", "CUDA_VISIBLE_DEVICES": ""}
    told = subprocess.run([sys.executable, "-c", code], env=hidden, capture_output=True, text=True)
    assert told.stdout.strip() == "False", told.stderr


def test_denormals_are_flushed_and_come_back():
    tiny = torch.tensor([1e-39])
    assert (tiny * 1).item() > 0
    with machine.denormals_flushed():
        assert (tiny * 1).item() == 0
    assert (tiny * 1).item() > 0


def test_single_jobs_use_the_gpus_in_turn(monkeypatch):
    used, run = [], [(name, fold) for name in "abc" for fold in range(5)]
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    for count in (0, 1, 4):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert [machine.claim_jobs([job], run) for job in run] == [[job] for job in run]
    assert used == [job % 4 for job in range(15)]
