"""Inference for people and for hospitals: the web page and its API, reports, the DICOM node."""
