"""The command `dernet serve`: a process of its own, and many clients at once."""

import json
import os
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
from sent import film
from smoke import run_dernet

from dernet_utils.core.files import PROJECT

CLIENTS, SECONDS = 32, 8


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
        env=os.environ | {"DERNET_RUNS": str(runs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    told = process.stdout.readline()
    assert told.startswith("Serving on http://127.0.0.1:"), told
    yield process, f"{told.split()[2].rstrip('.')}/api/v1/"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and not said, said


def post(url, data):
    """Status and body of an answer, whatever the status."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data)) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read(), refused.headers


def megabytes(process) -> float:
    """Memory that a process holds."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000


def test_many_clients_at_once(server):
    """Each answer is right, or a request to come back; memory does not grow."""
    process, address = server
    url = f"{address}analyse?override=true"
    wanted = json.loads(post(url, film())[1])
    said, stop = [], time.monotonic() + SECONDS

    def ask():
        while time.monotonic() < stop:
            status, body, headers = post(url, film())
            said.append((status, body, headers))
            if status == 503:
                time.sleep(0.2)

    for _ in range(8):
        post(url, film())
    before = megabytes(process)
    clients = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert {status for status, *_ in said} <= {200, 503}
    right = [json.loads(body) for status, body, _ in said if status == 200]
    assert len(right) > 5 and all(one == wanted for one in right)
    busy = [headers for status, _, headers in said if status == 503]
    assert all(int(headers["Retry-After"]) > 0 for headers in busy)
    assert megabytes(process) < before + 100


@pytest.mark.parametrize("path", ["analyse", "analyse-batch"])
def test_who_sends_far_too_much_hears_so(server, path):
    status, body, _ = post(f"{server[1]}{path}", bytes(200 * 10**6))
    assert status == 413 and "larger than 100 MB" in json.loads(body)["error"]


def test_a_batch_that_has_begun_is_not_sent_away(server):
    """While single films are told to come back, every file of a batch gets its answer."""
    _, address = server
    single, stop = f"{address}analyse?override=true", threading.Event()

    def ask():
        while not stop.is_set():
            post(single, film())

    clients = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    boundary, parts = "together", b""
    for number in range(4):
        head = f'Content-Disposition: form-data; name="files"; filename="{number}"'
        parts += f"--{boundary}\r\n{head}\r\n\r\n".encode() + film(seed=number) + b"\r\n"
    request = urllib.request.Request(
        f"{address}analyse-batch?override=true",
        parts + f"--{boundary}--\r\n".encode(),
        {"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    with urllib.request.urlopen(request) as answer:
        first = answer.readline()
        for client in clients:
            client.start()
        lines = [json.loads(line) for line in (first, *answer)]
    stop.set()
    for client in clients:
        client.join()
    assert [line["number"] for line in lines] == [0, 1, 2, 3]
    assert all("score" in line for line in lines)


def test_a_client_that_hangs_up_leaves_its_place(server):
    _, address = server
    place = urllib.parse.urlsplit(address)
    head = (
        f"POST {place.path}analyse HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 9999\r\n\r\n"
    )
    for _ in range(CLIENTS):
        with socket.create_connection((place.hostname, place.port)) as gone:
            gone.sendall(head.encode() + film()[:2000])
    patience = time.monotonic() + 10
    while (status := post(f"{address}analyse", film())[0]) == 503:
        assert time.monotonic() < patience
    assert status == 200


def test_no_name_is_printed(server):
    """Libraries warn of a name without its parts; that the server prints nothing is seen above."""
    _, address = server
    for form in ("sr", "sc"):
        data = film(PatientName="Roe", PatientSex="Roe, too long for a code")
        assert post(f"{address}report/{form}?override=true", data)[0] == 200


def test_a_port_in_use_is_named(server, runs):
    port = server[1].split(":")[2].split("/")[0]
    again = run_dernet("serve", "--profile", "smoke", "--port", port, DERNET_RUNS=str(runs))
    assert again.returncode == 1
    assert again.stderr.startswith("The server cannot listen there: Address already in use")
    assert port in again.stderr and again.stderr.endswith("Try another --port.\n")


def test_what_is_needed_is_said(tmp_path):
    none = run_dernet("serve", "--profile", "smoke", DERNET_RUNS=str(tmp_path))
    assert none.returncode == 1 and "`make book PROFILE=smoke` trains and" in none.stderr
    open_to_all = run_dernet("serve", "--host", "0.0.0.0", DERNET_RUNS=str(tmp_path))
    assert open_to_all.returncode == 2 and "DERNET_TOKEN" in open_to_all.stderr
