"""DERNet, rebuilt as a research book: the tested code that more than one chapter needs.

Modules import in one direction, from the bottom of this list to its top::

    errors      what went wrong, in one sentence
    profiles    smoke, laptop, night, paper: the numbers of a run, frozen
    workspace   where a run keeps its files
    folder, data    a VinDr-SpineXR folder as checked tables; folds by study
    imaging     DICOM, PNG, JPEG to 8-bit grey; CLAHE; the image cache
    donor, anatomy, lesions, films, dicom, cohort    the virtual radiographs
    stats       intervals by resampling studies
    evaluate    what a classifier's answers are worth
    detection_metrics    what a detector's answers are worth
    machine     what the hardware can do
    triage      normal or abnormal: networks, training, probabilities
    ensemble    one answer from several networks: weights, thresholds, calibration
    crossvalidation    a network and a fold are one job; test labels under seal
    paper       the paper's printed results, beside ours
    losses      the detector's loss, Eqs. 4 to 6, written for reading
    offline, views, yolo, detect    where the lesions are: YOLO11-L, training, boxes
    rivals      the other detectors of Table 3, on equal terms
    results     what long runs have found, kept in the book
    explain     where networks look, and whether that is where the lesion is
    audit       what printed numbers imply for one another
    pipeline, report    Algorithm 1, Phase III; its answer as JSON and as a picture
    outliers    what is no radiograph of a spine
    runtime     the pipeline from ONNX files, without torch
    examine, dicom_report, app, node    a file from anywhere, answered; the web page; DICOM
    figures     the drawing that chapters share
    predict, export     a run's networks as a pipeline, and as ONNX files
    workflow    chapters executed, the book staged and built
    estimate    what a whole training would take on this machine
    cli         the command `dernet`
"""

__version__ = "0.1.0"
