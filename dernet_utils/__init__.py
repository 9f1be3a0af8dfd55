"""DERNet, rebuilt as a research book: the tested code that more than one chapter needs.

Ten wings and the command line. Each imports only from itself and from those above it::

    core        errors, profiles, the run's folders, the machine, shared words
    imaging     DICOM, PNG, JPEG to 8-bit grey; CLAHE; boxes; the image cache
    dataset     a VinDr-SpineXR folder as checked tables; folds by study
    virtual     virtual radiographs from one donor CT
    metrics     classification and detection metrics, intervals, tests
    triage      normal or abnormal: networks, training, ensemble, explanations
    detection   where the lesions are: YOLO11-L and other detectors
    inference   Algorithm 1 with torch or ONNX networks; out-of-distribution rejection
    serving     web page, API, reports, DICOM node
    book        workflow, pages, figures, records
    cli         the command `dernet`
"""

__version__ = "0.1.0"
