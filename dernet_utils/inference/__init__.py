"""Algorithm 1, Phase III, behind one `pipeline`: from torch checkpoints or from ONNX files.

`ood` tells radiographs of a spine from other files; `export` writes the ONNX files. What a server
needs (`pipeline`, `onnx_backend`, `ood`) imports no torch.
"""
