"""Figures of the chapters on practice."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure


def draw_latency(medians: pd.DataFrame, stages: Sequence[str]) -> Figure:
    """Draw the time per image of several engines as bars divided into stages.

    Args:
        medians: One row per engine, the first at the top: milliseconds of each stage, and in
            ``limit`` those of the arithmetic alone, drawn as a mark.
        stages: The stages' columns, in the order in which they run.
    """
    fig, ax = plt.subplots(figsize=(8, 3.4))
    start = np.zeros(len(medians))
    colours = plt.get_cmap("cividis")(np.linspace(0, 1, len(stages)))
    for stage, colour in zip(stages, colours, strict=True):
        ax.barh(medians.index, medians[stage], left=start, label=stage, color=colour)
        start += medians[stage].to_numpy()
    ax.plot(medians["limit"], np.arange(len(medians)), "D", color="#D55E00", ms=6, label="limit")
    ax.invert_yaxis()
    ax.set(xlabel="milliseconds per image")
    ax.legend(fontsize=8, loc="lower right")
    return fig
