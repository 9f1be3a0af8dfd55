"""Triage networks: images, training, checkpoints, probabilities."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dernet_utils.book.benchmark import plain_epoch
from dernet_utils.core import machine
from dernet_utils.core.errors import DernetError
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.vocabulary import NETWORKS
from dernet_utils.core.weights import starting_weights
from dernet_utils.metrics.classification import auroc
from dernet_utils.triage import augment as triage_augment
from dernet_utils.triage.augment import augment, draw_crops
from dernet_utils.triage.images import Sample
from dernet_utils.triage.networks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    as_input,
    build_network,
    count_operations,
    predict_probabilities,
    receptive_field,
    starting_sentence,
)
from dernet_utils.triage.training import (
    TriageRecipe,
    checkpoint_facts,
    load_network,
    start_training,
    train_epoch,
    train_triage,
    training_batches,
    triage_epoch_line,
)

RECIPE = TriageRecipe(image_px=32, epochs=3, batch=8, lr=1e-3, seed=1)
NETWORK = "densenet121"  # the smallest checkpoint of the three


def bright_or_dark(n: int, seed: int, px: int = 32) -> Sample:
    """Noise whose lower half is bright where the label is 1."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    pixels = rng.integers(0, 120, (n, 1, px, px))
    pixels[:, :, px // 2 :] += 120 * y[:, None, None, None]
    return Sample(torch.tensor(pixels, dtype=torch.uint8), torch.tensor(y, dtype=torch.float32))


@pytest.fixture(scope="module")
def samples():
    return bright_or_dark(16, seed=0), bright_or_dark(8, seed=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def trained(samples, folder):
    return train_triage(NETWORK, *samples, RECIPE, folder)


def same_weights(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return all(torch.equal(first[key], second[key]) for key in first)


# Networks


@pytest.mark.parametrize("name", NETWORKS)
def test_the_three_networks_are_used_alike(name):
    network = build_network(name).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_image_starts_at_one_half(name):
    network = build_network(name).eval()
    with torch.no_grad():
        assert network(torch.rand(2, 3, 64, 64)).abs().max() == 0


@pytest.mark.parametrize("name, blocks", [("resnet50", 16), ("tf_efficientnetv2_s", 33)])
def test_residual_blocks_start_at_half_scale(name, blocks):
    # By hand: 3 + 4 + 6 + 3 bottlenecks; of the 4 + 4 + 6 + 9 + 15 blocks of stages 2 to 6 all
    # but each stage's first have a skip connection.
    halved = [
        norm
        for norm in build_network(name).modules()
        if isinstance(norm, nn.BatchNorm2d) and norm.weight.eq(0.5).all()
    ]
    assert len(halved) == blocks


def test_operations_and_receptive_field_of_resnet50():
    # He et al. 2016: 3.8 billion multiply-adds at 224 px, as torchvision counts them 4.09 with the
    # stride in the 3 x 3 convolution. Araujo et al. (Distill, 2019): a receptive field of 483 px;
    # there the stride is in the 1 x 1 convolution, and the 3 x 3 one then steps twice as far.
    assert count_operations(build_network("resnet50"), 224) / 2 == pytest.approx(4.09e9, rel=0.01)
    way = [(7, 2), (3, 2)] + [(3, 1)] * 3
    for blocks in (4, 6, 3):
        way += [(1, 2), *[(3, 1)] * blocks]
    assert receptive_field(way) == 483


def test_random_weights_follow_the_seed_and_leave_torch_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, again, other = (build_network(NETWORK, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(3), expected)
    assert same_weights(first, again) and not same_weights(first, other)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_checkpoint_gives_the_body_and_not_the_head(tmp_path, monkeypatch, suffix):
    state = build_network(NETWORK, seed=3).state_dict()
    state["classifier.weight"] = torch.ones(1000, 1024)
    state["classifier.bias"] = torch.ones(1000)
    path = tmp_path / f"{NETWORK}{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    monkeypatch.setenv("DERNET_WEIGHTS", str(tmp_path))
    assert starting_weights(NETWORK) == path
    network = build_network(NETWORK, path, seed=4)
    first = "features.conv0.weight"
    assert torch.equal(network.state_dict()[first], state[first])
    assert network.classifier.weight.shape == (1, 1024)
    assert path.name in starting_sentence(NETWORK, path)


def test_start_is_random_unless_a_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("DERNET_WEIGHTS", raising=False)
    assert starting_weights(NETWORK) is None
    assert "random weights" in starting_sentence(NETWORK, None)
    monkeypatch.setenv("DERNET_WEIGHTS", str(tmp_path))
    with pytest.raises(DernetError, match=f"holds no {NETWORK}"):
        starting_weights(NETWORK)


def test_checkpoint_of_another_network_is_refused(tmp_path):
    path = tmp_path / f"{NETWORK}.safetensors"
    save_file(build_network("resnet50").state_dict(), path)
    with pytest.raises(DernetError, match="does not fit"):
        build_network(NETWORK, path)
    with pytest.raises(DernetError, match="one of densenet121"):
        build_network("vgg16")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damaged_starting_weights_are_refused(tmp_path, suffix):
    path = tmp_path / f"{NETWORK}{suffix}"
    state = build_network(NETWORK).state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DernetError, match=r"cannot be read as a checkpoint .* copy it again"):
        build_network(NETWORK, path)
    with pytest.raises(DernetError, match="cannot be read as a checkpoint"):
        build_network(NETWORK, tmp_path / "none.safetensors")


# Images


def test_sample_reads_squares_and_labels(tmp_path):
    grey = np.tile(np.arange(0, 80, 2, dtype=np.uint8), (60, 1))  # 60 x 40
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), grey)
    sample = Sample.load(pd.DataFrame({"cached_path": [path, path], "label": [True, False]}), 20)
    assert sample.pixels.shape == (2, 1, 20, 20) and sample.y.tolist() == [1, 0]
    assert sample.pixels[0, 0, 0].tolist() == [4 * k + 1 for k in range(20)]  # means of pairs
    assert sample.lesions.shape == (0, 4)


def test_sample_finds_its_lesions_in_the_square(tmp_path):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.zeros((60, 40), np.uint8))
    lesions = [np.empty((0, 3)), np.array([[0.25, 0.5, 6], [0.5, 0.75, 0]])]
    table = pd.DataFrame({"cached_path": [path, path], "label": [False, True], "lesions": lesions})
    sample = Sample.load(table, 20)
    assert sample.lesions.tolist() == [[1, 5, 10, 6], [1, 10, 15, 0]]


