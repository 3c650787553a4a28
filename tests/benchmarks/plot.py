"""How the cost of a step grows with the number of steps, drawn from the results of a run.

python -m tests.benchmarks.plot DIRECTORY
"""

import json
import re
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("Agg")

PANELS = {"fresh": "A process of its own for each step", "warm": "Warm workers"}
LINES = {
    "fan-out": ("one fan-out, then a join", "#0072B2", "o-"),
    "sequences": ("sequences of one step", "#D55E00", "s--"),
}


def draw(samples, directory):
    """Draw growth.png and growth.svg from the samples of a run that has measured growth."""
    found = (re.fullmatch(r"sequences (\d+) fresh: s", name) for name in samples)
    sizes = sorted(int(match[1]) for match in found if match)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    for axes, (how, title) in zip(panels, PANELS.items(), strict=True):
        for shape, (label, colour, style) in LINES.items():
            costs = [1e3 * samples[f"{shape} {size} {how}: s"][0] for size in sizes]
            axes.plot(sizes, costs, style, color=colour, label=label, linewidth=2)
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_title(title)
        axes.set_xlabel("number of steps, two at a time")
        axes.set_ylabel("milliseconds per step")
        axes.grid(axis="y", color="#DDDDDD")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("What a step costs, by the number of steps in the flow", fontsize="x-large")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(LINES), frameon=False)
    for kind in ("png", "svg"):
        figure.savefig(directory / f"growth.{kind}", dpi=150, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    draw(json.loads((place / "results.json").read_text())["samples"], place)
