"""Inference, Phase III of Algorithm 1: from a radiograph to a score, a decision and boxes.

`pipeline` is the same for a run's checkpoints (`torch_backend`, listed by `models`) and for
exported ONNX files (`onnx_backend`), which `export` writes. `ood` detects files that are not a
radiograph of a spine. Other wings use all of these except `models`. A server needs `pipeline`,
`onnx_backend` and `ood` only, and these do not import torch.
"""
