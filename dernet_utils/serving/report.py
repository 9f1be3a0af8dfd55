"""A prediction as a JSON record, as lines of text, as an overlay, and as a printable page."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

import cv2
import numpy as np

from dernet_utils.core.vocabulary import CORNERS, LESION_STYLE, NETWORK_NAMES, NOTICE
from dernet_utils.inference.pipeline import Prediction

OVERLAY_PX = 1280  # longest side of an overlay
STROKE = 500  # pixels of the overlay's long side per pixel of line width


def as_record(prediction: Prediction) -> dict:
    """Return a prediction as a dict of numbers, text and lists, ready for JSON.

    Returns:
        ``score`` and ``threshold`` in [0, 1], ``decision`` (``abnormal`` or ``normal``),
        ``networks`` (probability by name), ``boxes`` (a dict per box, as in `Prediction.boxes`).
    """
    return {
        "score": prediction.score,
        "threshold": prediction.threshold,
        "decision": "abnormal" if prediction.abnormal else "normal",
        "networks": prediction.network_probs,
        "boxes": prediction.boxes.to_dict(orient="records"),
    }


def as_text(record: dict) -> str:
    """Return a file's prediction as lines of text: the decision, then one line per box.

    Args:
        record: As `service.predict_file` returns it.
    """
    line = "{file}: {decision}, score {score:.3f}, threshold {threshold:.3f}"
    box = "  {lesion_type} {score:.2f} at {xmin:.0f}, {ymin:.0f} to {xmax:.0f}, {ymax:.0f}"
    return "\n".join([line.format(**record), *(box.format(**one) for one in record["boxes"])])


def draw_prediction(
    grey: np.ndarray, prediction: Prediction, overridden: Sequence[str] = ()
) -> np.ndarray:
    """Return the radiograph with its boxes and decision drawn on it.

    Args:
        grey: The image's `Radiograph.pixels`, uint8 (H, W).
        prediction: The pipeline's prediction for this image.
        overridden: Reasons for a rejection that the user overrode.

    Returns:
        The image, at most 1,280 pixels long, and lines of text below it; colours in OpenCV's order,
        uint8 (h, w, 3).
    """
    scale = min(1.0, OVERLAY_PX / max(grey.shape))
    size = tuple(max(1, round(side * scale)) for side in grey.shape[::-1])
    small = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    picture = cv2.cvtColor(small, cv2.COLOR_GRAY2BGR)
    stroke = max(1, round(max(size) / STROKE))
    font = {"fontFace": cv2.FONT_HERSHEY_SIMPLEX, "lineType": cv2.LINE_AA}
    font_scale = 0.4 * stroke
    for box in prediction.boxes[::-1].itertuples():
        hue = LESION_STYLE[box.lesion_type][0].lstrip("#")
        colour = tuple(int(hue[at : at + 2], 16) for at in (4, 2, 0))
        corners = np.array([box.xmin, box.ymin, box.xmax, box.ymax]) * scale
        left, top, right, bottom = corners.round().astype(int).tolist()
        cv2.rectangle(picture, (left, top), (right, bottom), colour, stroke)
        text = f"{box.lesion_type} {box.score:.2f}"
        last = picture.shape[1] - _text_width(text, font_scale) - stroke  # rightmost that fits
        position = (max(0, min(left, last)), max(top - 2 * stroke, 12 * stroke))
        for shade, thickness in (((0, 0, 0), 3 * stroke), (colour, stroke)):  # outlined in black
            style = {"fontScale": font_scale, "color": shade, "thickness": thickness}
            cv2.putText(picture, text, position, **font, **style)
    decision = "abnormal" if prediction.abnormal else "normal"
    lines = [
        f"DERNet: {decision}, score {prediction.score:.2f}, threshold {prediction.threshold:.2f}",
        NOTICE,
    ]
    width = picture.shape[1] - 8 * stroke
    fit = min(font_scale, width / max(_text_width(line, 1.0) for line in lines))
    if overridden:
        warning = "Rejection overridden by the user: " + " ".join(overridden)
        lines[1:1] = _wrapped(warning, width, fit)
    style = {"fontScale": fit, "color": (255, 255, 255), "thickness": max(1, round(fit / 0.4))}
    below = np.zeros((16 * stroke * len(lines) + 8 * stroke, picture.shape[1], 3), np.uint8)
    for number, line in enumerate(lines):
        position = (4 * stroke, 16 * stroke * (number + 1))
        cv2.putText(below, line, position, **font, **style)
    return np.vstack([picture, below])


def _text_width(text: str, scale: float) -> int:
    """Return the width of a line in the overlay's font, px."""
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0]


