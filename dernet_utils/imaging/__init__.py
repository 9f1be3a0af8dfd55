"""From a file to a network's input: DICOM, PNG and JPEG, grey levels, CLAHE, boxes, the cache.

Other wings may use `reader` (a file as a `radiograph.Radiograph`), `radiograph`, `enhance` (Eq. 1),
`boxes` (letterboxing, intersection over union, non-maximum suppression), `cache`, and
`dicom.read_header` for the headers of a dataset. The rest of `dicom`, `grey_levels` and `picture`
serve `reader`.
"""
