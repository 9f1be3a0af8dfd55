"""From a file to what a network sees: DICOM, PNG and JPEG, grey levels, CLAHE, boxes, the cache.

Others use `reader` (a file as a radiograph), `enhance` (Eq. 1), `boxes` (letterboxing, intersection
over union, non-maximum suppression) and `cache`; `dicom` and `grey_levels` are the reader's own.
"""