def dots(n: int) -> Sample:
    """Black images; every other one has a bright dot, at one of two positions by its type."""
    pixels, y, lesions = torch.zeros(n, 1, 64, 64, dtype=torch.uint8), torch.arange(n) % 2, []
    for row in range(1, n, 2):
        kind = int(row % 8 == 1)  # a quarter is of the rare type
        x, place = (20, 40) if kind else (44, 24)
        pixels[row, 0, place, x] = 255
        lesions.append((row, x, place, kind))
    return Sample(pixels, y.float(), torch.tensor(lesions, dtype=torch.float32))


def test_half_of_the_crops_hold_a_lesion_and_rare_types_come_more_often():
    sample = dots(64)
    crops, y = draw_crops(sample, 4001, 32, torch.Generator().manual_seed(1))
    assert crops.shape == (4001, 1, 32, 32) and crops.dtype == torch.uint8
    assert y.tolist() == [1] * 2000 + [0] * 2001
    assert crops[:2000].flatten(1).max(dim=1).values.eq(255).all()
    assert crops[2000:].max() == 0
    # By hand: 8 and 24 lesions, drawn with weights 8 / sqrt(8) and 24 / sqrt(24).
    rows, columns = torch.nonzero(crops[:2000, 0])[:, 1], torch.nonzero(crops[:2000, 0])[:, 2]
    again = draw_crops(sample, 4001, 32, torch.Generator().manual_seed(1))
    assert torch.equal(again[0], crops)
    assert rows.min() >= 8 and rows.max() <= 24 and columns.min() >= 8 and columns.max() <= 24
    one_kind = Sample(sample.pixels.clone(), sample.y, sample.lesions)
    one_kind.pixels[:, 0, 40, 20] //= 2  # marks the rare type
    crops, _ = draw_crops(one_kind, 4001, 32, torch.Generator().manual_seed(1))
    rare = (crops[:2000].flatten(1).max(dim=1).values == 127).float().mean()
    assert rare == pytest.approx(8**0.5 / (8**0.5 + 24**0.5), abs=0.03)


