"""Seven types of lesion, modelled in the donor's spine in three dimensions.

A lesion moves tissue (a narrowed disc, a collapsed or slipped vertebra), replaces it (a spur, a
screw, a sclerotic focus), or both: `Lesion.move` and `Lesion.region` are functions of position.
All positions are in the donor's millimetres, so a lesion follows its vertebra through every
deformation of the patient. All sizes grow from zero with severity: a lesion of severity 0 changes
no voxel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dernet_utils.virtual.spine import Disc, Vertebra

Points = tuple[Tensor, Tensor, Tensor]  # x, y, z in donor millimetres, all of one shape
Tubes = list[tuple[list[np.ndarray], list[float]]]  # of each tube its nodes and its radii, mm
SKIN_MM = 0.8  # depth over which occupancy rises from 0 at the surface to 1; avoids a staircase
BONE = 1850.0  # HU + 1000 of an osteophyte: half compact bone (1,500 HU), half cancellous (200 HU)
SHEAR_MM = 5.0  # distance beyond the disc's edges over which a slip's shear fades out
CEMENT = 2600.0  # HU + 1000 of bone cement with barium
TITANIUM = 4.5  # g/cm³


@dataclass(frozen=True, eq=False)
class Lesion:
    """A lesion in the donor's space.

    Attributes:
        lesion_type: One of `vocabulary.LESION_TYPES`.
        form: Its subtype, such as ``wedge``.
        level: Its vertebra or disc, such as ``L1`` or ``T12/L1``.
        severity: From 0 (absent) to 1.
        centre_mm: Centre of the sphere outside which the lesion changes nothing, (x, y, z).
        reach_mm: Radius of that sphere.
        size_mm: Radius of a sphere about the same centre that contains the region.
        region: Occupancy, 0 to 1, of the volume that a radiologist would call the lesion.
        move: Maps a position in the patient with the lesion to the donor position whose tissue
            lies there; None where nothing moves.
        fill: Density (HU + 1000) that bone formation or cement raises the region's tissue to;
            denser tissue keeps its own. None where all tissue does.
        lytic: Whether denser tissue is replaced too.
        metal: Density of titanium in g/cm³ inside the region; 0 for tissue.
    """

    lesion_type: str
    form: str
    level: str
    severity: float
    centre_mm: np.ndarray
    reach_mm: float
    size_mm: float
    region: Callable[[Points], Tensor]
    move: Callable[[Points], Points] | None = None
    fill: float | None = None
    lytic: bool = False
    metal: float = 0.0


# Shapes -----------------------------------------------------------------------------------------


def _frame(points: Points, part: Vertebra | Disc) -> Points:
    """Return positions in a part's frame: mm to the left, the front and upwards of its centre."""
    offset = [p - float(c) for p, c in zip(points, part.centre_mm, strict=True)]
    left = np.cross(part.front, part.up)
    axes = (left, part.front, part.up)
    return tuple(sum(o * float(a) for o, a in zip(offset, axis, strict=True)) for axis in axes)


def _inside(distance: Tensor) -> Tensor:
    """Turn a signed distance to a surface (mm, negative inside) into an occupancy."""
    return (-distance / SKIN_MM).clamp(0.0, 1.0)


