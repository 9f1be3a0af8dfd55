"""Inference for people and for hospital systems: a web page, its API, reports, a DICOM node.

`service` reads, checks and analyses one file. `web` (run by `server`) and `dicom_node` call it, and
`report` and `dicom_report` write its result as JSON, HTML, an overlay or DICOM. Only the command
line uses this wing. A server needs exported networks, not torch, and keeps no uploaded file.
"""
