"""An answer as others want it: JSON, a picture, a page to print."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

import cv2
import numpy as np

from dernet_utils.core.vocabulary import LESION_STYLE, NETWORK_NAMES, NOTICE
from dernet_utils.inference.pipeline import Prediction

OVERLAY_PX = 1280  # long side of an overlay at most
STROKE = 500  # pixels of its long side to one of a line's width


def as_record(prediction: Prediction) -> dict:
    """Return an answer as plain numbers, text and lists, fit for JSON."""
    return {
        "score": prediction.score,
        "threshold": prediction.threshold,
        "decision": "abnormal" if prediction.abnormal else "normal",
        "networks": prediction.network_probs,
        "boxes": prediction.boxes.to_dict(orient="records"),
    }


def draw_prediction(
    grey: np.ndarray, prediction: Prediction, overridden: Sequence[str] = ()
) -> np.ndarray:
    """Return the film with its boxes and decision drawn on it.

    Args:
        grey: The film as `imaging.read_radiograph` returns it, uint8 (H, W).
        prediction: The pipeline's.
        overridden: Reasons against the film that a person set aside.

    Returns:
        Colours in OpenCV's order, uint8 (h, w, 3), at most 1,280 pixels long, with a line of
        text below the film.
    """
    scale = min(1.0, OVERLAY_PX / max(grey.shape))
    size = tuple(max(1, round(side * scale)) for side in grey.shape[::-1])
    picture = cv2.cvtColor(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), cv2.COLOR_GRAY2BGR)
    stroke = max(1, round(max(size) / STROKE))
    write = {"fontFace": cv2.FONT_HERSHEY_SIMPLEX, "lineType": cv2.LINE_AA, "thickness": stroke}
    small = 0.4 * stroke
    for box in prediction.boxes[::-1].itertuples():
        hue = LESION_STYLE[box.lesion_type][0].lstrip("#")
        colour = tuple(int(hue[at : at + 2], 16) for at in (4, 2, 0))
        corners = np.array([box.xmin, box.ymin, box.xmax, box.ymax]) * scale
        left, top, right, bottom = corners.round().astype(int).tolist()
        cv2.rectangle(picture, (left, top), (right, bottom), colour, stroke)
        place = (left, max(top - 2 * stroke, 12 * stroke))
        text = f"{box.lesion_type} {box.score:.2f}"
        cv2.putText(
            picture,
            text,
            place,
            fontScale=small,
            color=(0, 0, 0),
            **write | {"thickness": 3 * stroke},
        )
        cv2.putText(picture, text, place, fontScale=small, color=colour, **write)
    word = "abnormal" if prediction.abnormal else "normal"
    lines = [
        f"DERNet: {word}, score {prediction.score:.2f}, threshold {prediction.threshold:.2f}",
        NOTICE,
    ]
    width = picture.shape[1] - 8 * stroke
    fit = min(small, width / max(_text_width(line, 1.0) for line in lines))
    if overridden:
        told = "Rejection overridden by a person: " + " ".join(overridden)
        lines[1:1] = _wrapped(told, width, fit)
    write["thickness"] = max(1, round(fit / 0.4))
    below = np.zeros((16 * stroke * len(lines) + 8 * stroke, picture.shape[1], 3), np.uint8)
    for number, line in enumerate(lines):
        at = (4 * stroke, 16 * stroke * (number + 1))
        cv2.putText(below, line, at, fontScale=fit, color=(255, 255, 255), **write)
    return np.vstack([picture, below])


def _text_width(text: str, scale: float) -> int:
    """Width in pixels of a line in the overlay's letters."""
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0]


def _wrapped(text: str, width: int, scale: float) -> list[str]:
    """A text in lines of at most this width, px, as far as its words allow."""
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
    """Return an answer as a page of HTML that stands by itself, to be printed.

    Args:
        grey, prediction, overridden: As `draw_answer` takes them.
        about: The manifest of the networks, as `runtime.read_exported` returns it.
    """
    picture = cv2.imencode(".png", draw_prediction(grey, prediction, overridden))[1].tobytes()
    shown = base64.b64encode(picture).decode()
    word = "abnormal" if prediction.abnormal else "normal"
    probs = [
        (NETWORK_NAMES.get(name, name), prob) for name, prob in prediction.network_probs.items()
    ]
    scores = [("DERNet", prediction.score), *probs]
    corners = ("xmin", "ymin", "xmax", "ymax")
    boxes = [
        (box.lesion_type, f"{box.score:.2f}", *(f"{getattr(box, edge):.0f}" for edge in corners))
        for box in prediction.boxes.itertuples()
    ]
    height, width = grey.shape
    no_boxes = "none found" if prediction.abnormal else "not looked for"
    warning = ""
    if overridden:
        told = escape(" ".join(overridden))
        warning = f"<p class=warning>A person overrode the rejection of this file. {told}</p>"
    learnt = " They learnt from virtual radiographs only." if about.get("virtual") else ""
    return PAGE.format(
        notice=NOTICE, shown=shown, word=word, warning=warning, width=width, height=height,
        threshold=f"{prediction.threshold:.3f}",
        scores=_rows([(name, f"{value:.3f}") for name, value in scores]),
        boxes=_rows(boxes) or f"<tr><td colspan=6>{no_boxes}</td></tr>",
        made_by=escape(str(about.get("made_by", ""))) + "." + learnt,
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
<h1>Spine radiograph: {word}</h1>
<p class=notice>{notice}.</p>
{warning}
<img src="data:image/png;base64,{shown}" alt="The film with the boxes of the table below.">
<h2>Probability of abnormal</h2>
<table>{scores}</table>
<p>Above {threshold} DERNet calls a film abnormal, and the detector is asked.</p>
<h2>Lesions</h2>
<table><tr><th>type<th>confidence<th>left<th>top<th>right<th>bottom</tr>{boxes}</table>
<p>Places in pixels of the film, {width} × {height}.</p>
<footer><p>{made_by}</p></footer>
</html>
"""
