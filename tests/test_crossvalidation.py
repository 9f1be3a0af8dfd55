"""Trainings fold by fold: nothing leaks, nothing is lost, and the test labels stay sealed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from dernet_utils.book import progress
from dernet_utils.core import vocabulary
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.workspace import Workspace
from dernet_utils.dataset import folds as dataset_folds
from dernet_utils.dataset import tables as dataset_tables
from dernet_utils.metrics import intervals
from dernet_utils.metrics.classification import auroc, youden_threshold
from dernet_utils.triage import crossvalidation, ensemble, training
from dernet_utils.triage import crossvalidation as triage_crossvalidation
from dernet_utils.triage import networks as triage_networks

NETWORK = "densenet121"  # the quickest of the three
NUMBERS = {
    "patients": None, "folds": 2, "triage_px": 32, "triage_epochs": 2, "triage_crop_epochs": 0
}  # fmt: skip


def workspace_at(folder: Path, **numbers) -> Workspace:
    return Workspace(get_profile("smoke").model_copy(update=NUMBERS | numbers), folder)


@pytest.fixture
def workspace(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("DERNET_DATA", str(tiny_dataset))
    return workspace_at(tmp_path / "run")


# Sealed labels


class Sealed:
    """A label that nobody may look at."""

    def _seal(self, *_):
        raise AssertionError("a test label was read before the decision")

    __bool__ = __eq__ = __int__ = __float__ = __index__ = __invert__ = __and__ = __hash__ = _seal


def test_test_labels_are_unreadable_until_the_decision_is_written(workspace, monkeypatch):
    whole = dataset_tables.read_dataset(workspace.data_root)
    dataset_folds.load_folds(
        workspace, whole.images
    )  # dealt before; `make_folds` refuses any image of the test split
    is_test = whole.images["split"] == "test"
    labels = np.empty(len(is_test), dtype=object)
    for row, hidden in enumerate(is_test):
        labels[row] = Sealed() if hidden else bool(whole.images["abnormal"][row])
    boxes = whole.boxes[whole.boxes["split"] == "train"]
    sealed = dataset_tables.Dataset(
        whole.root, whole.images.drop(columns="boxes").assign(abnormal=pd.Series(labels)), boxes
    )
    with pytest.raises(AssertionError, match="was read"):  # the seal itself holds
        bool(sealed.images.loc[is_test, "abnormal"].iloc[0])
    with monkeypatch.context() as patch:
        for module in (dataset_tables, crossvalidation):
            patch.setattr(module, "read_dataset", lambda root: sealed)
        found = triage_crossvalidation.cross_validate(workspace, NETWORK)
        y, prob = found.out_of_fold["label"].to_numpy(), found.out_of_fold[["prob"]].to_numpy()
        omega = ensemble.fit_weights(y, prob)
        vote = ensemble.soft_vote(prob, omega)
        temperature = ensemble.fit_temperature(y, vote)
        tau = youden_threshold(y, ensemble.with_temperature(vote, temperature))
        with pytest.raises(DernetError, match="expected to be chosen out of fold"):
            triage_crossvalidation.open_test_labels(workspace)
        decision = ensemble.Decision(
            (NETWORK,), tuple(omega.tolist()), temperature, {"youden": tau}, len(y)
        )
        crossvalidation.write_decision(workspace, decision)
    assert crossvalidation.read_decision(workspace) == decision
    opened = triage_crossvalidation.open_test_labels(workspace)
    assert opened.tolist() == whole.images.loc[is_test, "abnormal"].tolist()
    assert len(opened) == len(found.test) and "label" not in found.test


def test_images_of_the_test_split_come_without_labels(workspace):
    images = triage_crossvalidation.triage_images(workspace)
    test = images["split"] == "test"
    assert images.loc[test, ["label", "fold"]].isna().all(axis=None)
    assert not images.loc[~test, ["label", "fold"]].isna().any(axis=None)
    assert test.is_monotonic_increasing and all(Path(path).is_file() for path in images["path"])


def test_a_spoilt_decision_opens_nothing(workspace):
    path = workspace.tables / "decision.json"
    good = {"networks": ["a"], "weights": [1.0], "temperature": 1.0, "thresholds": {}}
    for spoilt in ("", "[]", "{}", json.dumps(good), json.dumps(good | {"fitted_on": 1, "x": 2})):
        path.write_text(spoilt)
        with pytest.raises(DernetError, match="is no decision"):
            triage_crossvalidation.open_test_labels(workspace)


def test_a_lesions_place_is_its_boxes_centre(workspace):
    images = triage_crossvalidation.triage_images(workspace)
    whole = dataset_tables.read_dataset(workspace.data_root)
    assert images.loc[images["split"] == "test", "lesions"].map(len).eq(0).all()
    train = images[images["split"] == "train"].set_index("image_id")
    assert (train["lesions"].map(len) > 0).tolist() == train["label"].tolist()
    box = whole.boxes[whole.boxes["split"] == "train"].iloc[0]
    height, width = cv2.imread(train.loc[box["image_id"], "path"], cv2.IMREAD_GRAYSCALE).shape
    x, y, kind = train.loc[box["image_id"], "lesions"][0]  # films this small are cached whole
    assert x * width == pytest.approx((box["xmin"] + box["xmax"]) / 2)
    assert y * height == pytest.approx((box["ymin"] + box["ymax"]) / 2)
    assert vocabulary.LESION_TYPES[int(kind)] == box["lesion_type"]


# Every image once


def test_each_training_image_is_scored_once_by_a_network_that_never_saw_it(workspace):
    lines = []
    found = triage_crossvalidation.cross_validate(
        workspace, NETWORK, lambda fold, row: lines.append((fold, row["epoch"]))
    )
    folds, epochs = workspace.profile.folds, workspace.profile.triage_epochs
    assert lines == [(fold, epoch) for fold in range(folds) for epoch in range(1, epochs + 1)]
    images = triage_crossvalidation.triage_images(workspace)
    train = images[images["split"] == "train"]
    assert found.out_of_fold["image_id"].tolist() == train["image_id"].tolist()
    assert found.out_of_fold["prob"].between(0, 1).all()
    for fold, checkpoint in enumerate(found.checkpoints):
        # By hand: this fold's network on this fold's images, and on the test split.
        network, _ = training.load_network(NETWORK, checkpoint)
        rows = train[train["fold"] == fold]
        prob = triage_networks.predict_probabilities(
            network, training.load_pixels(rows["path"], 32)
        )
        assert found.out_of_fold["prob"][rows.index].to_numpy() == pytest.approx(prob, abs=1e-6)
        pixels, network = training.load_pixels(rows["path"], 32), network.eval()
        with torch.no_grad():  # as after the epoch: not mirrored, in bfloat16 where that is faster
            plain = network(triage_networks.as_input(pixels)).squeeze(1).sigmoid().numpy()
        said = found.epochs[found.epochs["epoch"] == epochs].set_index("image_id")["prob"]
        assert said[rows["image_id"]].to_numpy() == pytest.approx(plain, abs=0.02)
        facts = training.checkpoint_facts(checkpoint)
        assert facts["fold"] == f"{fold} of {folds}" and facts["profile"] == "smoke"
        assert json.loads(facts["recipe"])["seed"] == 42 and facts["commit"]
    test = images.loc[images["split"] == "test", "path"]
    networks = [training.load_network(NETWORK, path)[0] for path in found.checkpoints]
    each = [
        triage_networks.predict_probabilities(one, training.load_pixels(test, 32))
        for one in networks
    ]
    assert found.test["prob"].to_numpy() == pytest.approx(np.mean(each, axis=0), abs=1e-6)
    again = triage_crossvalidation.cross_validate(
        workspace, NETWORK, lambda *_: pytest.fail("trained")
    )
    assert again.out_of_fold.equals(found.out_of_fold)
    assert again.epochs.equals(found.epochs)
    of_image = found.epochs.groupby("image_id")["epoch"].agg(list)
    assert sorted(of_image.index) == sorted(train["image_id"])
    assert of_image.map(lambda own: own == list(range(1, epochs + 1))).all()


def test_other_test_images_are_scored_anew_without_training(workspace, monkeypatch):
    before = triage_crossvalidation.cross_validate(workspace, NETWORK)
    images = triage_crossvalidation.triage_images(workspace)
    gone = images.index[images["split"] == "test"][0]
    for fewer in (images.drop(index=gone), images):
        monkeypatch.setattr(crossvalidation, "triage_images", lambda _, fewer=fewer: fewer)
        after = triage_crossvalidation.cross_validate(
            workspace, NETWORK, lambda *_: pytest.fail("trained")
        )
        assert after.out_of_fold.equals(before.out_of_fold)
        both = after.test.merge(before.test, on="image_id", suffixes=("", "_before"))
        assert len(both) == len(after.test) == (fewer["split"] == "test").sum()
        assert both["prob"].to_numpy() == pytest.approx(both["prob_before"].to_numpy(), abs=1e-6)


def test_two_runs_with_one_seed_give_identical_probabilities(workspace, tmp_path):
    first, second = (
        pd.read_parquet(
            triage_crossvalidation.train_fold(workspace_at(folder), NETWORK, 0).with_suffix(
                ".parquet"
            )
        )
        for folder in (workspace.folder, tmp_path / "other")
    )
    assert first.equals(second)
    other = workspace_at(tmp_path / "third", seed=7)
    third = triage_crossvalidation.train_fold(other, NETWORK, 0).with_suffix(".parquet")
    both = first.merge(pd.read_parquet(third), on="image_id")
    assert (both["prob_x"] != both["prob_y"]).any()


JOB = """
import sys
from pathlib import Path
import torch
from dernet_utils.crossvalidation import train_fold
from test_crossvalidation import workspace_at
torch.set_num_threads(1)
print(train_fold(workspace_at(Path(sys.argv[1]), triage_epochs=6), "densenet121", 0))
"""


def start(folder: Path) -> subprocess.Popen:
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", JOB, str(folder)],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_killed_at_a_random_moment_and_run_again_ends_as_if_never_killed(workspace, tmp_path):
    unbroken = Path(start(tmp_path / "unbroken").communicate(timeout=300)[0].strip())
    seconds = pd.DataFrame(json.loads(training.checkpoint_facts(unbroken)["history"]))["seconds"]
    moment = random.SystemRandom().uniform(0, seconds.sum())
    killed = start(tmp_path / "killed")
    weights = tmp_path / "killed" / "weights"
    while killed.poll() is None and not any(weights.glob("*.resume")):
        time.sleep(0.02)
    time.sleep(moment)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again = Path(start(tmp_path / "killed").communicate(timeout=300)[0].strip())
    one, other = load_file(unbroken), load_file(again)
    assert all((one[key] == other[key]).all() for key in one), f"killed after {moment:.2f} s"
    assert again.name == unbroken.name
    tables = [pd.read_parquet(path.with_suffix(".parquet")) for path in (unbroken, again)]
    assert tables[0].equals(tables[1])
    assert {path.suffix for path in weights.iterdir()} <= {".safetensors", ".parquet", ".part"}


# The canary: a label that only the study gives away


def films_of_studies(folder: Path, studies: int, films: int) -> pd.DataFrame:
    """Films that tell their study and nothing else; a study's label is drawn at random."""
    rng = np.random.default_rng(5)
    folder.mkdir()
    rows = []
    for study in range(studies):
        pattern = rng.integers(0, 2, (4, 4)).repeat(8, 0).repeat(8, 1) * 150
        for film in range(films):
            path = folder / f"{study}-{film}.png"
            noise = rng.integers(0, 60, (32, 32))
            cv2.imwrite(str(path), (pattern + noise).astype(np.uint8))
            rows.append((f"{study:08x}{film:024x}", f"{study:032x}", str(path), study % 2 == 0))
    return pd.DataFrame(rows, columns=["image_id", "study_id", "path", "label"])


