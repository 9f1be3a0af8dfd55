"""Each lesion moves or fills what it should, and nothing beyond its reach."""

import numpy as np
import pytest
import torch

from dernet_utils.virtual import lesions
from dernet_utils.virtual.anatomy import find_discs
from dernet_utils.virtual.spine import Vertebra

UP, FRONT = np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.0])
BODIES = [
    Vertebra(f"L{3 - i}", np.array([100.0, 100.0, 100.0 + 32.0 * i]), UP, FRONT, 26.0, 30.0, 40.0)
    for i in range(3)
]
DISC = find_discs(BODIES)[0]  # 6 mm high, its centre at z = 116 mm
ALL = {
    "narrowing": lesions.disc_space_narrowing(DISC, 0.8),
    "wedge": lesions.vertebral_collapse(BODIES[1], 0.8, "wedge"),
    "biconcave": lesions.vertebral_collapse(BODIES[1], 0.8, "biconcave"),
    "crush": lesions.vertebral_collapse(BODIES[1], 0.8, "crush"),
    "slip": lesions.spondylolisthesis(DISC, 0.8),
    "claw": lesions.osteophyte(DISC, 0.8, "claw", False, 0.0),
    "traction": lesions.osteophyte(DISC, 0.8, "traction", True, 1.4),
    "bridging": lesions.osteophyte(DISC, 0.8, "bridging", True, -0.4),
    "stenosis": lesions.foraminal_stenosis(DISC, 0.8),
    "sclerotic": lesions.other_lesion(BODIES[1], 0.8, "sclerotic", np.zeros(3)),
    "lytic": lesions.other_lesion(BODIES[1], 0.8, "lytic", np.zeros(3)),
    "mixed": lesions.other_lesion(BODIES[1], 0.8, "mixed", np.zeros(3)),
    "screws": lesions.implant(BODIES, [], "screws"),
    "cages": lesions.implant(BODIES[:2], [DISC], "cages"),
    "plate": lesions.implant(BODIES, [], "plate"),
    "cement": lesions.implant(BODIES[:1], [], "cement"),
}
PARTS = [(name, i) for name, parts in ALL.items() for i in range(len(parts))]


def cloud(seed: int = 0, low: float = 70.0, high: float = 170.0) -> tuple:
    rng = np.random.default_rng(seed)
    places = rng.uniform(low, high, (3, 400_000)).astype(np.float32)
    return tuple(torch.from_numpy(axis) for axis in places)


def line(left: float = 0.0, front: float = 0.0, z=()) -> tuple:
    z = torch.tensor(z, dtype=torch.float32)
    return torch.full_like(z, 100.0 + left), torch.full_like(z, 100.0 + front), z


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_nothing_happens_beyond_its_reach(name, part):
    lesion, points = ALL[name][part], cloud(0, 20.0, 230.0)
    offset = zip(points, lesion.centre_mm, strict=True)
    away = sum((p - float(c)) ** 2 for p, c in offset).sqrt()
    occupancy = lesion.region(points)
    assert ((occupancy >= 0) & (occupancy <= 1)).all()
    assert occupancy.max() > 0, "the region is empty"
    assert not occupancy[away > lesion.size_mm].any()
    if lesion.move:
        moved = lesion.move(points)
        shift = sum((m - p) ** 2 for m, p in zip(moved, points, strict=True)).sqrt()
        assert shift.max() > 0.3, "nothing moves"
        assert shift[away > lesion.reach_mm].max() < 1e-3


def test_a_narrowed_disc_holds_the_whole_disc_in_less_height():
    move = ALL["narrowing"][0].move
    lost = 6.0 * 0.85 * 0.8
    edge = (6.0 - lost) / 2  # of what is left
    _, _, z = move(line(z=[116.0 - edge, 116.0, 116.0 + edge]))
    assert z.tolist() == pytest.approx([113.0, 116.0, 119.0], abs=1e-3)


def test_a_wedge_loses_its_front_and_keeps_its_back():
    lesion = ALL["wedge"][0]
    lost = 0.48 * 0.8 * 26.0
    top = 132.0 + 13.0
    _, _, front = lesion.move(line(front=15.0, z=[top - lost]))
    _, _, back = lesion.move(line(front=-15.0, z=[top]))
    assert front.item() == pytest.approx(top, abs=1e-3)
    assert back.item() == pytest.approx(top, abs=1e-3)


