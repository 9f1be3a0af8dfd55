"""Algorithm 1, Phase III, as one `pipeline` over torch checkpoints or ONNX files.

`ood` detects files that are no radiograph of a spine; `export` writes the ONNX files. What a server
needs (`pipeline`, `onnx_backend`, `ood`) does not import torch.
"""
