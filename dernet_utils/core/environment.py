"""The environment of a command and of all that it starts, whatever a user's own settings are."""

import locale
import os
import sys

from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import named_folder, runs_folder

FOLDERS = ("DERNET_RUNS", "DERNET_DATA", "DERNET_WEIGHTS", "DERNET_DONOR")
# Settings of a user's own that would reach the chapters, the workflow or the pages.
IGNORED = (
    "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONIOENCODING",
    "JUPYTER_PATH", "JUPYTER_CONFIG_PATH", "MATPLOTLIBRC", "SNAKEMAKE_PROFILE",
)  # fmt: skip
# Where libraries look for settings and write their own files, in the folder of all runs. They would
# use the home folder, which may hold a user's settings, be read-only or not exist.
OWN_FOLDERS = {
    "IPYTHONDIR": ".ipython",
    "JUPYTER_CONFIG_DIR": ".jupyter",
    "JUPYTER_DATA_DIR": ".jupyter/data",
    "JUPYTER_RUNTIME_DIR": ".jupyter/runtime",
    "MPLCONFIGDIR": ".matplotlib",
    "XDG_CACHE_HOME": ".cache",
}


def absolute_folders() -> dict[str, str]:
    """Return the variables of `FOLDERS` that are set, with absolute paths.

    Raises:
        DernetError: A path starts with the home folder of an unknown user.
    """
    for name in FOLDERS:
        if os.path.expanduser(os.environ.get(name, "")).startswith("~"):  # noqa: PTH111
            raise DernetError(
                f"{name} is {os.environ[name]}, and that home folder is unknown: give the whole "
                "path."
            )
    found = {name: named_folder(name) for name in FOLDERS}
    return {name: str(folder) for name, folder in found.items() if folder is not None}


def use_utf8() -> None:
    """Make Python read and write UTF-8 whatever the locale, and never fail to print a character.

    Where the locale's encoding is another one, this process is started anew.
    """
    encodings = {sys.getfilesystemencoding().lower(), locale.getpreferredencoding(False).lower()}
    if encodings != {"utf-8"} and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def isolate() -> None:
    """Change this process's environment, which all processes that it starts inherit.

    The folders that variables name become absolute, settings of a user's own no longer count, and
    Python reads and writes UTF-8.

    Raises:
        DernetError: As `absolute_folders` raises.
    """
    os.environ.update(absolute_folders())
    for name in IGNORED:
        os.environ.pop(name, None)
    runs = runs_folder()
    os.environ.update({name: str(runs / own) for name, own in OWN_FOLDERS.items()})
    if os.path.expanduser("~") == "~":  # noqa: PTH111  an unknown user, as in some containers
        os.environ |= {"HOME": str(runs), "LOGNAME": str(os.getuid())}
    os.environ["PYTHONUTF8"] = "1"
