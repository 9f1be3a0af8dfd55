"""Keeps ultralytics off the network; import it before anything else of ultralytics."""

import os
from pathlib import Path

import torch

from dernet_utils.core.files import PROJECT

# ultralytics reads these while it is imported: no network access, no installation at run time, its
# settings stored with the runs, no logging, and more threads than its default of one.
RUNS = Path(os.environ.get("DERNET_RUNS") or PROJECT / "runs").resolve()
os.environ["YOLO_OFFLINE"] = "1"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ["YOLO_CONFIG_DIR"] = str(RUNS / ".ultralytics")
os.environ["YOLO_VERBOSE"] = "false"

os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

from ultralytics.utils import SETTINGS  # noqa: E402  reads the environment, so not above

if SETTINGS["sync"]:
    SETTINGS.update(sync=False)