def test_canary_study_tells_the_label_and_our_folds_do_not_hear_it(tmp_path, monkeypatch):
    films = films_of_studies(tmp_path / "films", studies=24, films=8)
    workspace = workspace_at(tmp_path / "run", triage_epochs=10, folds=2, triage_batch=8)
    labelled = films.assign(abnormal=films["label"], boxes=films["label"].astype(int))
    types = {"split": "train", "series_id": films["study_id"], "abnormal": films["label"]}
    ours = dataset_folds.make_folds(labelled.assign(**types), 2, seed=0)[["image_id", "fold"]]
    dealt_by_image = ours.assign(fold=np.arange(len(ours)) % 2)  # every study in both
    found = {}
    for name, folds in (("by study", ours), ("by image", dealt_by_image)):
        images = films.merge(folds).assign(split="train").astype({"label": "boolean"})
        monkeypatch.setattr(crossvalidation, "triage_images", lambda _, images=images: images)
        scored = triage_crossvalidation.cross_validate(workspace, NETWORK).out_of_fold
        y, prob = scored["label"].to_numpy(), scored["prob"].to_numpy()
        found[name] = intervals.bootstrap_by_study(
            lambda rows, y=y, prob=prob: auroc(y[rows], prob[rows]), scored["study_id"], 500
        )
    assert found["by study"].low < 0.5 < found["by study"].high, found
    assert 0.3 < found["by study"].value < 0.7, found
    assert found["by image"].value > 0.9, found  # the canary can be heard