def test_a_biconcave_body_keeps_its_rim():
    lesion = ALL["biconcave"][0]
    _, _, rim = lesion.move(line(front=15.0, z=[144.0]))
    _, _, middle = lesion.move(line(front=0.0, z=[138.0]))
    assert rim.item() == pytest.approx(144.0, abs=1e-3)
    assert middle.item() > 140.0


def test_a_slip_carries_the_upper_body_forward_and_leaves_the_lower():
    lesion = ALL["slip"][0]
    slip = 30.0 * 0.5 * 0.8
    _, y, _ = lesion.move(line(z=[100.0, 132.0]))
    assert y.tolist() == pytest.approx([100.0, 100.0 - slip], abs=0.1)
    assert lesion.form == "grade II"
    assert lesions.spondylolisthesis(DISC, 0.1)[0].form == "grade I"


@pytest.mark.parametrize(("upper", "side"), [(False, 1.0), (True, -1.0)])
def test_a_claw_reaches_out_of_the_body_and_toward_the_disc(upper, side):
    lesion = lesions.osteophyte(DISC, 1.0, "claw", upper, 0.0)[0]
    body = DISC.above if upper else DISC.below
    x, y, z = cloud(1)
    inside = lesion.region((x, y, z)) > 0.5
    assert y[inside].max() > body.point(front=1.0)[1] + 4.0
    edge = body.point(up=side)[2]
    assert (side * (z[inside] - edge)).max() > 1.0


def test_a_bridge_spans_the_disc():
    lesion = ALL["bridging"][0]
    z = cloud(2)
    heights = z[2][lesion.region(z) > 0.5]
    assert heights.min() < 113.0 and heights.max() > 119.0


GROWING = {
    "narrowing": lambda s: lesions.disc_space_narrowing(DISC, s),
    "wedge": lambda s: lesions.vertebral_collapse(BODIES[1], s, "wedge"),
    "biconcave": lambda s: lesions.vertebral_collapse(BODIES[1], s, "biconcave"),
    "crush": lambda s: lesions.vertebral_collapse(BODIES[1], s, "crush"),
    "slip": lambda s: lesions.spondylolisthesis(DISC, s),
    "claw": lambda s: lesions.osteophyte(DISC, s, "claw", False, 0.0),
    "traction": lambda s: lesions.osteophyte(DISC, s, "traction", True, 1.4),
    "bridging": lambda s: lesions.osteophyte(DISC, s, "bridging", True, 0.0),
    "stenosis": lambda s: lesions.foraminal_stenosis(DISC, s),
    "sclerotic": lambda s: lesions.other_lesion(BODIES[1], s, "sclerotic", np.zeros(3)),
    "mixed": lambda s: lesions.other_lesion(BODIES[1], s, "mixed", np.zeros(3)),
}


def effect(lesion: lesions.Lesion, points: tuple) -> torch.Tensor:
    """Return how much a lesion changes at each position: millimetres moved, or fraction filled."""
    if lesion.move:
        moved = lesion.move(points)
        return sum((m - p) ** 2 for m, p in zip(moved, points, strict=True)).sqrt()
    return lesion.region(points)


@pytest.mark.parametrize("name", GROWING)
def test_severity_zero_changes_nothing_at_all(name):
    for lesion in GROWING[name](0.0):
        assert torch.equal(effect(lesion, cloud(3)), torch.zeros(400_000))


@pytest.mark.parametrize("name", GROWING)
def test_more_severe_is_larger(name):
    small, middle, large = (
        sum(float(effect(lesion, cloud(3)).sum()) for lesion in GROWING[name](severity))
        for severity in (0.15, 0.5, 1.0)
    )
    assert 0.0 < small < middle < large


def test_two_screws_per_vertebra_and_a_rod_per_side():
    assert len(lesions.implant(BODIES, [], "screws")) == 2 * 3 + 2
    assert len(lesions.implant(BODIES[:1], [], "screws")) == 2


def test_a_cage_is_hollow_and_touches_both_endplates():
    cage = lesions.implant(BODIES[:2], [DISC], "cages")[-1]
    walls = 100.0 + 0.36 * 40.0 - 1.0
    inside = cage.region((torch.tensor([100.0, walls]), torch.full((2,), 100.0),
                          torch.full((2,), 116.0)))  # fmt: skip
    assert inside.tolist() == [0.0, 1.0]
    z = cloud(4)
    heights = z[2][cage.region(z) > 0.5]
    assert heights.min() < 113.0 and heights.max() > 119.0
