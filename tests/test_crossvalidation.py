"""Cross-validation: nothing leaks, no image is lost, and the test labels stay sealed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file

from dernet_utils.book import progress
from dernet_utils.book.graph import data_digest
from dernet_utils.book.prepare import prepare
from dernet_utils.core import files
from dernet_utils.core.errors import DernetError
from dernet_utils.core.files import PROJECT
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.vocabulary import CORNERS, LESION_TYPES
from dernet_utils.core.workspace import Workspace
from dernet_utils.dataset.folds import make_folds
from dernet_utils.dataset.prepared import read_boxes, read_images
from dernet_utils.metrics import intervals
from dernet_utils.metrics.classification import auroc, youden_threshold
from dernet_utils.triage import crossvalidation, ensemble, training
from dernet_utils.triage.networks import as_input, predict_probabilities

pytestmark = pytest.mark.slow
NETWORK = "densenet121"  # the quickest of the three
NUMBERS = {
    "patients": None, "folds": 2, "triage_px": 32, "triage_epochs": 2, "triage_crop_epochs": 0
}  # fmt: skip


def workspace_at(folder: Path, **numbers) -> Workspace:
    return Workspace(get_profile("smoke").model_copy(update=NUMBERS | numbers), folder)


@pytest.fixture(scope="module")
def prepared(_tiny_original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose data are prepared, and nothing more."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DERNET_DATA", str(_tiny_original))
        prepare(workspace_at(folder), 1, lambda line: None)
    return folder


@pytest.fixture
def copy_of(prepared: Path, _tiny_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes prepared workspaces, each in a folder of its own."""
    monkeypatch.setenv("DERNET_DATA", str(_tiny_original))
    monkeypatch.delenv("DERNET_WEIGHTS", raising=False)

    def copied(name: str, **numbers) -> Workspace:
        return workspace_at(Path(shutil.copytree(prepared, tmp_path / name)), **numbers)

    return copied


@pytest.fixture
def workspace(copy_of) -> Workspace:
    return copy_of("run")


# Sealed labels


class Sealed:
    """A label that must not be read."""

    def _seal(self, *_):
        raise AssertionError("a test label was read before the decision")

    __bool__ = __eq__ = __int__ = __float__ = __index__ = __invert__ = __and__ = __hash__ = _seal
    __str__ = __repr__ = _seal


