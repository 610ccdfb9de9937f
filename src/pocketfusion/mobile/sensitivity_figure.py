"""The picture of a sensitivity analysis: how much quality each layer's rounding costs alone."""

from __future__ import annotations

from pathlib import Path

from pocketfusion.artefact import atomic_file
from pocketfusion.mobile.budget import decibels
from pocketfusion.mobile.pack import Form
from pocketfusion.mobile.sensitivity import Sensitivity

#: Above this many dB a layer is unchanged (its weights were stored in float16 already) and is not drawn.
_UNCHANGED = 150.0
_COLOURS: dict[Form, str] = {
    "float16": "#4c9f70",
    "int8": "#3b6fb6",
    "int8-dynamic": "#e08e2b",
    "int4-dynamic": "#b8434e",
}


def draw(sensitivity: Sensitivity, path: Path) -> None:
    """Writes a PNG: for each network its layers in order, and the dB that are left when one is rounded alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks = {name: layers for name, layers in sensitivity.networks.items() if layers}
    figure, rows = plt.subplots(len(networks), 1, figsize=(11, 3.2 * len(networks)), layout="constrained")
    for axes, (name, layers) in zip([rows] if len(networks) == 1 else rows, networks.items(), strict=True):
        forms = [form for form in _COLOURS if any(form in layer.effects for layer in layers)]
        for form in forms:
            found = [
                (i, decibels(layer.effects[form].worst)) for i, layer in enumerate(layers) if form in layer.effects
            ]
            points = [(i, value) for i, value in found if value < _UNCHANGED]
            if points:
                axes.scatter(*zip(*points, strict=True), s=9, color=_COLOURS[form], label=form)
        axes.set_title(
            f"{name.replace('_', ' ')}: quality left when one layer alone is rounded", loc="left", fontsize=10
        )
        axes.set_ylabel("dB (output or guidance\ndirection, the worse)", fontsize=8)
        axes.set_xlabel("layers, in the order of the network", fontsize=8)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.tick_params(labelsize=8)
        worst = min(range(len(layers)), key=lambda i: min(decibels(e.worst) for e in layers[i].effects.values()))
        lowest = min(decibels(effect.worst) for effect in layers[worst].effects.values())
        side = "right" if worst > len(layers) / 2 else "left"
        axes.annotate(f"{layers[worst].name}  ", (worst, lowest), fontsize=7, ha=side, va="center")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)
