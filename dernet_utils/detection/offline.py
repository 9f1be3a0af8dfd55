"""Keeps ultralytics off the network; import it before anything else of ultralytics."""

import os

import torch

from dernet_utils.core.files import runs_folder

# ultralytics reads these while it is imported: no network access, no installation at run time, its
# settings stored with the runs, no logging, and more threads than its default of one.
os.environ["YOLO_OFFLINE"] = "1"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ["YOLO_CONFIG_DIR"] = str(runs_folder() / ".ultralytics")
os.environ["YOLO_VERBOSE"] = "false"

os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

from ultralytics.utils import SETTINGS

if SETTINGS["sync"]:
    SETTINGS.update(sync=False)
