"""Pictures of runs: learning curves, reliability, memory slots, attention.

Each function takes plain arrays and returns a matplotlib `Figure`; nothing
touches pyplot's global state, so they can be drawn in any process. Colours
are Okabe and Ito's, which stay apart for colour-blind readers; beyond eight
models the line style changes too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from matplotlib import figure, ticker

COLORS = (
  "#0072B2",
  "#D55E00",
  "#009E73",
  "#CC79A7",
  "#E69F00",
  "#56B4E9",
  "#000000",
  "#999933",
)
LINE_STYLES = ("-", "--", ":", "-.")

# Units by the last part of a printed name; the rest has none.
UNITS = {
  "logloss": "nats",
  "loss": "nats",
  "examples_per_sec": "examples/s",
  "secs": "s",
}
_MAX_POINTS = 2000


class Line(NamedTuple):
  """One line of a picture."""

  model: str
  x: Shaped[np.ndarray, " points"]
  y: Shaped[np.ndarray, " points"]


def learning_curves(
  panels: Mapping[str, Sequence[Line]], models: Sequence[str]
) -> figure.Figure:
  """Metrics over training steps, one panel a metric.

  Args:
    panels: Printed name of a metric to its lines, one a run: thin lines are
      single seeds, the thick one of a model is their mean at the steps that
      all of its seeds report.
    models: All models of the report, so that each keeps its colour.

  Returns:
    The figure.
  """
  fig, axes = _grid(len(panels))
  styles = _styles(models)
  for ax, (name, lines) in zip(axes, panels.items(), strict=True):
    for model in dict.fromkeys(line.model for line in lines):
      seeds = [line for line in lines if line.model == model]
      for line in seeds if len(seeds) > 1 else ():
        ax.plot(line.x, line.y, alpha=0.45, linewidth=0.7, **styles[model])
      x, y = _mean_line(seeds)
      marker = "o" if x.size == 1 else None
      ax.plot(x, y, label=model, linewidth=2, marker=marker, **styles[model])
    ax.set_xlabel("training step")
    unit = UNITS.get(name.split("/")[-1])
    ax.set_ylabel(f"{name} [{unit}]" if unit else name)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  _legend(fig, axes, styles)
  return fig


def reliability_diagram(
  panels: Mapping[str, Sequence[Line]], models: Sequence[str]
) -> figure.Figure:
  """Observed rate over predicted probability, one panel a task.

  Args:
    panels: Task to its lines, one a model: mean predicted probability of each
      bin over the observed rate of the same bin.
    models: All models of the report, so that each keeps its colour.

  Returns:
    The figure; points on the diagonal are calibrated.
  """
  fig, axes = _grid(len(panels))
  styles = _styles(models)
  for ax, (task, lines) in zip(axes, panels.items(), strict=True):
    # Rates of rare events would otherwise sit in one corner.
    highest = max(
      (max(line.x.max(), line.y.max()) for line in lines if line.x.size),
      default=1.0,
    )
    limit = min(1.0, 1.05 * highest) or 1.0
    ax.plot([0, limit], [0, limit], color="0.6", linewidth=1, zorder=1)
    for line in lines:
      ax.plot(
        line.x,
        line.y,
        label=line.model,
        linewidth=1.5,
        marker="o",
        markersize=4,
        **styles[line.model],
      )
    ax.set_xlim(0, limit)
    ax.set_ylim(0, limit)
    ax.set_aspect("equal")
    ax.set_xlabel(f"mean predicted probability of {task}")
    ax.set_ylabel(f"observed rate of {task}")
  _legend(fig, axes, styles)
  return fig


def slot_usage(
  panels: Mapping[str, Sequence[Line]], models: Sequence[str]
) -> figure.Figure:
  """Reads of each memory slot, most read first, one panel a memory layer.

  Args:
    panels: Layer to its lines, one a run: `x` is ignored, `y` holds the reads
      of each slot in any order.
    models: All models of the report, so that each keeps its colour.

  Returns:
    The figure, both axes logarithmic; slots that were never read cannot stand
    on it, their share does in the legend.
  """
  fig, axes = _grid(len(panels))
  styles = _styles(models)
  for ax, (layer, lines) in zip(axes, panels.items(), strict=True):
    for model in dict.fromkeys(line.model for line in lines):
      hits = [np.sort(v.y)[::-1] for v in lines if v.model == model]
      unread = np.mean([np.mean(v == 0) for v in hits])
      label = f"{model}: {unread:.1%} of {hits[0].size:,} slots never read"
      for y in hits:
        y = y[y > 0]
        shown = np.unique(
          np.geomspace(1, max(1, y.size), _MAX_POINTS).astype(int)
        )[: y.size]
        ax.plot(
          shown, y[shown - 1], linewidth=1.2, label=label, **styles[model]
        )
        label = None
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_title(layer)
    ax.set_xlabel("slot, by number of reads")
    ax.set_ylabel("reads of the slot")
    ax.legend(frameon=False, fontsize=8, loc="lower left")
  return fig


def value_curve(
  curve: Mapping[str, Shaped[np.ndarray, " budgets"]],
  summary: Mapping[str, float],
) -> figure.Figure:
  """Value against budget: by the model, and by the held-out trial.

  Args:
    curve: `budget`, `value`, `held_out` and its interval `low` and `high`.
    summary: `budget` and `expected_value` of the plan that was chosen.

  Returns:
    The figure.
  """
  fig, (ax,) = _grid(1)
  budget = curve["budget"]
  ax.fill_between(
    budget, curve["low"], curve["high"], color=COLORS[1], alpha=0.2, lw=0
  )
  ax.plot(
    budget, curve["held_out"], color=COLORS[1], label="held-out trial, 95 %"
  )
  ax.plot(budget, curve["value"], color=COLORS[0], label="model")
  ax.plot(
    [summary["budget"]],
    [summary["expected_value"]],
    "o",
    color=COLORS[6],
    label="plan",
  )
  ax.set_xlabel("budget")
  ax.set_ylabel("response of all")
  ax.legend(frameon=False, fontsize=8, loc="lower right")
  return fig


def _grid(num_panels: int):
  """Panels in rows of three, spare axes hidden."""
  columns = min(3, num_panels)
  rows = math.ceil(num_panels / columns)
  fig = figure.Figure(
    figsize=(max(5.5, 4.4 * columns), 3.6 * rows + 0.5),
    dpi=150,
    layout="constrained",
  )
  axes = fig.subplots(rows, columns, squeeze=False).ravel()
  for ax in axes[num_panels:]:
    ax.set_visible(False)
  for ax in axes:
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
  return fig, axes[:num_panels]


def _styles(models) -> dict[str, dict[str, str]]:
  """Colour and line style of each model, the same in every picture."""
  return {
    model: {
      "color": COLORS[i % len(COLORS)],
      "linestyle": LINE_STYLES[i // len(COLORS) % len(LINE_STYLES)],
    }
    for i, model in enumerate(models)
  }


def _legend(fig, axes, styles) -> None:
  """One legend for all panels, below them."""
  handles = {}
  for ax in axes:
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  names = [name for name in styles if name in handles]
  fig.legend(
    [handles[name] for name in names],
    names,
    loc="outside lower center",
    ncols=min(4, max(1, len(names))),
    frameon=False,
  )


def _mean_line(lines: Sequence[Line]):
  steps = lines[0].x
  for line in lines[1:]:
    steps = np.intersect1d(steps, line.x)
  values = [line.y[np.isin(line.x, steps)] for line in lines]
  return steps, np.mean(values, axis=0)


def attention_maps(
  panels: Mapping[str, Float[np.ndarray, "tokens features"]],
  tokens: Mapping[str, Sequence[str]],
) -> figure.Figure:
  """Mean attention of scenario and task tokens to feature tokens.

  Args:
    panels: Name of a layer and family of tokens to its weights; each row sums
      to 1.
    tokens: The same name to the names of its tokens.

  Returns:
    The figure, one panel a layer and family; all panels share one scale.
  """
  fig, axes = _grid(len(panels))
  highest = max(float(weights.max()) for weights in panels.values())
  for ax, (name, weights) in zip(axes, panels.items(), strict=True):
    image = ax.imshow(
      weights, cmap="viridis", vmin=0.0, vmax=highest, aspect="auto"
    )
    ax.grid(False)
    ax.set_title(name, fontsize=9)
    ax.set_xlabel("feature token")
    ax.set_xticks(range(weights.shape[1]))
    ax.set_yticks(range(len(weights)), tokens[name], fontsize=8)
  fig.colorbar(image, ax=list(axes), label="mean attention weight")
  return fig
