"""From a file to a network's input: DICOM, PNG and JPEG, grey levels, CLAHE, boxes, the cache.

Other wings use `reader` (a file as a `radiograph.Radiograph`), `enhance` (Eq. 1), `boxes`
(letterboxing, intersection over union, non-maximum suppression) and `cache`. `dicom` and
`grey_levels` belong to the reader; a dataset's headers are read by `dicom.read_header`.
"""
