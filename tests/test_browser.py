"""The web page, used as a person uses it, in headless Chromium."""

import base64
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from dicom_files import encode_picture, grey_picture, patient_radiograph
from playwright.sync_api import Page, sync_playwright

from dernet_utils.core.vocabulary import NOTICE
from dernet_utils.inference import onnx_backend
from dernet_utils.serving import web

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(service, exported, tmp_path_factory) -> Iterator[str]:
    """The address of a running server."""
    samples = tmp_path_factory.mktemp("samples")
    (samples / "virtual-1.dcm").write_bytes(patient_radiograph(seed=3))
    about = onnx_backend.read_export(exported)
    application = web.make_app(service, about, samples=samples)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(application, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        threading.Event().wait(0.05)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["desktop", "phone"])
def page(request, browser, address) -> Iterator[Page]:
    """The page; the test fails on a script error or a request to another server."""
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    urls, errors = [], []
    opened.on("request", lambda one: urls.append(one.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    opened.goto(address)
    opened.locator("#about", has_text="profile test").wait_for()
    yield opened
    # Of a file that is no image, and of a request that a test aborts.
    expected = ("the server responded with a status of 422", "net::ERR_FAILED")
    assert [text for text in errors if not any(one in text for one in expected)] == []
    assert all(url.startswith((address, "blob:", "data:")) for url in urls), urls
    opened.close()


def upload(page: Page, *files: tuple[str, bytes]) -> None:
    """Choose files, and wait until all are analysed."""
    before = page.locator("#radiographs li").count()
    page.set_input_files(
        "#files",
        [{"name": n, "mimeType": "application/octet-stream", "buffer": d} for n, d in files],
    )
    page.locator("#radiographs li").nth(before + len(files) - 1).wait_for()
    page.wait_for_selector("#progress", state="hidden", timeout=60_000)


def picture_of(page: Page) -> np.ndarray:
    """Return what the canvas shows, uint8 (h, w, 3)."""
    url = page.evaluate("document.getElementById('canvas').toDataURL()")
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def test_each_form_is_shown_with_its_result(page):
    upload(
        page,
        ("a.dcm", patient_radiograph()),
        ("b.png", encode_picture()),
        ("c.jpg", encode_picture(".jpg")),
    )
    assert page.locator("#radiographs small").all_text_contents()[0].startswith("abnormal, score")
    for number in range(3):
        page.locator("#radiographs button").nth(number).click()
        assert page.locator("#decision").text_content() == "Abnormal"
        assert page.locator("#scores .bar").count() == 4
        assert page.locator("#boxes tr").count() > 0
        buttons = page.locator("#reports .dicom").all()
        assert [button.is_disabled() for button in buttons] == [number > 0] * 2


def test_dragging_changes_the_window_and_buttons_the_view(page):
    upload(page, ("a.png", encode_picture()))
    page.locator("#minimum").fill("1")  # without boxes
    first = picture_of(page)
    page.locator("#canvas").evaluate("canvas => canvas.scrollIntoView({block: 'center'})")
    box = page.locator("#canvas").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] - 80, middle[1] - 60, steps=4)
    page.mouse.up()
    assert int(page.locator("#window").input_value()) == 256 - 80
    assert int(page.locator("#level").input_value()) == 128 - 60
    assert (picture_of(page) != first).any()
    page.locator("#reset").click()
    assert (picture_of(page) == first).all()
    page.locator("#invert").click()
    assert picture_of(page)[first > 200].mean() < 60
    page.locator("#invert").click()
    page.locator("#zoom-in").click()
    page.locator("input[value=pan]").check()
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 40, middle[1], steps=2)
    page.mouse.up()
    assert (picture_of(page) != first).any()
    page.locator("#canvas").press("0")  # by the keyboard
    assert (picture_of(page) == first).all()
    page.locator("#heat").click()
    page.locator("#heat[aria-pressed=true]").wait_for()
    assert np.ptp(picture_of(page).astype(int), axis=2).max() > 30  # in colour


def test_boxes_are_switched_by_type_and_confidence(page):
    upload(page, ("a.dcm", patient_radiograph()))
    rows = page.locator("#boxes tr").count()
    shown = picture_of(page)
    first = page.locator("#types label").first
    kind = first.text_content().strip()
    of_kind = page.locator("#boxes tr", has_text=kind).count()
    first.locator("input").uncheck()
    assert page.locator("#boxes tr").count() == rows - of_kind
    assert (picture_of(page) != shown).any()
    first.locator("input").check()
    page.locator("#minimum").fill("1")
    assert page.locator("#boxes tr").count() == 0


def test_no_lesion_found_differs_from_a_detector_not_run(page):
    upload(page, ("chest.dcm", patient_radiograph(BodyPartExamined="CHEST")))
    decisions = iter(("abnormal", "normal"))

    def respond(route):
        route.fulfill(json=route.fetch().json() | {"decision": next(decisions), "boxes": []})

    page.route("**/api/v1/analyse*override=true", respond)
    page.locator("#override").click()
    page.locator("#none", has_text="found no lesions").wait_for()
    assert page.locator("#boxes-part").is_hidden()
    upload(page, ("chest.dcm", patient_radiograph(BodyPartExamined="CHEST")))
    page.locator("#radiographs button").nth(1).click()
    page.locator("#override").click()
    page.locator("#none", has_text="not run").wait_for()


