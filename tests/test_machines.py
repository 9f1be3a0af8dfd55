"""Machines as people have them: their folders, locales, settings and file systems."""

import ast
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from chapters import write_chapter
from fastapi.testclient import TestClient
from test_build import SmallBook

from dernet_utils import cli
from dernet_utils.book import build, duration
from dernet_utils.book.figures import use_style
from dernet_utils.core import environment
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT, named_folder, runs_folder
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.workspace import Workspace, open_workspace
from dernet_utils.serving.web import make_app


def dernet(*arguments: str | bytes, cwd: Path = PROJECT, **variables: str):
    """Call the command line as a user does; outputs are bytes."""
    command = [sys.executable, "-m", "dernet_utils.cli", *arguments]
    return subprocess.run(command, capture_output=True, cwd=cwd, env=os.environ | variables)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# Set-up -----------------------------------------------------------------------------------------


def test_libraries_are_found_where_the_path_lacks_the_system_folders(tmp_path: Path):
    script(tmp_path / "id", "echo 1000")  # never root: nothing is installed
    user = f"{tmp_path}:/usr/bin:/bin"
    if shutil.which("ldconfig", path=user):
        pytest.skip("ldconfig lies in an ordinary folder here")
    found = {}
    for path in (user, f"{user}:/usr/sbin:/sbin"):
        done = subprocess.run(
            ["/bin/sh", PROJECT / "tools" / "system.sh", "opencv"],
            env={"PATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        found[path] = (done.returncode, done.stdout + done.stderr)
    assert len(set(found.values())) == 1


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile beside programs that only write down how they were called."""
    root = tmp_path / "Jürgen's {old} book"
    root.mkdir()
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(PROJECT / name, root)
    script(root / "tools" / "system.sh", "exit 0")
    (root / ".cache" / "donor").mkdir(parents=True)
    (root / ".cache" / "donor" / "mask.nii.gz").touch()
    script(
        root / "python",
        'case "$*" in\n'
        '*"venv .venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;\n'
        '*pip*install*) { echo "called $*"; env; } >> pip.log ;;\n'
        "esac",
    )
    return root


def make(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Call make as from a shell, also where make itself runs these tests."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    shell = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=shell | variables,
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_set_up_ignores_settings_that_would_install_elsewhere(checkout: Path):
    elsewhere = {
        "PIP_USER": "1", "PIP_TARGET": "/t", "PIP_PREFIX": "/p", "PIP_ROOT": "/r",
        "PIP_DRY_RUN": "1", "PYTHONPATH": "/x", "PYTHONHOME": "/y", "PYTHONUSERBASE": "/z",
    }  # fmt: skip
    kept = {"PIP_INDEX_URL": "https://mirror", "PIP_CERT": "/c", "PIP_FIND_LINKS": "/wheels"}
    done = make(checkout, "donor", "PYTHON=./python", **elsewhere, **kept)
    assert done.returncode == 0, done.stderr
    log = (checkout / "pip.log").read_text(encoding="utf-8").splitlines()
    calls = [line for line in log if line.startswith("called")]
    assert len(calls) == 2 and all("--no-user" in call for call in calls)
    seen = {line.partition("=")[0] for line in log}
    assert not seen & set(elsewhere) and set(kept) <= seen


def test_the_donors_folder_may_have_a_space_and_a_home_folder(checkout: Path):
    (checkout / ".venv" / "bin").mkdir(parents=True)
    script(checkout / ".venv" / "bin" / "dernet", 'echo "fetch $DERNET_DONOR"')
    arguments = ("donor", "LOCKED=Makefile")
    (checkout / "my donor").mkdir()
    named = {"DERNET_DONOR": str(checkout / "my donor")}
    assert make(checkout, *arguments, **named).stdout.strip() == f"fetch {named['DERNET_DONOR']}"
    (checkout / "my donor" / "mask.nii.gz").touch()
    assert make(checkout, *arguments, **named).stdout == ""
    assert make(checkout, *arguments, DERNET_DONOR="~/d").stdout.strip() == "fetch ~/d"


def test_a_lab_kernel_gets_absolute_folders(checkout: Path):
    script(checkout / "bin" / "python", f'exec "{sys.executable}" "$@"')
    script(checkout / "bin" / "jupyter", 'echo "$DERNET_DATA $DERNET_RUNS"')
    variables = {"DERNET_DATA": "data", "DERNET_RUNS": "~/runs", "HOME": "/home/someone"}
    done = make(checkout, "lab", "BIN=bin", "LOCKED=Makefile", **variables)
    assert done.stdout == f"{checkout / 'data'} /home/someone/runs\n", done.stderr


# Folders ----------------------------------------------------------------------------------------


def test_folders_are_expanded_and_relative_to_where_the_command_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("DERNET_WEIGHTS", raising=False)
    monkeypatch.setenv("DERNET_DATA", "data")
    monkeypatch.setenv("DERNET_RUNS", "~/runs")
    assert named_folder("DERNET_WEIGHTS") is None
    assert open_workspace("paper").data_root == tmp_path / "data"
    assert runs_folder() == Path("/home/someone/runs")
    assert open_workspace("smoke").folder == Path("/home/someone/runs/smoke")
    absolute = environment.absolute_folders()
    monkeypatch.chdir("/")
    for name, path in absolute.items():
        monkeypatch.setenv(name, path)
    assert open_workspace("paper").data_root == tmp_path / "data"


def test_an_unknown_home_folder_is_one_sentence(tmp_path: Path):
    done = dernet("check", ".", DERNET_DATA="~nobody-of-this-name/data", DERNET_RUNS=str(tmp_path))
    assert done.returncode == 1 and done.stdout == b""
    assert b"DERNET_DATA is ~nobody-of-this-name/data" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_user_without_home_and_name_gets_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(os, "environ", {"DERNET_RUNS": str(tmp_path)})
    monkeypatch.setattr(os.path, "expanduser", str)
    environment.isolate()
    assert os.environ["HOME"].startswith(str(tmp_path)) and os.environ["LOGNAME"]


# Locales ----------------------------------------------------------------------------------------

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("variables", [ASCII, {"PYTHONIOENCODING": "ascii"}])
def test_a_locale_without_unicode_is_no_obstacle(tmp_path: Path, variables: dict):
    folder = tmp_path / "Wirbelsäule"
    done = dernet("check", str(folder), **variables)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert any(form in done.stderr for form in ("Wirbelsäule".encode(), rb"Wirbels\xe4ule"))


def test_a_file_name_that_is_not_utf8_is_printed(tmp_path: Path):
    name = os.fsencode(tmp_path) + b"/\xff"
    done = dernet("check", name)
    assert done.returncode == 1 and b"Traceback" not in done.stderr and rb"\udcff" in done.stderr


def text_files_without_encoding(path: Path) -> list[int]:
    """Return the lines that read or write a text file in the locale's encoding."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            text = node.func.attr in ("read_text", "write_text") or (
                node.func.attr == "open" and set(str(*modes)) <= set("rwax+t") and modes
            )
            if text and "encoding" not in {keyword.arg for keyword in node.keywords}:
                lines.append(node.lineno)
    return lines


def test_text_files_are_utf8_whatever_the_locale():
    named = [*(PROJECT / "dernet_utils").rglob("*.py"), *(PROJECT / "notebooks").glob("*.py")]
    found = {str(path): text_files_without_encoding(path) for path in named}
    assert {path: lines for path, lines in found.items() if lines} == {}


# File systems -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    def refuse(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lines: list[str] = []
    with build._only_run(Workspace(get_profile("smoke"), tmp_path), lines.append) as lock:
        assert lock.fileno()
    assert len(lines) == 1 and "cannot lock" in lines[0]


def test_another_error_of_the_lock_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", refuse)
    workspace = Workspace(get_profile("smoke"), tmp_path)
    with pytest.raises(OSError, match="broken"), build._only_run(workspace, print):
        pass


# A reader's own settings ------------------------------------------------------------------------


def test_figures_ignore_the_readers_matplotlibrc():
    with plt.rc_context({"text.usetex": True, "font.size": 40.0}):
        use_style()
        assert not plt.rcParams["text.usetex"] and plt.rcParams["font.size"] < 20


@pytest.mark.slow
@pytest.mark.parametrize("home", ["own settings", "missing"])
def test_a_chapter_is_the_same_for_every_reader(tmp_path: Path, home: str):
    """Settings that would stop any kernel, or a home folder in which nothing can be written."""
    (tmp_path / "book").mkdir()
    small = SmallBook(tmp_path / "book")
    write_chapter(
        small.root,
        "01_a",
        "import os, sys, matplotlib\nassert_counts = False\ntry:\n    assert False\n"
        "except AssertionError:\n    assert_counts = True",
        "print(assert_counts, sys.flags.utf8_mode, matplotlib.rcParams['text.usetex'])",
        "print(os.environ.get('DERNET_DATA'))",
    )
    own = tmp_path / "home"
    fatal = "import os\nos._exit(3)\n"
    specification = {"argv": ["/bin/false"], "display_name": "mine", "language": "python"}
    files = {
        ".ipython/profile_default/startup/00.py": fatal,
        ".ipython/profile_default/ipython_config.py": fatal,
        ".jupyter/jupyter_config.py": fatal,
        ".config/matplotlib/matplotlibrc": "text.usetex: True\n",
        "share/kernels/python3/kernel.json": json.dumps(specification),
        "start.py": fatal,
    }
    for name, text in files.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(text, encoding="utf-8")
    variables = {"HOME": "/proc/missing", **ASCII}
    if home == "own settings":
        variables = {
            "HOME": str(own),
            "JUPYTER_PATH": str(own / "share"),
            "JUPYTER_CONFIG_DIR": str(own / ".jupyter"),
            "IPYTHONDIR": str(own / ".ipython"),
            "MATPLOTLIBRC": str(own / ".config" / "matplotlib"),
            "PYTHONSTARTUP": str(own / "start.py"),
            "PYTHONOPTIMIZE": "1",
        }
    code, steps, output = small.run("chapter", "01_a", DERNET_DATA="../data", **variables)
    assert (code, steps) == (0, {"01_a"}), output
    executed = nbformat.read(small.root / "runs" / "smoke" / "chapters" / "01_a.ipynb", 4)
    printed = [o.text for c in executed.cells for o in c.get("outputs", []) if "text" in o]
    assert printed == ["True 1 False\n", f"{tmp_path / 'data'}\n"]


# Long trainings ---------------------------------------------------------------------------------


def test_a_training_says_how_far_it_is(capsys: pytest.CaptureFixture):
    row = {"epoch": 2, "train_loss": 0.5, "validation_auroc": None, "seconds": 120.0}
    cli._say_epoch("resnet50, fold 0", get_profile("laptop"), row)
    line = capsys.readouterr().out
    assert "0.500" in line and "2 of 6 epochs, about 8 min left" in line


def test_a_long_run_says_at_first_what_to_expect(monkeypatch: pytest.MonkeyPatch):
    for slower, minutes in ((0.5, 40.0), (1.0, 40.0), (3.7, 148.0)):
        seconds = slower * duration.STEP_SECONDS
        monkeypatch.setattr(duration, "blank_step", lambda profile, s=seconds: s)
        said = duration.expected_duration(get_profile("laptop"), 40)
        expected = float(re.search(r"expect up to ([\d,]+) minutes", said)[1].replace(",", ""))
        assert expected == pytest.approx(minutes, rel=0.06)  # two digits


def test_a_training_step_is_measured_on_this_machine():
    laptop = get_profile("laptop")
    small = laptop.model_copy(update={"triage_px": 32, "triage_batch": 4})
    assert duration.blank_step(small) < duration.blank_step(laptop)


# Clients ----------------------------------------------------------------------------------------


class Refusing:
    """A service that refuses each file with its contents."""

    def analyse(self, data: bytes, override: bool):
        raise DernetError(f"got {data!r}")


@pytest.mark.parametrize("path", ["analyse", "report/json"])
def test_a_file_may_be_sent_as_a_form(path: str):
    client = TestClient(make_app(Refusing(), {}), base_url="http://localhost")

    def said(**sent) -> str:
        response = client.post(f"/api/v1/{path}", **sent)
        assert response.status_code == 422
        return response.json()["error"]

    assert said(files={"file": ("x.dcm", b"raw")}) == said(content=b"raw") == "Got b'raw'"
    assert "2 files" in said(files=[("a", ("x", b"1")), ("b", ("y", b"2"))])
    assert "empty" in said(files={"file": ("x.dcm", b"")})