def test_crops_of_normal_images_lie_where_others_have_lesions():
    sample = dots(64)
    place = torch.arange(64, dtype=torch.uint8)
    sample.pixels[sample.y == 0] = place.view(1, 1, 64, 1)  # each row's grey is its number
    crops, y = draw_crops(sample, 400, 16, torch.Generator().manual_seed(1))
    centre = crops[y == 0, 0, 8, 0].int()  # one of the two positions, a quarter of the side around
    assert ((centre - 24).abs().le(4) | (centre - 40).abs().le(4)).all()
    assert (centre - 24).abs().le(4).any() and (centre - 40).abs().le(4).any()


def test_crops_stay_inside_the_image():
    sample = dots(4)
    sample.lesions[:, 1:3] = torch.tensor([0.0, 63.0])
    crops, _ = draw_crops(sample, 20, 48, torch.Generator().manual_seed(1))
    assert crops.shape == (20, 1, 48, 48)


def test_input_is_three_equal_channels_normalised():
    pixels = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)
    x = as_input(pixels)
    assert x.shape == (1, 3, 2, 2) and x.dtype == torch.float32
    for channel in range(3):
        back = x[0, channel] * IMAGENET_STD[channel] + IMAGENET_MEAN[channel]
        assert torch.allclose(back, torch.tensor([[0, 1], [0.2, 0.4]]), atol=1e-6)