def test_every_report_is_downloaded(page, tmp_path):
    upload(page, ("a.dcm", patient_radiograph()))
    for form in ("html", "json", "sr", "sc"):
        with page.expect_download() as waiting:
            page.locator(f"#reports [data-form={form}]").click()
        path = Path(tmp_path / form)
        waiting.value.save_as(path)
        data = path.read_bytes()
        if form == "html":
            assert b"<!doctype html>" in data and NOTICE.encode() in data
        elif form == "json":
            assert json.loads(data)["decision"] == "abnormal"
        else:
            assert pydicom.dcmread(BytesIO(data)).PatientID == "SECRET-7"


def test_a_rejection_is_shown_and_overridden(page):
    photo = np.dstack([grey_picture(), grey_picture(seed=1) // 2, grey_picture()])
    upload(page, ("photo.png", encode_picture(picture=photo)), ("words.txt", b"no picture at all"))
    states = page.locator("#radiographs small").all_text_contents()
    assert states[0] == "rejected" and states[1].endswith(".") and "DICOM" in states[1]
    page.locator("#radiographs button").first.click()
    assert "colour" in page.locator("#reasons").text_content()
    assert page.locator("#prediction").is_hidden()
    page.locator("#override").click()
    page.locator("#prediction").wait_for()
    warning = page.locator("#overridden")
    assert warning.is_visible() and "colour" in warning.text_content()


def test_a_radiograph_chosen_while_it_waits_is_shown_when_it_is_analysed(page):
    held = []
    page.route("**/api/v1/analyse*", lambda route: held.append(route))
    files = [(f"{name}.png", encode_picture()) for name in "abc"]
    page.set_input_files(
        "#files", [{"name": n, "mimeType": "image/png", "buffer": d} for n, d in files]
    )
    last = page.locator("#radiographs button").nth(2)
    last.focus()
    page.keyboard.press("Enter")
    for number in range(3):
        assert page.locator("#viewer").is_hidden() and page.locator("#result").is_hidden()
        while len(held) == number:
            page.wait_for_timeout(20)
        held[number].continue_()
    page.wait_for_selector("#progress", state="hidden", timeout=60_000)
    assert page.locator("#decision").is_visible()
    assert last.get_attribute("aria-current") == "true"
    assert last.evaluate("button => button === document.activeElement")  # the focus has stayed
    page.unroute("**/api/v1/analyse*")
    upload(page, ("d.png", encode_picture()))
    assert page.locator("#radiographs button").nth(3).get_attribute("aria-current") == "true"


def test_an_override_that_fails_leaves_the_rejection(page):
    upload(page, ("chest.dcm", patient_radiograph(BodyPartExamined="CHEST")))
    gone = {"status": 422, "json": {"error": "Gone."}}
    page.route("**/api/v1/analyse*override=true", lambda route: route.fulfill(**gone))
    page.locator("#override").click()
    page.locator("#status", has_text="Gone.").wait_for()
    assert page.locator("#rejection").is_visible() and page.locator("#prediction").is_hidden()
    page.unroute("**/api/v1/analyse*override=true")
    page.locator("#override").click()
    page.locator("#prediction").wait_for()
    assert page.locator("#decision").evaluate("title => title === document.activeElement")


def test_failed_files_are_not_counted_as_analysed(page):
    upload(page, ("a.png", encode_picture()), ("words.dcm", b"no picture at all"))
    assert page.locator("#status").text_content().startswith("1 of 2 ")
    assert "words.dcm: " in page.locator("#status").text_content()
    page.route("**/api/v1/analyse*", lambda route: route.abort())
    upload(page, ("b.png", encode_picture()))
    status = page.locator("#status").text_content()
    assert status.startswith("0 of 1 ") and "could not be sent" in status


def test_two_clicks_request_one_heat_map(page):
    upload(page, ("a.png", encode_picture()), ("b.png", encode_picture()))
    held = []
    page.route("**/api/v1/analyse?heat=true*", lambda route: held.append(route))
    buttons = page.locator("#radiographs button")
    buttons.nth(0).click()
    page.locator("#heat").click()
    buttons.nth(1).click()
    buttons.nth(0).click()
    page.locator("#heat").dispatch_event("click")
    page.evaluate("document.getElementById('heat').disabled = false")
    page.locator("#heat").click()
    held[0].continue_()
    page.locator("#heat[aria-pressed=true]").wait_for()
    assert len(held) == 1


def test_an_override_is_listed_while_another_radiograph_is_shown(page):
    upload(
        page,
        ("chest.dcm", patient_radiograph(BodyPartExamined="CHEST")),
        ("b.png", encode_picture()),
    )
    page.locator("#radiographs button").nth(0).click()
    held = []
    page.route("**/api/v1/analyse*override=true", lambda route: held.append(route))
    page.locator("#override").click()
    page.locator("#radiographs button").nth(1).click()
    held[0].continue_()
    page.locator("#radiographs small", has_text="score").nth(1).wait_for()


def test_the_browser_keeps_its_keys(page):
    upload(page, ("a.png", encode_picture()))
    page.locator("#minimum").fill("1")
    first = picture_of(page)
    page.locator("#canvas").press("Control+i")
    assert (picture_of(page) == first).all()
    page.locator("#canvas").press("i")
    assert (picture_of(page) != first).any()


def test_a_sample_radiograph(page):
    page.locator("#samples summary").click()
    page.locator("#sample-list button").first.click()
    page.locator("#radiographs small", has_text="score").wait_for(timeout=60_000)


def test_axe_finds_no_accessibility_violation(page):
    upload(page, ("a.dcm", patient_radiograph()))
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_the_keyboard_reaches_everything(page):
    upload(page, ("a.dcm", patient_radiograph()))
    reached = set()
    page.locator("body").press("Tab")
    for _ in range(40):
        reached.add(
            page.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
        page.keyboard.press("Tab")
    assert {"files", "canvas", "level", "window", "invert", "heat", "reset", "minimum"} <= reached
