"""The command `dernet serve`: a process of its own, and many clients at once."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from dicom_files import patient_radiograph
from smoke import run_dernet

from dernet_utils.core.files import PROJECT

pytestmark = pytest.mark.slow

CLIENTS, SECONDS = 32, 8
FATAL = str(Path(__file__).with_name("fatal"))  # makes some files end their decoding process
KILLER = b"segmentation fault"


@pytest.fixture(scope="module")
def runs(exported, tmp_path_factory) -> Path:
    """A folder of runs that holds nothing but exported networks."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(exported, folder / "smoke" / "models")
    return folder


@pytest.fixture(scope="module")
def server(runs):
    """A server's process and its address."""
    command = ["serve", "--profile", "smoke", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dernet_utils.cli", *command],
        cwd=PROJECT,
        env=os.environ | {"DERNET_RUNS": str(runs), "PYTHONPATH": FATAL},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found, line
    yield process, f"{found[0]}/api/v1/"
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and not output, output


def post(url, data):
    """Return a response's status, body and headers, whatever the status."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data)) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read(), refused.headers


def megabytes(process) -> float:
    """Return the memory that a process holds, MB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000


def test_many_clients_at_once(server):
    """Each response is right or asks to retry later, also where every tenth file ends its decoding.

    Memory does not grow.
    """
    process, address = server
    url = f"{address}analyse?override=true"
    expected = json.loads(post(url, patient_radiograph())[1])
    responses, refused, stop = [], [], time.monotonic() + SECONDS
    files = itertools.count()

    def send():
        while time.monotonic() < stop:
            killer = next(files) % 10 == 9
            status, body, headers = post(url, KILLER if killer else patient_radiograph())
            (refused if killer else responses).append((status, body, headers))
            if status == 503:
                time.sleep(0.2)

    for _ in range(8):
        post(url, patient_radiograph())
    before = megabytes(process)
    clients = [threading.Thread(target=send) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert {status for status, *_ in responses} <= {200, 503}
    results = [json.loads(body) for status, body, _ in responses if status == 200]
    assert len(results) > 5 and all(one == expected for one in results)
    assert {status for status, *_ in refused} <= {422, 503}
    sentences = [json.loads(body)["error"] for status, body, _ in refused if status == 422]
    assert sentences and all("SIGSEGV" in sentence for sentence in sentences)
    busy = [headers for status, _, headers in responses if status == 503]
    assert busy and all(int(headers["Retry-After"]) > 0 for headers in busy)
    assert megabytes(process) < before + 100


@pytest.mark.parametrize("path", ["analyse", "analyse-batch"])
def test_an_upload_far_beyond_the_limit_is_refused(server, path):
    status, body, _ = post(f"{server[1]}{path}", bytes(200 * 10**6))
    assert status == 413 and "100 MB" in json.loads(body)["error"]


def test_a_batch_that_has_begun_is_finished(server):
    """While single files are refused as too many, every file of a batch is analysed."""
    _, address = server
    single, stop = f"{address}analyse?override=true", threading.Event()

    def send():
        while not stop.is_set():
            post(single, patient_radiograph())

    clients = [threading.Thread(target=send) for _ in range(CLIENTS)]
    boundary, parts = "together", b""
    for number in range(4):
        head = f'Content-Disposition: form-data; name="files"; filename="{number}"'
        parts += (
            f"--{boundary}\r\n{head}\r\n\r\n".encode() + patient_radiograph(seed=number) + b"\r\n"
        )
    request = urllib.request.Request(
        f"{address}analyse-batch?override=true",
        parts + f"--{boundary}--\r\n".encode(),
        {"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    with urllib.request.urlopen(request) as response:
        first = response.readline()
        for client in clients:
            client.start()
        lines = [json.loads(line) for line in (first, *response)]
    stop.set()
    for client in clients:
        client.join()
    assert [line["number"] for line in lines] == [0, 1, 2, 3]
    assert all("score" in line for line in lines)


def test_a_client_that_disconnects_frees_its_place(server):
    _, address = server
    url = urllib.parse.urlsplit(address)
    head = f"POST {url.path}analyse HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: 9999\r\n\r\n"
    for _ in range(CLIENTS):
        with socket.create_connection((url.hostname, url.port)) as client:
            client.sendall(head.encode() + patient_radiograph()[:2000])
    deadline = time.monotonic() + 10
    while (status := post(f"{address}analyse", patient_radiograph())[0]) == 503:
        assert time.monotonic() < deadline
    assert status == 200


def test_no_name_is_printed(server):
    """Libraries warn of names without parts; the fixture asserts that the server prints nothing."""
    _, address = server
    for form in ("sr", "sc"):
        data = patient_radiograph(PatientName="Roe", PatientSex="Roe, too long for a code")
        assert post(f"{address}report/{form}?override=true", data)[0] == 200


def test_a_port_in_use_is_named(server, runs):
    port = server[1].split(":")[2].split("/")[0]
    again = run_dernet("serve", "--profile", "smoke", "--port", port, DERNET_RUNS=str(runs))
    assert again.returncode == 1
    assert f"127.0.0.1:{port}: Address already in use" in again.stderr
    assert "--port" in again.stderr and "Traceback" not in again.stderr


def test_missing_networks_and_a_missing_token_are_refused(tmp_path):
    none = run_dernet("serve", "--profile", "smoke", DERNET_RUNS=str(tmp_path))
    assert none.returncode == 1 and "make book PROFILE=smoke" in none.stderr
    open_to_all = run_dernet("serve", "--host", "0.0.0.0", DERNET_RUNS=str(tmp_path))
    assert open_to_all.returncode == 2 and "DERNET_TOKEN" in open_to_all.stderr