def _wrapped(text: str, width: int, scale: float) -> list[str]:
    """Return a text in lines of at most this width, px; a longer word gets a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _text_width(longer, scale) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def html_page(
    grey: np.ndarray, prediction: Prediction, about: Mapping, overridden: Sequence[str] = ()
) -> str:
    """Return a prediction as a self-contained HTML page for printing.

    Args:
        grey, prediction, overridden: As `draw_prediction` takes them.
        about: The networks' manifest, as `onnx_backend.read_export` returns it.
    """
    picture = cv2.imencode(".png", draw_prediction(grey, prediction, overridden))[1].tobytes()
    encoded = base64.b64encode(picture).decode()
    decision = "abnormal" if prediction.abnormal else "normal"
    probs = [
        (NETWORK_NAMES.get(name, name), prob) for name, prob in prediction.network_probs.items()
    ]
    scores = [("DERNet", prediction.score), *probs]
    boxes = [
        (box.lesion_type, f"{box.score:.2f}", *(f"{getattr(box, edge):.0f}" for edge in CORNERS))
        for box in prediction.boxes.itertuples()
    ]
    height, width = grey.shape
    no_boxes = "None found." if prediction.abnormal else "The detector was not run."
    warning = ""
    if overridden:
        reasons = escape(" ".join(overridden))
        warning = f"<p class=warning>The user overrode the rejection of this file. {reasons}</p>"
    trained = " Trained on virtual radiographs only." if about.get("virtual") else ""
    return PAGE.format(
        notice=NOTICE, picture=encoded, decision=decision, warning=warning,
        width=width, height=height,
        threshold=f"{prediction.threshold:.3f}",
        scores=_rows([(name, f"{value:.3f}") for name, value in scores]),
        boxes=_rows(boxes) or f"<tr><td colspan=6>{no_boxes}</td></tr>",
        made_by=escape(str(about.get("made_by", ""))) + "." + trained,
    )  # fmt: skip


def _rows(rows: Sequence[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return "".join(f"<tr>{row}</tr>" for row in cells)


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>DERNet: report</title>
<style>
body {{ font: 11pt/1.45 system-ui, sans-serif; max-width: 48rem; }}
body {{ margin: 1.5rem auto; padding: 0 1rem; }}
img {{ display: block; max-width: 100%; max-height: 60vh; margin: 1rem 0; }}
table {{ border-collapse: collapse; margin: .5rem 0 1rem; }}
th, td {{ text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ccc; }}
.notice, .warning {{ color: #9a3b20; font-weight: 600; }}
</style>
<h1>Spine radiograph: {decision}</h1>
<p class=notice>{notice}.</p>
{warning}
<img src="data:image/png;base64,{picture}" alt="The radiograph with the boxes listed below.">
<h2>Probability of abnormality</h2>
<table>{scores}</table>
<p>A radiograph is called abnormal above the score threshold of {threshold}; only then is the
detector run.</p>
<h2>Lesions</h2>
<table><tr><th>Class<th>Confidence<th>Left<th>Top<th>Right<th>Bottom</tr>{boxes}</table>
<p>Coordinates in pixels of the radiograph, {width} × {height}.</p>
<footer><p>{made_by}</p></footer>
</html>
"""
