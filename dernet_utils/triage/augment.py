"""Training input of a triage network: augmented images, and crops with and without lesions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dernet_utils.triage.images import Sample

ROTATION_DEG = 15.0  # companion code: up to 10-15 degrees
BRIGHTNESS = CONTRAST = 0.2  # companion code: up to 20 %


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, rotate and change contrast and brightness at random, independently for each image.

    Horizontal flip with probability 0.5, rotation within +-15 degrees, contrast about the
    image's mean and brightness within +-20 % (companion code of the paper).

    Args:
        pixels: uint8, shape (b, 1, px, px).
        generator: Seeded; on the CPU.

    Returns:
        float32 in [0, 1], the same shape; corners that rotation uncovers are black.
    """
    grey = pixels.float() / 255
    n = len(grey)

    def between(low: float, high: float) -> Tensor:
        draw = torch.rand(n, generator=generator) * (high - low) + low
        return draw.to(grey.device)

    flip = torch.where(between(0, 1) < 0.5, -1.0, 1.0)
    angle = torch.deg2rad(between(-ROTATION_DEG, ROTATION_DEG))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    affine = torch.stack([flip * cos, -sin, zero, flip * sin, cos, zero], dim=1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(grey.shape), align_corners=False)
    grey = F.grid_sample(grey, grid, mode="bilinear", align_corners=False)

    contrast = between(1 - CONTRAST, 1 + CONTRAST).view(n, 1, 1, 1)
    brightness = between(1 - BRIGHTNESS, 1 + BRIGHTNESS).view(n, 1, 1, 1)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    return (((grey - mean) * contrast + mean) * brightness).clamp(0, 1)


def draw_crops(
    sample: Sample, n: int, side: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw square crops, half of them with a lesion and half from normal images.

    A lesion is drawn with a probability inversely proportional to the square root of its type's
    count, so that rare types are seen more often than they occur. A crop from a normal image lies
    where a lesion lies in another image, so that position alone carries no information.

    Args:
        sample: Images with lesions, and normal images.
        n: Number of crops.
        side: Side of a crop, px; at most that of the images.
        generator: Seeded; on the CPU.

    Returns:
        Crops, uint8, shape (n, 1, side, side), and their labels, float32, shape (n,): n // 2 ones,
        then zeros. A lesion's centre lies within a quarter of the side of the crop's centre,
        except near the edge of the image.
    """
    kind = sample.lesions[:, 3].long()
    chance = torch.bincount(kind)[kind].float().rsqrt()
    drawn = torch.multinomial(chance, n, replacement=True, generator=generator)
    normal = torch.nonzero(sample.y == 0)[:, 0]
    rows = sample.lesions[drawn, 0].long()
    others = torch.randint(len(normal), (n - n // 2,), generator=generator)
    rows[n // 2 :] = normal[others]
    shift = (torch.rand(n, 2, generator=generator) - 0.5) * side / 2
    corner = (sample.lesions[drawn, 1:3] + shift - side / 2).round().long()
    corner = corner.clamp(0, sample.pixels.shape[-1] - side).tolist()
    crops = [
        sample.pixels[row, :, y : y + side, x : x + side]
        for row, (x, y) in zip(rows.tolist(), corner, strict=True)
    ]
    return torch.stack(crops), (torch.arange(n) < n // 2).float()