def test_augmentation_stays_in_range_and_follows_the_generator():
    pixels = bright_or_dark(12, seed=4).pixels
    first, again = (augment(pixels, torch.Generator().manual_seed(3)) for _ in range(2))
    other = augment(pixels, torch.Generator().manual_seed(4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == pixels.shape and first.min() >= 0 and first.max() <= 1


def test_augmentation_flips_half_and_rotates_rigidly():
    # A bright dot on the right: its distance from the centre is kept, its side is not.
    n, px = 400, 65
    pixels = torch.zeros(n, 1, px, px, dtype=torch.uint8)
    pixels[:, :, 31:34, 51:54] = 255  # centre at (32, 52), 20 px right of the middle
    out = augment(pixels, torch.Generator().manual_seed(0))[:, 0]
    out = (out - out.amin(dim=(1, 2), keepdim=True) - 0.1).clamp(min=0)  # the dot alone
    axis = torch.arange(px) - 32.0
    mass = out.sum(dim=(1, 2))
    x, y = (out.sum(1) * axis).sum(1) / mass, (out.sum(2) * axis).sum(1) / mass
    assert torch.allclose(torch.hypot(x, y), torch.tensor(20.0), atol=0.5)
    assert 0.4 < (x < 0).float().mean() < 0.6
    angle = torch.rad2deg(torch.atan(y / x))
    assert angle.abs().max() <= 15.5 and angle.abs().max() > 13


def test_an_image_is_turned_at_its_detail_and_then_averaged(monkeypatch):
    monkeypatch.setattr(triage_augment, "ROTATION_DEG", 0.0)
    monkeypatch.setattr(triage_augment, "BRIGHTNESS", 0.0)
    monkeypatch.setattr(triage_augment, "CONTRAST", 0.0)
    fine = bright_or_dark(8, seed=2, px=64)
    recipe = TriageRecipe(32, 1, 8, 1e-3, detail=2)
    ((grey, y, _),) = training_batches(fine, recipe, 0, torch.device("cpu"))
    assert grey.shape == (8, 1, 32, 32) and y.sum() == fine.y.sum() == 4
    coarse = fine.pixels.view(8, 1, 32, 2, 32, 2).float().mean(dim=(3, 5)) / 255
    for one in grey:
        assert (
            min((one - way).abs().max() for each in coarse for way in (each, each.flip(-1))) < 1e-5
        )


def test_sample_refuses_what_is_not_grey_bytes():
    with pytest.raises(DernetError, match="8-bit grey"):
        Sample(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2))
    with pytest.raises(DernetError, match="one label"):
        Sample(torch.zeros(2, 1, 32, 32, dtype=torch.uint8), torch.zeros(3))


# Training


def test_recipe_comes_from_the_profile():
    profile = get_profile("paper")
    assert TriageRecipe.of(profile) == TriageRecipe(384, 60, 16, 1e-4, 42)


@pytest.mark.slow
def test_learns_an_easy_task(tmp_path):
    train, validation = bright_or_dark(32, seed=0), bright_or_dark(16, seed=1)
    trained = train_triage(NETWORK, train, validation, TriageRecipe(32, 6, 8, 1e-3, 0), tmp_path)
    prob = predict_probabilities(trained.network, validation.pixels)
    assert auroc(validation.y, prob) > 0.95
    assert trained.history["train_loss"].iloc[-1] < trained.history["train_loss"].iloc[0]


def test_history_has_a_row_per_epoch(trained, samples):
    history = trained.history
    assert history["epoch"].tolist() == [1, 2, 3]
    assert history["lr"].is_monotonic_decreasing
    # Cosine by hand: the last of 3 x 2 steps is taken at 5/6 of the way.
    assert history["lr"].iloc[-1] == pytest.approx(1e-3 * (1 + np.cos(np.pi * 5 / 6)) / 2)
    assert history["validation_auroc"].between(0, 1).all()
    last = np.array(history["validation_logits"].iloc[-1])
    y = samples[1].y.numpy()
    assert auroc(y, last) == pytest.approx(history["validation_auroc"].iloc[-1], abs=0.02)
    assert triage_epoch_line(history.iloc[0].to_dict() | {"epoch": 1}).startswith("epoch  1")


def test_finished_run_is_loaded_not_trained(trained, samples, folder):
    rows = []
    again = train_triage(NETWORK, *samples, RECIPE, folder, progress=rows.append)
    assert rows == [] and again.checkpoint == trained.checkpoint
    assert same_weights(again.network, trained.network)
    assert again.history.equals(trained.history)
    assert list(folder.iterdir()) == [trained.checkpoint]


@pytest.mark.slow
def test_learns_crops_first_and_continues_where_it_was_killed(tmp_path):
    train, recipe = (
        dots(16),
        TriageRecipe(64, 1, 8, 1e-3, 0, crop_px=32, crop_epochs=2),
    )

    def kill(row):
        raise KeyboardInterrupt

    unbroken = train_triage(NETWORK, train, train, recipe, tmp_path / "a")
    history = unbroken.history
    assert history["trained_on"].tolist() == ["crops", "crops", "images"]
    assert history["lr"].is_monotonic_decreasing
    # Whole images are first scored after the last epoch on crops.
    assert history["validation_auroc"].isna().tolist() == [True, False, False]
    assert "validation" not in triage_epoch_line(
        json.loads(checkpoint_facts(unbroken.checkpoint)["history"])[0]
    )
    with pytest.raises(KeyboardInterrupt):
        train_triage(NETWORK, train, train, recipe, tmp_path / "b", progress=kill)
    again = train_triage(NETWORK, train, train, recipe, tmp_path / "b")
    assert same_weights(again.network, unbroken.network)
    with pytest.raises(DernetError, match="no lesion"):
        train_triage(NETWORK, Sample(train.pixels, train.y), train, recipe, tmp_path)
    with pytest.raises(DernetError, match="do not fit"):
        train_triage(NETWORK, train, train, TriageRecipe(64, 1, 8, 1e-3, 0, 96, 1), tmp_path)
    with pytest.raises(DernetError, match="squares of 128 px"):
        train_triage(NETWORK, train, train, TriageRecipe(64, 1, 8, 1e-3, detail=2), tmp_path)


@pytest.mark.parametrize("change", ["image", "label", "number", "start", "lesion"])
def test_any_change_of_a_run_is_another_run(trained, samples, tmp_path, change):
    train, validation = samples
    pixels, y, recipe, weights = train.pixels.clone(), train.y.clone(), RECIPE, None
    lesions = train.lesions
    if change == "image":
        pixels[3, 0, 5, 5] ^= 1
    elif change == "label":
        y[0] = 1 - y[0]
    elif change == "number":
        recipe = TriageRecipe(32, 1, 8, 2e-3, 1)
    elif change == "lesion":
        lesions = torch.ones(1, 4)
    else:
        weights = tmp_path / "start.safetensors"
        save_file(load_file(trained.checkpoint), weights)

    def stop(row):
        assert row["epoch"] == 1
        raise KeyboardInterrupt

    changed = Sample(pixels, y, lesions)
    with pytest.raises(KeyboardInterrupt):
        train_triage(NETWORK, changed, validation, recipe, tmp_path, weights, stop)
    (begun,) = tmp_path.glob("*.resume")
    assert begun.stem != trained.checkpoint.stem


@pytest.mark.slow
def test_killed_run_ends_as_an_uninterrupted_one(trained, samples, tmp_path):
    def kill_after_first(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_triage(NETWORK, *samples, RECIPE, tmp_path, progress=kill_after_first)
    assert len(list(tmp_path.glob("*.resume"))) == 1
    assert list(tmp_path.glob("*.safetensors")) == []
    rows = []
    resumed = train_triage(NETWORK, *samples, RECIPE, tmp_path, progress=rows.append)
    assert [row["epoch"] for row in rows] == [2, 3]
    assert same_weights(resumed.network, trained.network)
    assert resumed.history.drop(columns="seconds").equals(trained.history.drop(columns="seconds"))
    assert list(tmp_path.glob("*.resume")) == []


def test_training_leaves_torch_as_it_was(samples, tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    train_triage(NETWORK, *samples, TriageRecipe(32, 1, 8, 1e-3, 2), tmp_path)
    assert torch.equal(torch.rand(2), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_validation_images_change_nothing(trained, samples, tmp_path):
    train, _ = samples
    recipe = TriageRecipe(32, 1, 8, 1e-3, 1)
    networks = [
        train_triage(NETWORK, train, bright_or_dark(4, seed), recipe, tmp_path).network
        for seed in (5, 6)
    ]
    assert same_weights(*networks)


def test_training_refuses_one_class_and_another_size(samples, tmp_path):
    train, validation = samples
    with pytest.raises(DernetError, match="one class"):
        one = Sample(train.pixels[::2], train.y[::2])
        train_triage(NETWORK, one, validation, RECIPE, tmp_path)
    with pytest.raises(DernetError, match="64 px"):
        train_triage(NETWORK, train, validation, TriageRecipe(64, 1, 8, 1e-3), tmp_path)


def test_depthwise_convolutions_are_computed_in_float32():
    network, _ = start_training("tf_efficientnetv2_s", None, RECIPE)
    depthwise = [m for m in network.modules() if getattr(m, "groups", 1) > 1]
    assert depthwise
    for conv in (depthwise[0], depthwise[-1]):
        x = torch.rand(1, conv.in_channels, 6, 6).bfloat16()
        with torch.no_grad():
            exact = type(conv).forward(conv, x.float())
            with torch.autocast("cpu", torch.bfloat16):
                out = conv(x)
        assert out.dtype == torch.bfloat16 and torch.equal(out, exact.bfloat16())


def test_the_plain_loop_trains_on_the_same_batches(samples, monkeypatch):
    monkeypatch.setattr(machine, "bfloat16_helps", lambda device: False)
    train, evaluated = samples
    fast, optimizer = start_training(NETWORK, None, RECIPE)
    plain = build_network(NETWORK, None, RECIPE.seed)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=RECIPE.lr)
    before = predict_probabilities(plain, evaluated.pixels)
    for epoch in range(2):
        train_epoch(fast, optimizer, train, RECIPE, epoch)
        plain_epoch(plain, plain_optimizer, train, RECIPE, epoch)
    after = predict_probabilities(plain, evaluated.pixels)
    assert np.abs(after - before).max() > 0.05
    assert predict_probabilities(fast, evaluated.pixels) == pytest.approx(after, abs=0.02)


# Probabilities


def test_prediction_is_the_same_for_the_flipped_image(trained, samples):
    pixels = samples[1].pixels
    assert np.array_equal(
        predict_probabilities(trained.network, pixels),
        predict_probabilities(trained.network, pixels.flip(-1)),
    )


def test_prediction_is_the_mean_of_two_sigmoids(trained, samples):
    pixels = samples[1].pixels[:3]
    with torch.no_grad():
        views = [trained.network(as_input(view))[:, 0] for view in (pixels, pixels.flip(-1))]
    by_hand = sum(1 / (1 + np.exp(-view.double().numpy())) for view in views) / 2
    assert predict_probabilities(trained.network, pixels) == pytest.approx(by_hand, abs=1e-5)


def test_prediction_does_not_depend_on_the_batch(trained, samples):
    pixels = samples[0].pixels
    one, many = (predict_probabilities(trained.network, pixels, batch) for batch in (1, 16))
    assert one == pytest.approx(many, abs=1e-4) and one.shape == (16,)
    assert ((one >= 0) & (one <= 1)).all()


def test_loaded_network_predicts_the_same(trained, samples):
    network, history = load_network(NETWORK, trained.checkpoint)
    pixels = samples[1].pixels
    assert np.array_equal(
        predict_probabilities(network, pixels), predict_probabilities(trained.network, pixels)
    )
    assert len(history) == RECIPE.epochs
