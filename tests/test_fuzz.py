"""Damaged files, tables and uploads: each ends in a result or in a sentence, and nothing dies.

About a minute here, always with the same examples; for hours, with new ones, run
``pytest tests/test_fuzz.py --hypothesis-profile long``.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import write_dataset
from dicom_files import (
    encode,
    encode_jpeg,
    encode_picture,
    grey_picture,
    lut,
    make_dataset,
    patient_radiograph,
    to_bytes,
)
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import uid

from dernet_utils.core.errors import DernetError
from dernet_utils.dataset.annotations import read_contents
from dernet_utils.imaging.decoder import Decoder
from dernet_utils.serving import web

pytestmark = pytest.mark.slow

DIED = "ended the process"
TABLE = "annotations/train.csv"


def examples(number: int) -> settings:
    """Settings with this many examples, or as many times more as the profile asks for."""
    return settings(
        max_examples=number * settings.default.max_examples // 100,
        suppress_health_check=list(HealthCheck),
    )


def whole_files() -> dict[str, bytes]:
    """A small whole file of each form, transfer syntax and kind of header."""
    stored = (grey_picture(40, 32).astype(np.uint16) << 4) + 5
    signed = stored.astype(np.int16) - 2048
    table = lut(list(range(0, 4096, 4)), 0, 12)
    files = {
        syntax.keyword: encode(make_dataset(stored, 12), syntax)
        for syntax in (
            uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.RLELossless,
            uid.DeflatedExplicitVRLittleEndian, uid.JPEG2000Lossless, uid.JPEGLSLossless,
        )
    }  # fmt: skip
    files |= {
        syntax.keyword: encode_jpeg(make_dataset(stored, 12), syntax)
        for syntax in (uid.JPEGLosslessSV1, uid.JPEGLossless, uid.JPEGExtended12Bit)
    }
    picture = grey_picture(40, 32)
    return files | {
        "LUTs": to_bytes(
            make_dataset(stored, 12, VOILUTSequence=[table], ModalityLUTSequence=[table])
        ),
        "window": to_bytes(
            make_dataset(signed, 12, WindowCenter=[1, 2], WindowWidth=[9, 400], RescaleSlope=2)
        ),
        "patient": patient_radiograph(),
        "PNG": encode_picture(".png", picture),
        "colour PNG": encode_picture(".png", np.dstack([picture] * 3)),
        "16-bit PNG": encode_picture(".png", picture.astype(np.uint16) << 7),
        "JPEG": encode_picture(".jpg", picture),
        "colour JPEG": encode_picture(".jpg", np.dstack([picture] * 3)),
    }


FILES = whole_files()
ODD_BYTES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(
        [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff", b"\x80\0", b"\xff\xd9", b"nan"]
    ),
)


@st.composite
def damaged(draw, files: dict[str, bytes]) -> bytes:
    """One of the files, in which a few spans are overwritten, left out, repeated or cut off."""
    data = files[draw(st.sampled_from(sorted(files)))]
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(data)))
        odd, span = draw(ODD_BYTES), draw(st.integers(1, 64))
        data = draw(
            st.sampled_from(
                [
                    data[:at] + odd + data[at + len(odd) :],
                    data[:at] + odd + data[at:],
                    data[:at] + data[at + span :],
                    data[:at] + data[at : at + span] * 2 + data[at + span :],
                    data[:at],
                ]
            )
        )
    return data


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as made:
        yield made


@pytest.fixture(scope="module")
def tried() -> Iterator[Counter]:
    """Counts the outcomes; printed at the end (``pytest -s``)."""
    counts = Counter()
    yield counts
    print(dict(counts))


@given(data=damaged(FILES))
@examples(3000)
def test_a_damaged_file_is_read_or_refused(decoder, tried, data):
    try:
        pixels = decoder.decode(data).pixels
    except DernetError as error:
        tried["files refused"] += 1
        assert DIED not in str(error) and "; " in str(error)
    else:
        tried["files read"] += 1
        assert pixels.dtype == np.uint8 and pixels.ndim == 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A folder, and its table in the forms in which tables arrive."""
    root = write_dataset(tmp_path_factory.mktemp("fuzz") / "data", {"train": 2, "test": 1})
    text = (root / TABLE).read_text()
    forms = {
        "plain": text.encode(),
        "mark": text.encode("utf-8-sig"),
        "UTF-16": text.encode("utf-16"),
        "semicolons": text.replace(",", ";").encode(),
        "Windows": text.replace("\n", "\r\n").encode(),
    }
    return root, forms


@given(choice=st.data())
@examples(300)
def test_a_damaged_table_is_read_or_its_problems_are_named(dataset, tried, choice):
    root, forms = dataset
    (root / TABLE).write_bytes(choice.draw(damaged(forms)))
    contents = read_contents(root)
    tried["tables with problems" if contents.problems else "tables read"] += 1
    assert all(problem.message for problem in contents.problems)


@pytest.fixture(scope="module")
def client(service) -> TestClient:
    return TestClient(web.make_app(service, {}), base_url="http://127.0.0.1")


@given(data=damaged(FILES), batch=st.booleans(), override=st.booleans())
@examples(200)
def test_a_damaged_upload_is_answered(client, tried, data, batch, override):
    if batch:
        form = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
            + data
            + b"\r\n--x--\r\n"
        )
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        response = client.post("/api/v1/analyse-batch", content=form, headers=kind)
    else:
        response = client.post(f"/api/v1/analyse?override={override}", content=data)
    tried[f"uploads with status {response.status_code}"] += 1
    assert response.status_code in (200, 400, 413, 422)
    assert DIED not in response.text