def sealed(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The table, with a seal for each value of these columns in rows of the test split."""
    is_test = (table["split"] == "test").to_numpy()
    for column in columns:
        values = table[column].to_numpy(object)
        values[is_test] = Sealed()
        table = table.assign(**{column: pd.Series(values, index=table.index)})
    return table


def test_test_labels_are_unreadable_until_the_decision_is_written(workspace, monkeypatch):
    images, boxes = read_images(workspace), read_boxes(workspace)
    is_test = images["split"] == "test"
    hidden_images = sealed(images, ["abnormal", "boxes", "faint"])
    hidden_boxes = sealed(boxes, ["lesion_type", *CORNERS])
    for table, column in ((hidden_images, "abnormal"), (hidden_boxes, "lesion_type")):
        with pytest.raises(AssertionError, match="was read"):  # the seal itself holds
            bool(table.loc[table["split"] == "test", column].iloc[0])
    with monkeypatch.context() as patch:
        patch.setattr(crossvalidation, "read_images", lambda _: hidden_images)
        patch.setattr(crossvalidation, "read_boxes", lambda _: hidden_boxes)
        found = crossvalidation.cross_validate(workspace, NETWORK)
        y, prob = found.out_of_fold["label"].to_numpy(), found.out_of_fold[["prob"]].to_numpy()
        temperatures, omega = ensemble.fit_calibrated_vote(y, prob)
        vote = ensemble.calibrated_vote(prob, temperatures, omega)
        temperature = ensemble.fit_temperature(y, vote)
        tau = youden_threshold(y, ensemble.with_temperature(vote, temperature))
        with pytest.raises(DernetError, match="out of fold"):
            crossvalidation.open_test_labels(workspace)
        decision = ensemble.Decision(
            (NETWORK,),
            tuple(omega.tolist()),
            tuple(temperatures.tolist()),
            temperature,
            {"youden": tau},
            len(y),
        )
        crossvalidation.write_decision(workspace, decision)
    assert crossvalidation.read_decision(workspace) == decision
    opened = crossvalidation.open_test_labels(workspace)
    assert opened.tolist() == images.loc[is_test, "abnormal"].tolist()
    assert len(opened) == len(found.test) and "label" not in found.test


def test_images_of_the_test_split_come_without_labels(workspace):
    images = crossvalidation.triage_images(workspace)
    test = images["split"] == "test"
    assert images.loc[test, ["label", "fold"]].isna().all(axis=None)
    assert not images.loc[~test, ["label", "fold"]].isna().any(axis=None)
    assert test.is_monotonic_increasing
    assert all(Path(path).is_file() for path in images["cached_path"])


def test_a_damaged_decision_opens_nothing(workspace):
    path = workspace.tables / "decision.json"
    good = {
        "networks": ["a"],
        "weights": [1.0],
        "network_temperatures": [1.0],
        "temperature": 1.0,
        "thresholds": {},
        "fitted_on": 1,
    }
    path.write_text(json.dumps(good))
    assert crossvalidation.read_decision(workspace).network_temperatures == (1.0,)
    lacking = [{key: good[key] for key in good if key != one} for one in good]  # also an older file
    wrong = {"x": 2}, {"network_temperatures": [1.0, 1.0]}, {"network_temperatures": [0.0]}
    for damaged in ("", "[]", "{}", *map(json.dumps, [*lacking, *(good | one for one in wrong)])):
        path.write_text(damaged)
        with pytest.raises(DernetError, match=r"decision\.json"):
            crossvalidation.open_test_labels(workspace)


def test_a_lesions_position_is_its_boxes_centre(workspace):
    images = crossvalidation.triage_images(workspace)
    boxes = read_boxes(workspace)
    assert images.loc[images["split"] == "test", "lesions"].map(len).eq(0).all()
    train = images[images["split"] == "train"].set_index("image_id")
    assert (train["lesions"].map(len) > 0).tolist() == train["label"].tolist()
    box = boxes[boxes["split"] == "train"].iloc[0]
    cached = train.loc[box["image_id"], "cached_path"]
    height, width = cv2.imread(cached, cv2.IMREAD_GRAYSCALE).shape
    x, y, kind = train.loc[box["image_id"], "lesions"][0]  # images this small keep their size
    assert x * width == pytest.approx((box["xmin"] + box["xmax"]) / 2)
    assert y * height == pytest.approx((box["ymin"] + box["ymax"]) / 2)
    assert LESION_TYPES[int(kind)] == box["lesion_type"]


# Every image once


def test_each_training_image_is_scored_once_by_a_network_not_trained_on_it(workspace):
    lines = []
    found = crossvalidation.cross_validate(
        workspace, NETWORK, lambda fold, row: lines.append((fold, row["epoch"]))
    )
    folds, epochs = workspace.profile.folds, workspace.profile.triage_epochs
    assert lines == [(fold, epoch) for fold in range(folds) for epoch in range(1, epochs + 1)]
    images = crossvalidation.triage_images(workspace)
    train = images[images["split"] == "train"]
    assert found.out_of_fold["image_id"].tolist() == train["image_id"].tolist()
    assert found.out_of_fold["prob"].between(0, 1).all()
    for fold, checkpoint in enumerate(found.checkpoints):
        # By hand: this fold's network on this fold's images, and on the test split.
        network, _ = training.load_network(NETWORK, checkpoint)
        rows = train[train["fold"] == fold]
        prob = predict_probabilities(network, training.load_pixels(rows["cached_path"], 32))
        assert found.out_of_fold["prob"][rows.index].to_numpy() == pytest.approx(prob, abs=1e-6)
        pixels, network = training.load_pixels(rows["cached_path"], 32), network.eval()
        with torch.no_grad():  # as after the epoch: not mirrored, in bfloat16 where that is faster
            plain = network(as_input(pixels)).squeeze(1).sigmoid().numpy()
        said = found.epochs[found.epochs["epoch"] == epochs].set_index("image_id")["prob"]
        assert said[rows["image_id"]].to_numpy() == pytest.approx(plain, abs=0.02)
        facts = training.checkpoint_facts(checkpoint)
        assert facts["fold"] == f"{fold} of {folds}" and facts["profile"] == "smoke"
        assert json.loads(facts["recipe"])["seed"] == 42 and facts["commit"]
    test = images.loc[images["split"] == "test", "cached_path"]
    networks = [training.load_network(NETWORK, path)[0] for path in found.checkpoints]
    each = [predict_probabilities(one, training.load_pixels(test, 32)) for one in networks]
    assert found.test["prob"].to_numpy() == pytest.approx(np.mean(each, axis=0), abs=1e-6)
    of_image = found.epochs.groupby("image_id")["epoch"].agg(list)
    assert set(of_image.index) == set(train["image_id"])
    assert of_image.map(lambda own: own == list(range(1, epochs + 1))).all()


def test_tables_are_read_without_a_network_or_an_image(workspace, monkeypatch):
    found = crossvalidation.cross_validate(workspace, NETWORK)
    for name in ("train_triage", "load_pixels", "predict_probabilities"):
        monkeypatch.setattr(crossvalidation, name, lambda *_, **__: pytest.fail("computed again"))
    shutil.rmtree(workspace.cache)
    again = crossvalidation.cross_validate(workspace, NETWORK)
    for name in ("out_of_fold", "test", "curves", "epochs"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name))
    assert again.checkpoints == found.checkpoints
    found.checkpoints[0].unlink()  # chapters load it: a table alone is not enough, so it is trained
    with pytest.raises(DernetError, match="cached image"):
        crossvalidation.cross_validate(workspace, NETWORK)


CHANGES = ("nothing", "docstring", "code", "test image", "image", "fold", "label", "lesion",
           "number", "start")  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_table_is_stale_when_anything_it_is_computed_from_changes(
    workspace, tmp_path, monkeypatch, change
):
    """`train_triage` and the scoring are replaced by functions that only count their calls."""
    images, done = crossvalidation.triage_images(workspace), []
    train = images.index[images["split"] == "train"]
    changed, profile = images.copy(), workspace.profile
    checkpoint = workspace.weights / "some.safetensors"
    checkpoint.write_bytes(b"")

    def no_training(name, train, validation, *rest):
        done.append(name)
        return training.TrainedNetwork(None, pd.DataFrame({"epoch": [1]}), checkpoint)

    for module, name, instead in (
        (crossvalidation, "train_triage", no_training),
        (crossvalidation, "predict_probabilities", lambda network, pixels: np.zeros(len(pixels))),
        (crossvalidation, "load_pixels", lambda paths, px: list(paths)),
        (crossvalidation, "Sample", type("Sample", (), {"load": staticmethod(lambda *_: None)})),
    ):
        monkeypatch.setattr(module, name, instead)

    def run():
        crossvalidation._train_fold(replace(workspace, profile=profile), changed, NETWORK, 0, None)

    run()
    if change == "test image":
        changed = images.drop(index=images.index[-1])
    elif change == "image":
        other = Path(images.at[train[0], "cached_path"]).with_name("other.png")
        changed.at[train[0], "cached_path"] = str(other)
    elif change == "fold":
        changed.at[train[0], "fold"] = 1 - images.at[train[0], "fold"]
    elif change == "label":
        changed.at[train[0], "label"] = not images.at[train[0], "label"]
    elif change == "lesion":
        row = next(row for row in train if len(images.at[row, "lesions"]))
        changed.at[row, "lesions"] = images.at[row, "lesions"] / 2
    elif change == "number":
        profile = profile.model_copy(update={"triage_lr": 2e-3})
    elif change == "start":
        (tmp_path / f"{NETWORK}.safetensors").write_bytes(b"weights")
        monkeypatch.setenv("DERNET_WEIGHTS", str(tmp_path))
    elif change in ("docstring", "code"):
        package = shutil.copytree(PROJECT / "dernet_utils", tmp_path / "dernet_utils")
        module = package / "triage" / "training.py"
        text = module.read_text()
        if change == "docstring":
            module.write_text(text.replace('"""Train', '"""Do train') + "\n# a comment\n")
        else:
            module.write_text(text + "\nMORE = 1\n")
        assert module.read_text() != text
        monkeypatch.setattr(files, "PROJECT", tmp_path)
    run()
    assert len(done) == (1 if change in ("nothing", "docstring") else 2)


def test_other_test_images_are_scored_anew_without_training(workspace, monkeypatch):
    before = crossvalidation.cross_validate(workspace, NETWORK)
    images = crossvalidation.triage_images(workspace)
    fewer = images.drop(index=images.index[images["split"] == "test"][0])
    monkeypatch.setattr(crossvalidation, "triage_images", lambda _: fewer)
    after = crossvalidation.cross_validate(workspace, NETWORK, lambda *_: pytest.fail("trained"))
    assert after.out_of_fold.equals(before.out_of_fold) and after.checkpoints == before.checkpoints
    both = after.test.merge(before.test, on="image_id", suffixes=("", "_before"))
    assert len(both) == len(after.test) == len(before.test) - 1
    assert both["prob"].to_numpy() == pytest.approx(both["prob_before"].to_numpy(), abs=1e-6)


def test_two_runs_with_one_seed_give_identical_probabilities(copy_of):
    first, second, other = (
        pd.read_parquet(crossvalidation.train_fold(copy_of(name, **numbers), NETWORK, 0))
        for name, numbers in (("a", {}), ("b", {}), ("c", {"seed": 7}))
    )
    assert first.equals(second)
    assert not first.equals(other) and first["image_id"].equals(other["image_id"])


JOB = """
import sys
from pathlib import Path
import torch
from dernet_utils.triage.crossvalidation import train_fold
from test_crossvalidation import workspace_at
torch.set_num_threads(1)
print(train_fold(workspace_at(Path(sys.argv[1]), triage_epochs=4), "densenet121", 0))
"""


def start(folder: Path) -> subprocess.Popen:
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", JOB, str(folder)],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_killed_at_a_random_moment_and_run_again_ends_as_an_uninterrupted_run(copy_of):
    runs = {name: copy_of(name) for name in ("unbroken", "killed")}
    table = Path(start(runs["unbroken"].folder).communicate(timeout=300)[0].strip())
    unbroken = pd.read_parquet(table)
    seconds = pd.DataFrame(json.loads(unbroken.attrs["history"]))["seconds"]
    moment = random.SystemRandom().uniform(0, seconds.sum())
    killed = start(runs["killed"].folder)
    weights = runs["killed"].weights
    while killed.poll() is None and not any(weights.glob("*.resume")):
        time.sleep(0.02)
    time.sleep(moment)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again = pd.read_parquet(start(runs["killed"].folder).communicate(timeout=300)[0].strip())
    assert again.equals(unbroken), f"killed after {moment:.2f} s"
    assert again.attrs["checkpoint"] == unbroken.attrs["checkpoint"]
    states = [load_file(run.weights / unbroken.attrs["checkpoint"]) for run in runs.values()]
    assert all((states[0][key] == states[1][key]).all() for key in states[0])
    # Only a file that was half-written when the process was killed may be left over.
    left = {path.name for path in weights.iterdir() if not path.name.startswith(".")}
    assert left == {unbroken.attrs["checkpoint"]}


# A label that only the study gives away


def images_of_studies(folder: Path, studies: int, each: int) -> pd.DataFrame:
    """Images that show their study and nothing else; a study's pattern is drawn at random."""
    rng = np.random.default_rng(5)
    folder.mkdir()
    rows = []
    for study in range(studies):
        pattern = rng.integers(0, 2, (4, 4)).repeat(8, 0).repeat(8, 1) * 150
        for number in range(each):
            path = folder / f"{study}-{number}.png"
            noise = rng.integers(0, 60, (32, 32))
            cv2.imwrite(str(path), (pattern + noise).astype(np.uint8))
            ids = f"{study:08x}{number:024x}", f"{study:032x}"
            rows.append((*ids, "train", str(path), study % 2 == 0, np.empty((0, 3))))
    columns = ["image_id", "study_id", "split", "cached_path", "label", "lesions"]
    return pd.DataFrame(rows, columns=columns)


def test_a_label_that_the_study_gives_away_leaks_by_image_but_not_by_study(tmp_path, monkeypatch):
    def small(name, weights=None, seed=42):  # the folds are tested here, not the network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return timm.create_model("test_resnet", num_classes=1)

    monkeypatch.setattr(training, "build_network", small)
    images = images_of_studies(tmp_path / "images", studies=24, each=8)
    numbers = {"triage_epochs": 10, "triage_batch": 8, "triage_lr": 3e-3, "triage_detail": 1}
    workspace = workspace_at(tmp_path / "run", **numbers)
    ours = make_folds(images.assign(abnormal=images["label"]), 2, seed=0)[["image_id", "fold"]]
    by_image = ours.assign(fold=np.arange(len(ours)) % 2)  # every study in both
    found = {}
    for name, folds in (("by study", ours), ("by image", by_image)):
        table = images.merge(folds).assign(faint=False).astype({"label": "boolean"})
        monkeypatch.setattr(crossvalidation, "triage_images", lambda _, table=table: table)
        scored = crossvalidation.cross_validate(workspace, NETWORK).out_of_fold
        y, prob = scored["label"].to_numpy(), scored["prob"].to_numpy()
        found[name] = intervals.bootstrap_by_study(
            lambda rows, y=y, prob=prob: auroc(y[rows], prob[rows]), scored["study_id"], 500
        )
    assert found["by study"].low < 0.5 < found["by study"].high, found
    assert 0.3 < found["by study"].value < 0.7, found
    assert found["by image"].value > 0.9, found  # the test can detect a leak


# Bad input


def test_an_unknown_fold_or_network_is_refused(workspace):
    with pytest.raises(DernetError, match=r"0 to 1.* 2"):
        crossvalidation.train_fold(workspace, NETWORK, 2)
    with pytest.raises(DernetError, match="one of densenet121"):
        crossvalidation.train_fold(workspace, "vgg16", 0)


def test_a_fold_without_normal_images_is_refused(workspace, monkeypatch):
    images = crossvalidation.triage_images(workspace)
    changed = images[~((images["fold"] == 1) & ~images["label"].fillna(False))]
    monkeypatch.setattr(crossvalidation, "triage_images", lambda _: changed)
    with pytest.raises(DernetError, match=r"held out are .* of one class"):
        crossvalidation.train_fold(workspace, NETWORK, 1)
    with pytest.raises(DernetError, match=r"training images are .* of one class"):
        crossvalidation.train_fold(workspace, NETWORK, 0)


def test_a_checkpoint_of_another_network_or_recipe_or_none_at_all(workspace, tmp_path):
    table = crossvalidation.train_fold(workspace, NETWORK, 0)
    checkpoint = workspace.weights / pd.read_parquet(table).attrs["checkpoint"]
    with pytest.raises(DernetError, match="expected to hold network resnet50, but holds densenet"):
        training.load_network("resnet50", checkpoint)
    other = training.TriageRecipe.of(get_profile("paper"))
    with pytest.raises(DernetError, match=r'hold recipe .*384.* holds .*"image_px": 32'):
        training.load_network(NETWORK, checkpoint, other)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(checkpoint.read_bytes()[:-100])
    for path in (damaged, tmp_path / "none.safetensors"):
        with pytest.raises(DernetError, match=r"cannot be read .* train again"):
            training.load_network(NETWORK, path)


@pytest.fixture
def runs(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A folder of runs whose `smoke` has the tiny dataset as its cohort."""
    run = tmp_path / "smoke"
    shutil.copytree(tiny_dataset, run / "cohort")
    (run / "cohort" / "manifest.json").write_text('{"virtual": true}')
    # A cohort of the present data digest is not made again.
    (run / "data.digest").write_text(data_digest(Workspace(get_profile("smoke"), run)))
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
    (table,) = (runs / "smoke" / "tables" / "triage").iterdir()
    assert lines[0][-1] == lines[1][-1] == f"{NETWORK}, fold 1: {table.name}"
    none = dernet_train(runs, NETWORK, "--fold", "9")
    assert none.returncode == 1 and "Traceback" not in none.stderr
    assert "0 to 2" in none.stderr and "9" in none.stderr


def test_processes_that_accelerate_starts_divide_the_folds(runs: Path):
    launch = ("accelerate.commands.launch", "--cpu", "--num_processes", "2")
    launch += ("--main_process_port", "0", "--module")
    done = dernet_train(runs, NETWORK, "--threads", "1", launch=launch)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = [line for line in done.stdout.splitlines() if line.endswith(".parquet")]
    assert sorted(line.split(":")[0] for line in trained) == [
        f"{NETWORK}, fold {fold}" for fold in range(3)
    ]
    assert sum("validation AUROC" in line for line in done.stdout.splitlines()) == 3 * 2
    again = dernet_train(runs, NETWORK)  # by one process: everything is there already
    assert again.returncode == 0 and "AUROC" not in again.stdout
    assert set(trained) <= set(again.stdout.splitlines())


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
