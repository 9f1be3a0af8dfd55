"""ultralytics with its ways to the network closed. Imported before anything of ultralytics'."""

import os
from pathlib import Path

import torch
from ultralytics.utils import SETTINGS

from dernet_utils.core.files import PROJECT

# Read by ultralytics while it is imported: no question to the network, nothing installed while it
# runs, settings among the runs, no chatter, and not its own default of one thread.
RUNS = Path(os.environ.get("DERNET_RUNS") or PROJECT / "runs").resolve()
os.environ["YOLO_OFFLINE"] = "1"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ["YOLO_CONFIG_DIR"] = str(RUNS / ".ultralytics")
os.environ["YOLO_VERBOSE"] = "false"

os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

if SETTINGS["sync"]:
    SETTINGS.update(sync=False)
