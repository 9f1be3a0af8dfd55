"""An answer as others want it: JSON, a picture, a page, DICOM."""

import cv2
import numpy as np

from dernet_utils.pipeline import Answer

# One colour a lesion type, the same in every chapter: Okabe and Ito's palette, distinguishable
# with any colour vision; each also has its own dash, so that a grey print is legible.
LESION_STYLE = {
    "Disc space narrowing": ("#56B4E9", "-"),
    "Foraminal stenosis": ("#CC79A7", "--"),
    "Osteophytes": ("#E69F00", "-"),
    "Spondylolysthesis": ("#009E73", "--"),
    "Surgical implant": ("#F0E442", "-"),
    "Vertebral collapse": ("#D55E00", "-."),
    "Other lesions": ("#FFFFFF", ":"),
}
OVERLAY_PX = 1280  # long side of an overlay at most
STROKE = 500  # pixels of its long side to one of a line's width


def as_record(answer: Answer) -> dict:
    """Return an answer as plain numbers, text and lists, fit for JSON."""
    return {
        "score": answer.score,
        "threshold": answer.threshold,
        "decision": "abnormal" if answer.abnormal else "normal",
        "networks": answer.shares,
        "boxes": answer.boxes.to_dict(orient="records"),
    }


def draw_answer(grey: np.ndarray, answer: Answer) -> np.ndarray:
    """Return the film with its boxes and decision drawn on it.

    Args:
        grey: The film as `imaging.read_grey` returns it, uint8 (H, W).
        answer: The pipeline's.

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
    for box in answer.boxes[::-1].itertuples():
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
    word = "abnormal" if answer.abnormal else "normal"
    lines = [
        f"DERNet: {word}, score {answer.score:.2f}, threshold {answer.threshold:.2f}",
        "For research and teaching, not for diagnosis",
    ]
    below = np.zeros((16 * stroke * len(lines) + 8 * stroke, picture.shape[1], 3), np.uint8)
    for number, line in enumerate(lines):
        room = picture.shape[1] / cv2.getTextSize(line, write["fontFace"], 1.0, stroke)[0][0]
        at = (4 * stroke, 16 * stroke * (number + 1))
        cv2.putText(
            below, line, at, fontScale=min(small, 0.95 * room), color=(255, 255, 255), **write
        )
    return np.vstack([picture, below])