def _fade(distance: Tensor, near: float, far: float) -> Tensor:
    """Return 1 up to `near`, 0 beyond `far`, and a smooth step between."""
    t = ((far - distance) / (far - near)).clamp(0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _tube(points: tuple[Tensor, ...], nodes: np.ndarray, radii: np.ndarray) -> Tensor:
    """Return the occupancy of a tapering tube through nodes, mm, shape (n, 2) or (n, 3)."""
    distance = torch.full(points[0].shape, torch.inf)
    for start, end, r0, r1 in zip(nodes, nodes[1:], radii, radii[1:], strict=False):
        along = end - start
        offset = [p - float(s) for p, s in zip(points, start, strict=True)]
        length = max(float(along @ along), 1e-9)  # nodes may coincide at severity 0
        t = sum(o * float(a) for o, a in zip(offset, along, strict=True)) / length
        t = t.clamp(0.0, 1.0)
        square = sum((o - t * float(a)) ** 2 for o, a in zip(offset, along, strict=True))
        distance = torch.minimum(distance, square.sqrt() - (float(r0) + t * float(r1 - r0)))
    return _inside(distance)


def _ellipsoid(points: Points, centre: tuple, radii: tuple) -> Tensor:
    """Return the occupancy of an ellipsoid; centre and radii in mm of the points' frame."""
    square = sum(((p - c) / r) ** 2 for p, c, r in zip(points, centre, radii, strict=True))
    return _inside((square.sqrt() - 1.0) * min(radii))


def _shift(points: Points, axis: np.ndarray, by: Tensor) -> Points:
    """Move each position along an axis by its own distance, mm."""
    return tuple(p + by * float(a) for p, a in zip(points, axis, strict=True))


# Lesions that move tissue -----------------------------------------------------------------------


def disc_space_narrowing(disc: Disc, severity: float) -> list[Lesion]:
    """Return the loss of up to 85 % of a disc's height, with sclerosis of both endplates."""
    lost = disc.height_mm * 0.85 * severity
    half, left_half = disc.height_mm / 2, (disc.height_mm - lost) / 2
    depth, width = disc.below.depth_mm / 2, disc.below.width_mm / 2
    size = max(depth, width) + 3.0

    def move(points: Points) -> Points:
        left, front, up = _frame(points, disc)
        away = up.abs()
        inner = away * (half / left_half - 1.0)
        outer = (half - left_half) * (1.0 - (away - left_half) / 18.0).clamp(min=0.0)
        window = _fade((left**2 + front**2).sqrt(), 26.0, 42.0)
        return _shift(points, disc.up, up.sign() * torch.minimum(inner, outer) * window)

    def region(points: Points) -> Tensor:
        left, front, up = _frame(points, disc)
        rim = ((left / width) ** 2 + (front / depth) ** 2).sqrt()
        return _inside((rim - 1.0) * depth) * _inside(up.abs() - half - 1.5)

    def endplates(points: Points) -> Tensor:
        left, front, up = _frame(points, disc)
        rim = ((left / width) ** 2 + (front / depth) ** 2).sqrt()
        return _inside((rim - 0.95) * depth) * _inside(
            (up.abs() - half - 1.2).abs() - 2.0 * severity
        )

    def make(form: str, **how) -> Lesion:
        name = "Disc space narrowing"
        return Lesion(name, form, disc.name, severity, disc.centre_mm, 50.0, size, **how)

    sclerosis = 1250.0 + 400.0 * severity
    return [
        make("narrowed", region=region, move=move),
        make("endplate sclerosis", region=endplates, fill=sclerosis),
    ]


def vertebral_collapse(body: Vertebra, severity: float, form: str) -> list[Lesion]:
    """Return a wedge, biconcave or crush fracture with up to 48 % of the body's height lost.

    Impacted bone under a broken endplate appears as a dense band. By Genant's grades (J Bone Miner
    Res 1993; 8: 1137) a loss of at least 20 % is mild, of 25 % moderate, and of 40 % severe.

    Args:
        body: The vertebral body.
        severity: Fraction of the largest loss, 0 to 1.
        form: ``wedge``, ``biconcave`` or ``crush``.
    """
    half, depth = body.height_mm / 2, body.depth_mm / 2
    most = 0.48 * severity * body.height_mm

    def lost(front: Tensor, above: Tensor) -> Tensor:
        """Return the height lost on one side of the middle, mm."""
        along = (front / depth).clamp(-1.2, 1.2)  # from the back to the front wall
        if form == "wedge":
            return most * above * ((along + 1.0) / 2).clamp(0.0, 1.0)
        if form == "biconcave":
            return most / 2 * (1.0 - along**2).clamp(min=0.0)
        return most / 2 * torch.ones_like(along)

    def move(points: Points) -> Points:
        left, front, up = _frame(points, body)
        away, loss = up.abs(), lost(front, (up > 0).float())
        inner = away * (loss / (half - loss))
        outer = loss * (1.0 - (away - (half - loss)) / 16.0).clamp(min=0.0)
        window = _fade((left**2 + front**2).sqrt(), 24.0, 38.0)
        return _shift(points, body.up, up.sign() * torch.minimum(inner, outer) * window)

    def impacted(points: Points) -> Tensor:
        """Return the occupancy of the impacted bone under each broken endplate."""
        left, front, up = _frame(points, body)
        rim = ((left / (body.width_mm / 2)) ** 2 + (front / depth) ** 2).sqrt()
        height = up if form == "wedge" else up.abs()
        return _inside((rim - 0.95) * depth) * _inside((height - half + 1.5).abs() - 3.0 * severity)

    def make(**how) -> Lesion:
        name, size = "Vertebral collapse", float(np.hypot(body.width_mm, body.height_mm)) / 2 + 2.0
        return Lesion(name, form, body.name, severity, body.centre_mm, 50.0, size, **how)

    density = 1250.0 + 400.0 * severity
    return [make(region=_body_region(body), move=move), make(region=impacted, fill=density)]


def spondylolisthesis(disc: Disc, severity: float) -> list[Lesion]:
    """Return a forward slip of the upper vertebra by up to half the depth of the lower one.

    This covers Meyerding's grades I and II.
    """
    slip = disc.below.depth_mm * 0.5 * severity
    height, tall = disc.height_mm, disc.above.height_mm

    def move(points: Points) -> Points:
        left, front, up = _frame(points, disc)
        below = 1.0 - _fade(up, -height / 2 - SHEAR_MM, height / 2 + SHEAR_MM)
        above = _fade(up, tall + height, tall + 40.0)
        window = _fade((left**2 + (front + 10.0) ** 2).sqrt(), 38.0, 62.0)
        return _shift(points, disc.front, -slip * below * above * window)

    def region(points: Points) -> Tensor:
        left, front, up = _frame(points, disc)
        depth, width = disc.below.depth_mm / 2, disc.below.width_mm / 2
        flat = _inside(torch.maximum(left.abs() - width, front.abs() - depth))
        return flat * _inside(up.abs() - height / 2 - 0.45 * tall)

    grade = "grade I" if slip < 0.25 * disc.below.depth_mm else "grade II"
    name = "Spondylolysthesis"
    half_sizes = (disc.below.width_mm / 2, disc.below.depth_mm / 2, height / 2 + 0.45 * tall)
    size = float(np.linalg.norm(half_sizes)) + SKIN_MM
    return [Lesion(name, grade, disc.name, severity, disc.centre_mm, 100.0, size, region, move)]


def _body_region(body: Vertebra) -> Callable[[Points], Tensor]:
    """Return the region of a vertebral body: an elliptic cylinder."""

    def region(points: Points) -> Tensor:
        left, front, up = _frame(points, body)
        rim = ((left / (body.width_mm / 2)) ** 2 + (front / (body.depth_mm / 2)) ** 2).sqrt()
        return _inside((rim - 1.0) * body.depth_mm / 2) * _inside(up.abs() - body.height_mm / 2)

    return region


# Lesions that change tissue ---------------------------------------------------------------------


def osteophyte(disc: Disc, severity: float, form: str, upper: bool, angle: float) -> list[Lesion]:
    """Return a spur on a body's rim, next to a disc: a ridge along up to 55 degrees of the rim.

    Args:
        disc: The disc beside the spur.
        severity: Fraction of the largest length, 11 mm; 0 to 1.
        form: ``claw`` bends over the disc, ``traction`` points outward, ``bridging`` joins
            the two bodies.
        upper: Whether it grows on the vertebra above the disc.
        angle: Position on the rim in radians: 0 in front, positive to the patient's left.
    """
    body = disc.above if upper else disc.below
    toward = -1.0 if upper else 1.0  # direction along `up` to the disc
    length, thick = 11.0 * severity, 3.4 * severity**0.5
    arc = 0.48 * severity**0.5 + 1e-3  # half of its extent along the rim, radians
    reach = {"claw": 0.75, "traction": 0.9, "bridging": 0.8}[form] * length
    rise = {"claw": 0.65, "traction": 0.05, "bridging": 0.4}[form] * length
    # Its cross-section: (outward, towards the disc) in mm from the rim's edge.
    section = np.array([[-1.5, -1.5], [0.7 * reach, 0.2 * rise], [reach, rise]])
    radii = np.array([thick, 0.8 * thick, 0.35 * thick])
    if form == "bridging":
        section = np.vstack([section, [-1.0, disc.height_mm + 3.0]])
        radii = np.array([thick, 0.8 * thick, 0.8 * thick, 0.7 * thick])

    def region(points: Points) -> Tensor:
        left, front, up = _frame(points, body)
        turned = torch.atan2(left, front) - angle
        turned = torch.atan2(turned.sin(), turned.cos())
        out = (left**2 + front**2).sqrt() - _rim(body, torch.atan2(left, front))
        # A ridge: highest in its middle, level with the rim at its ends.
        taper = (1.0 - (turned / arc) ** 2).clamp(min=0.0).sqrt()
        across = (out + (1.0 - taper) * (reach + thick), toward * up - body.height_mm / 2)
        return _tube(across, section, radii) * (turned.abs() < arc)

    rim = float(_rim(body, torch.tensor(angle)))
    out = np.cos(angle) * body.front + np.sin(angle) * body.left
    middle = section.mean(axis=0)
    centre = (
        body.centre_mm
        + out * (rim + middle[0])
        + body.up * toward * (body.height_mm / 2 + middle[1])
    )
    size = 0.0
    for turned in np.linspace(-arc, arc, 21):  # the ridge sinks into the body towards its ends
        sunk = (1.0 - max(0.0, 1.0 - (turned / arc) ** 2) ** 0.5) * (reach + thick)
        radius = float(_rim(body, torch.tensor(angle + turned))) + section[:, 0] - sunk
        aside = np.cos(angle + turned) * body.front + np.sin(angle + turned) * body.left
        up = toward * (body.height_mm / 2 + section[:, 1])
        nodes = body.centre_mm + radius[:, None] * aside + up[:, None] * body.up
        size = max(size, float((np.linalg.norm(nodes - centre, axis=1) + radii).max()) + SKIN_MM)
    name = "Osteophytes"
    return [Lesion(name, form, body.name, severity, centre, size, size, region, fill=BONE)]


def _rim(body: Vertebra, angle: Tensor) -> Tensor:
    """Return the distance of a body's wall from its axis at an angle from the front, mm."""
    front, left = angle.cos() / (body.depth_mm / 2), angle.sin() / (body.width_mm / 2)
    return (front**2 + left**2) ** -0.5


def foraminal_stenosis(disc: Disc, severity: float) -> list[Lesion]:
    """Return facet bone that has grown into both foramina behind a disc."""
    radius = 7.5 * severity
    back = -(disc.below.depth_mm / 2 + 5.0)
    side = disc.below.width_mm * 0.36

    def region(points: Points) -> Tensor:
        local = _frame(points, disc)
        radii = (4.0 * severity + 1e-3, radius * 0.8 + 1e-3, radius + 1e-3)
        return torch.maximum(
            _ellipsoid(local, (side, back, 2.0), radii),
            _ellipsoid(local, (-side, back, 2.0), radii),
        )

    name, centre = "Foraminal stenosis", disc.centre_mm + disc.front * back
    fill = 1700.0 + 400.0 * severity  # sclerotic bone, 700 to 1,100 HU
    size = side + 9.0
    return [Lesion(name, "bony", disc.name, severity, centre, size, size, region, fill=fill)]


def other_lesion(body: Vertebra, severity: float, form: str, place: np.ndarray) -> list[Lesion]:
    """Return a sclerotic, lytic or mixed focus in a vertebral body.

    Args:
        body: The vertebral body.
        severity: Fraction of the largest radius, 10.5 mm; 0 to 1.
        form: ``sclerotic``, ``lytic`` or ``mixed``.
        place: Its centre (left, front, up) in half sizes of the body, shape (3,).
    """
    radius = 10.5 * severity
    size = radius + 1.0
    centre = body.point(*place)

    def ball(points: Points, r: float) -> Tensor:
        square = sum((p - float(c)) ** 2 for p, c in zip(points, centre, strict=True))
        return _inside(square.sqrt() - r)

    def make(region: Callable[[Points], Tensor], fill: float, lytic: bool = False) -> Lesion:
        return Lesion(
            "Other lesions", form, body.name, severity, centre, size, size, region,
            fill=fill, lytic=lytic,
        )  # fmt: skip

    if form == "sclerotic":
        return [make(lambda points: ball(points, radius), 2000.0)]
    lytic = make(lambda points: ball(points, radius), 1000.0, lytic=True)
    if form == "lytic":
        return [lytic]
    return [lytic, make(lambda points: ball(points, 0.6 * radius), 2100.0)]


def implant(bodies: list[Vertebra], discs: list[Disc], form: str) -> list[Lesion]:
    """Return hardware in neighbouring vertebrae; each screw, rod or cage is one `Lesion`.

    Args:
        bodies: The vertebrae that it spans, from the lowest up.
        discs: The discs between them.
        form: ``screws`` (pedicle screws and rods), ``cages`` (the same, with cages in the discs),
            ``plate`` (anterior) or ``cement`` (in the bodies).
    """
    level = bodies[0].name if len(bodies) == 1 else f"{bodies[-1].name}-{bodies[0].name}"
    what = {"fill": CEMENT} if form == "cement" else {"metal": TITANIUM}
    tubes = {"screws": _screws, "cages": _screws, "plate": _plate, "cement": _cement}[form](bodies)

    def make(centre: np.ndarray, size: float, region: Callable[[Points], Tensor]) -> Lesion:
        return Lesion("Surgical implant", form, level, 1.0, centre, size, size, region, **what)

    parts = []
    for nodes, radii in tubes:
        nodes, radii = np.array(nodes), np.array(radii)
        centre = (nodes.min(axis=0) + nodes.max(axis=0)) / 2
        size = float(np.linalg.norm(nodes - centre, axis=1).max() + radii.max() + 1.0)
        parts.append(make(centre, size, partial(_tube, nodes=nodes, radii=radii)))
    for disc in discs if form == "cages" else []:
        size = float(np.linalg.norm(_cage_size(disc)) + 1.0)
        parts.append(make(disc.centre_mm, size, partial(_cage, disc=disc)))
    return parts


def _cage_size(disc: Disc) -> tuple[float, float, float]:
    """Return a cage's half sizes to the left, to the front and up, mm."""
    return 0.36 * disc.below.width_mm, 0.34 * disc.below.depth_mm, disc.height_mm / 2 + 1.0


def _cage(points: Points, disc: Disc) -> Tensor:
    """Return the occupancy of a cage: a frame with walls of 2 mm, open up and down."""
    left, front, up = _frame(points, disc)
    wide, deep, high = _cage_size(disc)
    outer = torch.maximum(torch.maximum(left.abs() - wide, front.abs() - deep), up.abs() - high)
    hollow = torch.maximum(left.abs() - wide, front.abs() - deep) + 2.0
    return _inside(torch.maximum(outer, -hollow))


def _screws(bodies: list[Vertebra]) -> Tubes:
    """Return two pedicle screws per vertebra and a rod on each side; nodes and radii in mm."""
    parts = []
    for side in (-1.0, 1.0):
        heads = []
        for body in bodies:
            head = body.point(left=side * 0.85, up=0.2) - body.front * (body.depth_mm / 2 + 24)
            tip = body.point(left=side * 0.3, front=0.45, up=0.1)
            along = (tip - head) / np.linalg.norm(tip - head)
            parts.append(([head, head + 8 * along, head + 9 * along, tip], [4.5, 4.5, 2.8, 2.2]))
            heads.append(head)
        if len(heads) > 1:
            heads[0] = heads[0] - bodies[0].up * 9
            heads[-1] = heads[-1] + bodies[-1].up * 9
            parts.append((heads, [2.75] * len(heads)))
    return parts


def _plate(bodies: list[Vertebra]) -> Tubes:
    """Return a plate in front of the bodies with two screws in each; nodes and radii in mm."""
    parts = []
    for side in (-0.25, 0.25):
        rail = [body.point(left=side, front=1.12) for body in bodies]
        rail = [rail[0] - bodies[0].up * 5, *rail, rail[-1] + bodies[-1].up * 5]
        parts.append((rail, [1.8] * len(rail)))
        for body in bodies:
            ends = [body.point(left=side, front=1.15), body.point(left=1.2 * side, front=-0.3)]
            parts.append((ends, [2.0, 1.4]))
    return parts


def _cement(bodies: list[Vertebra]) -> Tubes:
    """Return cement in each body along the directions of both pedicles; nodes and radii in mm."""
    parts = []
    for body in bodies:
        for side in (-1.0, 1.0):
            start = body.point(left=0.55 * side, front=-0.2, up=0.15)
            end = body.point(left=0.1 * side, front=0.45, up=-0.25)
            parts.append(([start, (start + end) / 2, end], [4.0, 6.0, 3.5]))
    return parts