# Bad input


def test_a_fold_that_is_none_and_a_network_that_is_none(workspace):
    with pytest.raises(DernetError, match="are 0 to 1, and 2 is none"):
        triage_crossvalidation.train_fold(workspace, NETWORK, 2)
    with pytest.raises(DernetError, match="one of densenet121"):
        triage_crossvalidation.train_fold(workspace, "vgg16", 0)


def test_a_fold_without_normal_images_is_told(workspace, monkeypatch):
    images = triage_crossvalidation.triage_images(workspace)
    spoilt = images[~((images["fold"] == 1) & ~images["label"].fillna(False))]
    monkeypatch.setattr(crossvalidation, "triage_images", lambda _: spoilt)
    with pytest.raises(DernetError, match=r"the images held out are .* of one class"):
        triage_crossvalidation.train_fold(workspace, NETWORK, 1)
    with pytest.raises(DernetError, match=r"the images to learn from are .* of one class"):
        triage_crossvalidation.train_fold(workspace, NETWORK, 0)


def test_folds_of_another_cohort_are_refused(workspace):
    dataset_folds.load_folds(workspace, dataset_tables.read_dataset(workspace.data_root).images)
    path = workspace.tables / "folds.parquet"
    folds = pd.read_parquet(path)
    folds.iloc[1:].to_parquet(path)
    with pytest.raises(DernetError, match="was written for other data"):
        triage_crossvalidation.train_fold(workspace, NETWORK, 0)


