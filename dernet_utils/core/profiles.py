"""Profiles: the numbers of a run, frozen and validated.

A profile changes numbers only: every chapter runs the same code with each profile.
"""

import os
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from dernet_utils.core.errors import DernetError

Side = Annotated[int, Field(gt=0, multiple_of=32)]


class Profile(BaseModel):
    """The numbers of a run.

    Sizes are in pixels; an epoch is one pass over the training images. `patients` is the number of
    virtual patients; where it is None, the data are the VinDr-SpineXR folder that the environment
    variable ``DERNET_DATA`` names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    patients: int | None = Field(gt=0)
    seed: int = Field(42, ge=0)  # paper, section 4.1
    test_seed: int | None = Field(None, ge=0, description="of virtual test patients; None: seed")
    rendered: tuple[int, int] | None = Field(
        None, description="training and test patients that are made; None: all"
    )
    folds: int = Field(5, ge=2)  # paper, section 4.1
    more_seeds: tuple[int, ...] = Field((), description="each triage network is trained with too")
    trained_folds: int | None = Field(None, ge=1, description="held out, from fold 0; None: all")
    clip_limit: float = Field(2.0, gt=0)  # paper, section 3.1
    tiles: int = Field(8, gt=0)  # OpenCV's default grid, 8 x 8
    cache_px: int = Field(gt=0, description="long side of a cached image")
    triage_px: int = Field(gt=0, multiple_of=32)
    triage_epochs: int = Field(gt=0)
    triage_batch: int = Field(gt=0)
    triage_lr: float = Field(gt=0)
    triage_detail: int = Field(1, ge=1, description="side of a training image over triage_px")
    triage_crop_px: int = Field(48, gt=0, multiple_of=16)
    triage_crop_epochs: int = Field(0, ge=0, description="epochs on crops, before whole images")
    detect_size: tuple[Side, Side] = Field(description="height and width of the input")
    detect_epochs: int = Field(gt=0)
    detect_batch: int = Field(gt=0)
    detect_lr: float = Field(gt=0)
    mosaic_until: int = Field(ge=0, description="first epoch without mosaic")
    focal_gamma: float = Field(2.0, ge=0)  # paper, section 3.3
    focal_alpha: float = Field(0.25, gt=0, lt=1)  # companion code
    detect_scale: float = Field(0.5, ge=0, lt=1)  # ultralytics' default
    detect_repeat: bool = Field(False, description="rare lesion types drawn more often")
    detect_paste: bool = Field(False, description="rare lesion types pasted into other images")
    baseline_seconds: float = Field(gt=0, description="training time of each detector of Table 3")
    bootstrap: int = Field(1000, ge=100)  # paper, section 4.1
    timings: int = Field(15, ge=2, description="rounds of interleaved runtime measurements")
    timed_px: int = Field(384, gt=0, multiple_of=32, description="side of the triage input there")
    timed_size: tuple[Side, Side] = Field((640, 640), description="the detector's input there")

    @property
    def held_out(self) -> range:
        """The folds that are held out in turn, one training of a network for each."""
        return range(self.trained_folds or self.folds)

    @property
    def renders_cohort(self) -> bool:
        """Whether a run makes its own virtual cohort instead of reading ``DERNET_DATA``."""
        return self.patients is not None


# Of the test patients of `laptop` and `night`: the date on which these were drawn, after the last
# change of the recipe (book/deviations.md). Nothing may be chosen on them, this number included.
TEST_SEED = 20261127

# Of the edition's test patients, who are scored once, by the frozen protocol.
EDITION_TEST_SEED = 20261201

PROFILES = {
    profile.name: profile
    for profile in (
        # Tests and continuous integration: the same networks, for a step or two.
        Profile(
            name="smoke", patients=24, folds=3, cache_px=256,
            triage_px=64, triage_epochs=1, triage_batch=8, triage_lr=1e-3,
            triage_crop_px=32, triage_crop_epochs=1, triage_detail=2,
            detect_size=(96, 64), detect_epochs=2, detect_batch=8, detect_lr=1e-3,
            mosaic_until=2, baseline_seconds=1,
            bootstrap=200, timings=2, timed_px=64, timed_size=(96, 64),
        ),
        # A first run. Networks start from random weights, so the learning rate is higher than in
        # the paper, whose networks start from ImageNet and COCO weights. The focal loss is off, for
        # which unrecorded pilot runs are the only reason.
        Profile(
            name="laptop", patients=560, test_seed=TEST_SEED, folds=2, cache_px=640,
            triage_px=128, triage_epochs=3, triage_batch=16, triage_lr=5e-4,
            triage_crop_px=64, triage_crop_epochs=3, triage_detail=2,
            detect_size=(192, 128), detect_epochs=28, detect_batch=6, detect_lr=5e-4,
            detect_scale=0.2, detect_repeat=True, mosaic_until=13, baseline_seconds=30,
            focal_gamma=0.0, focal_alpha=0.5,  # half the cross-entropy: see Deviations
        ),
        # A night on two cores: `laptop` with more time for each detector and with the focal loss.
        Profile(
            name="night", patients=560, test_seed=TEST_SEED, folds=2, cache_px=640,
            triage_px=128, triage_epochs=3, triage_batch=16, triage_lr=5e-4,
            triage_crop_px=64, triage_crop_epochs=3, triage_detail=2,
            detect_size=(192, 128), detect_epochs=60, detect_batch=6, detect_lr=5e-4,
            detect_scale=0.2, detect_repeat=True, mosaic_until=27, baseline_seconds=480,
        ),
        # The paper's protocol: section 4.1, Algorithm 1 and the authors' companion code.
        Profile(
            name="paper", patients=None, cache_px=1280,
            triage_px=384, triage_epochs=60, triage_batch=16, triage_lr=1e-4,
            detect_size=(640, 640), detect_epochs=55, detect_batch=12, detect_lr=1e-4,
            mosaic_until=25, baseline_seconds=8 * 3600,
        ),
        # The long trainings of the edition (book/edition_protocol.md), of the dataset's shape.
        Profile(
            name="edition-training", patients=5000, test_seed=EDITION_TEST_SEED,
            rendered=(2000, 1000), trained_folds=1, more_seeds=(43, 44), cache_px=640,
            triage_px=224, triage_epochs=12, triage_batch=16, triage_lr=5e-4,
            triage_crop_px=96, triage_crop_epochs=2,
            detect_size=(320, 224), detect_epochs=16, detect_batch=6, detect_lr=5e-4,
            detect_scale=0.2, detect_repeat=True, mosaic_until=8, baseline_seconds=480,
        ),
    )
}  # fmt: skip


def get_profile(name: str = "") -> Profile:
    """Return a profile by name.

    Args:
        name: One of `PROFILES`; empty means the environment variable ``DERNET_PROFILE`` and, where
            that is not set, ``laptop``.

    Raises:
        DernetError: The name is none of them.

    >>> get_profile("paper").triage_px
    384
    """
    name = name or os.environ.get("DERNET_PROFILE", "") or "laptop"
    if name not in PROFILES:
        raise DernetError(f"The profile is one of {', '.join(PROFILES)}, not {name!r}.")
    return PROFILES[name]
