"""The command line: each command ends in a sentence and an exit code, never in a traceback."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from smoke import run_dernet
from typer.testing import CliRunner

from dernet_utils import cli
from dernet_utils.core.errors import DernetError
from dernet_utils.dataset import check
from dernet_utils.virtual import cohort, donor

ONE_THREAD = ("--threads", "1")  # other tests run beside; threads that wait for each other spin


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from dernet_utils import cli; "
        "print([m for m in ('torch', 'pandas', 'cv2', 'papermill') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"
    code, out, _ = call("--help")
    assert code == 0
    for command in (
        "donor",
        "cohort",
        "check",
        "prepare",
        "chapter",
        "train",
        "edition",
        "estimate",
        "speed",
        "record",
        "predict",
        "export",
        "serve",
        "node",
        "build",
        "run",
    ):
        assert command in out


@pytest.mark.parametrize("command", [["run"], ["prepare"], ["build"], ["chapter", "01_data"]])
def test_unknown_profile(command: list[str]):
    code, out, err = call(*command, "--profile", "desktop")
    assert code == 1 and out == ""
    assert "'desktop'" in err and "smoke, laptop, night, paper" in err
    assert len(err.splitlines()) == 1


def test_paper_profile_without_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DERNET_RUNS", str(tmp_path))
    monkeypatch.delenv("DERNET_DATA", raising=False)
    code, _, err = call("run", "--profile", "paper")
    assert code == 1 and "DERNET_DATA" in err
    monkeypatch.setenv("DERNET_DATA", str(tmp_path))
    code, _, err = call("run", "--profile", "paper")
    assert code == 1 and "is not a VinDr-SpineXR folder" in err


def test_check_of_a_good_dataset(tiny_dataset: Path):
    code, out, _ = call("check", tiny_dataset)
    assert code == 0
    assert "Fingerprint" in out and out.strip().endswith("No problem.")
    code, out, _ = call("check", tiny_dataset, "--json")
    report = json.loads(out)
    assert code == 0 and report["problems"] == []
    assert set(report["fingerprint"]) == {"train", "test"}


def test_check_names_file_and_row_and_repairs_on_request_only(tiny_dataset: Path, tmp_path: Path):
    table = tiny_dataset / "annotations" / "train.csv"
    lines = table.read_text().splitlines()
    row = next(i for i, line in enumerate(lines) if "Osteophytes" in line)
    cells = lines[row].split(",")
    cells[7] = cells[5]  # xmax = xmin
    lines[row] = ",".join(cells)
    table.write_text("\n".join(lines) + "\n")
    before = table.read_bytes()

    code, out, _ = call("check", tiny_dataset)
    assert code == 1 and f"train.csv, row {row + 1}" in out and "1 problem." in out
    code, out, _ = call("check", tiny_dataset, "--json")
    assert code == 1 and json.loads(out)["problems"][0]["row"] == row + 1

    copy = tmp_path / "copy"
    code, out, _ = call("check", tiny_dataset, "--repair", copy)
    assert code == 1 and "dropped" in out
    assert call("check", copy)[0] == 0
    assert table.read_bytes() == before
    code, _, err = call("check", tiny_dataset, "--repair", copy)
    assert code == 1 and "exists" in err


def test_check_notes_files_that_are_not_used(root: Path):
    names = [f"index.html?page={number}" for number in range(1200)]
    for name in names:
        (root / "train_images" / name).write_text("<html>")
    code, out, _ = call("check", root)
    assert code == 0 and "1,200 files" in out and names[0] in out and "No problem." in out
    assert len([line for line in out.splitlines() if "index.html" in line]) == 1
    code, out, _ = call("check", root, "--json")
    assert code == 0
    assert sorted(note["file"] for note in json.loads(out)["notes"]) == sorted(
        f"train_images/{name}" for name in names
    )


def test_check_of_a_folder_that_is_no_dataset(tmp_path: Path):
    code, out, err = call("check", tmp_path)
    assert code == 1 and out == "" and len(err.splitlines()) == 1


def test_cohort_does_not_overwrite(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = call("cohort", tmp_path, "--patients", 20, "--seed", 1)
    assert code == 1 and "not empty" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EACCES, "access is denied")],
)
def test_an_error_of_the_machine_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, number: int, words: str
):
    def refuse(*_, **__):
        raise OSError(number, "no", "some/file")

    monkeypatch.setattr(cohort, "write_cohort", refuse)
    code, _, err = call("cohort", "somewhere", "--patients", 20)
    assert code == 1 and words in err and "some/file" in err and len(err.splitlines()) == 1


def test_a_full_disk_is_recognised_in_a_librarys_message(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_, **__):
        raise OSError("With tag (7FE0,0010) got exception: [Errno 28] No space left on device")

    monkeypatch.setattr(cohort, "write_cohort", refuse)
    code, _, err = call("cohort", "somewhere", "--patients", 20)
    assert code == 1 and "disk is full" in err and len(err.splitlines()) == 1


def test_a_fault_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise OSError(errno.EBADF, "a bug")

    monkeypatch.setattr(donor, "fetch_donor", fail)
    result = CliRunner().invoke(cli.app, ["donor"])
    assert isinstance(result.exception, OSError)


def test_interrupt(monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check_dataset", interrupt)
    code, _, err = call("check", "anything")
    assert code == 130 and err.startswith("Interrupted") and len(err.splitlines()) == 1


def test_an_error_with_brackets_is_printed_as_it_is(monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise DernetError("a [bold]word[/bold] in list[int]")

    monkeypatch.setattr(donor, "fetch_donor", fail)
    assert call("donor")[2] == "a [bold]word[/bold] in list[int]\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n=8", ("n", 8)),
        ("n=2.5", ("n", 2.5)),
        ("n=smoke", ("n", "smoke")),
        ("n=a=b", ("n", "a=b")),
        ("n=", ("n", "")),
    ],
)
def test_parameter(text: str, value: tuple):
    assert cli._parameter(text) == value


def test_parameter_without_value():
    with pytest.raises(DernetError, match="NAME=VALUE"):
        cli._parameter("clip_limit")


@pytest.mark.slow
def test_unknown_chapter_and_parameter(tmp_path: Path):
    done = run_dernet("chapter", "99_nothing", "--profile", "smoke", DERNET_RUNS=str(tmp_path))
    assert done.returncode == 1 and "99_nothing" in done.stderr
    done = run_dernet(
        *("chapter", "02_imaging", "--profile", "smoke", "-p", "clip=8"), DERNET_RUNS=str(tmp_path)
    )
    assert done.returncode == 1 and "parameter clip" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_that_ignored_it_from_its_shell(number: int):
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "from dernet_utils import cli; from dernet_utils.virtual import donor; "
        "donor.fetch_donor = lambda: (print('ready', flush=True), time.sleep(60)); cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "donor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - started < 10
    assert err.startswith("Interrupted") and len(err.splitlines()) == 1


@pytest.mark.slow
def test_estimate_takes_a_step_of_each_network(smoke_book: Path, tmp_path: Path):
    table, lines = measured("estimate", smoke_book, tmp_path)
    assert (table["image, px"] == 64).all() and (table["batch"] == 8).all()
    assert (table["seconds per step"] > 0).all() and table["memory, GB"].between(0.1, 20).all()
    assert all("seconds per step" in line for line in lines)


@pytest.mark.slow
def test_speed_compares_both_loops_for_each_network(smoke_book: Path, tmp_path: Path):
    table, lines = measured("speed", smoke_book, tmp_path)
    ratio = table["plain, s"] / table["ours, s"]
    assert (ratio > 0).all() and (table["image, px"] == 64).all()
    assert table["AUROC, ours"].str.fullmatch(r"[01]\.\d\d \[[01]\.\d\d, [01]\.\d\d\]").all()
    assert all("plain / ours" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["estimate", "speed"])
def test_the_detectors_step_is_measured_too(command: str, smoke_book: Path, tmp_path: Path):
    out, runs = tmp_path / "table.csv", str(smoke_book / "runs")
    options = ("--detector", "--profile", "smoke", "--out", str(out), *ONE_THREAD)
    done = run_dernet(command, *options, DERNET_RUNS=runs)
    assert done.returncode == 0, done.stderr
    (row,) = pd.read_csv(out).to_dict("records")
    assert (row["network"], row["image, px"], row["batch"]) == ("YOLO11-L", "96 × 64", 8)
    if command == "estimate":
        assert row["seconds per step"] > 0 and 0.1 < row["memory, GB"] < 20 and row["images"] > 8
    else:
        assert row["stock / ours"] == pytest.approx(row["stock, s"] / row["ours, s"], rel=0.1)
        assert row["all threads / ours"] > 0


def measured(command: str, smoke_book: Path, folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return the table that a command writes for a finished run, and the lines that it prints."""
    out = folder / "table.csv"
    runs = str(smoke_book / "runs")
    options = ("--profile", "smoke", "--out", str(out), *ONE_THREAD)
    done = run_dernet(command, *options, DERNET_RUNS=runs)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(out)
    assert table["network"].tolist() == ["DenseNet121", "EfficientNetV2-S", "ResNet50"]
    assert table[["processor", "commit"]].notna().all(axis=None)
    return table, done.stdout.splitlines()[-4:-1]