def test_a_checkpoint_of_another_network_or_recipe_or_none_at_all(workspace, tmp_path):
    checkpoint = triage_crossvalidation.train_fold(workspace, NETWORK, 0)
    with pytest.raises(DernetError, match="expected to hold network resnet50, and holds densenet"):
        training.load_network("resnet50", checkpoint)
    other = training.TriageRecipe.of(get_profile("paper"))
    with pytest.raises(DernetError, match=r'hold recipe .*384.* holds .*"image_px": 32'):
        training.load_network(NETWORK, checkpoint, other)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(checkpoint.read_bytes()[:-100])
    for path in (damaged, tmp_path / "none.safetensors"):
        with pytest.raises(DernetError, match=r"cannot be read .* train anew"):
            training.load_network(NETWORK, path)


@pytest.fixture
def runs(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A folder of runs whose `smoke` has the tiny dataset as its cohort."""
    cohort = tmp_path / "smoke" / "cohort"
    shutil.copytree(tiny_dataset, cohort)
    (cohort / "manifest.json").write_text("{}")  # a cohort that is there is not made anew
    return tmp_path


def dernet_train(runs: Path, *arguments: str, launch: tuple = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *launch, "dernet_utils.cli", "train", *arguments]
    environment = os.environ | {"DERNET_RUNS": str(runs), "DERNET_PROFILE": "smoke"}
    return subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment)


def test_the_command_trains_one_fold_and_finds_it_again(runs: Path):
    said = [dernet_train(runs, NETWORK, "--fold", "1") for _ in range(2)]
    assert [done.returncode for done in said] == [0, 0], said
    lines = [(done.stdout + done.stderr).splitlines() for done in said]
    assert [sum("validation AUROC" in line for line in some) for some in lines] == [2, 0]
    checkpoint = next((runs / "smoke" / "weights").glob("*.safetensors"))
    assert lines[0][-1] == lines[1][-1] == f"{NETWORK}, fold 1: {checkpoint.name}"
    none = dernet_train(runs, NETWORK, "--fold", "9")
    assert none.returncode == 1 and "Traceback" not in none.stderr
    assert "are 0 to 2, and 9 is none" in none.stderr.replace("\n", " ")


def test_processes_that_accelerate_starts_share_the_folds_out(runs: Path):
    launch = ("accelerate.commands.launch", "--cpu", "--num_processes", "2")
    launch += ("--main_process_port", "0", "--module")
    done = dernet_train(runs, NETWORK, "--threads", "1", launch=launch)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = [line for line in done.stdout.splitlines() if line.endswith(".safetensors")]
    assert sorted(line.split(":")[0] for line in trained) == [
        f"{NETWORK}, fold {fold}" for fold in range(3)
    ]
    assert sum("validation AUROC" in line for line in done.stdout.splitlines()) == 3 * 2
    again = dernet_train(runs, NETWORK)  # by one process: everything is there already
    assert again.returncode == 0 and "AUROC" not in again.stdout
    assert sorted(again.stdout.splitlines()) == sorted(trained)


def test_a_bar_a_fold_that_ends_with_its_last_epoch(capsys):
    profile = get_profile("smoke")
    show = progress.epoch_bars(NETWORK, profile)
    row = {"train_loss": 0.61, "validation_auroc": 0.74}
    for fold, epochs in ((0, (1, 2)), (1, (2,))):  # the second was killed after an epoch
        for epoch in epochs:
            show(fold, row | {"epoch": epoch})
    said = capsys.readouterr().err
    for fold in (0, 1):
        assert f"{NETWORK}, fold {fold} of 3: 100%" in said
    assert "2/2" in said and "held-out AUROC=0.740" in said
