"""The tree of a search as a picture: steps from left to right, colour is value, size is visits.

A search has hundreds of nodes, most of them tried once and left, so the layout is that of a version
graph: the winner's path is the straight line on top, every other line of descent takes a lane below
it, and a lane is used again where it is free. What the picture is to show at a glance: where the
search branched, which branches looked good, and where the winner came from.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve
from PIL import Image

from mctd_diffusers.search.tree import FUSE, ROOT, Tree, makers, path_to_root

PALETTE = "viridis"
"""Colours of the values: even in lightness, so they read the same to colour-blind readers."""
WINNER = "#d1495b"
FUSED = "#7b3fa0"
INK = "#3a3a3a"
FAINT = "#b8b8b8"
_MOST_THUMBNAILS = 9


def node_scores(
    value: npt.NDArray[np.float64], reward: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Gives the number that colours each node: reward where finished, else value, else NaN."""
    return np.where(np.isfinite(reward), reward, value)


def assign_lanes(
    parent: npt.NDArray[np.int64],
    column: npt.NDArray[np.int64],
    score: npt.NDArray[np.float64],
    trunk: Sequence[int] = (),
) -> npt.NDArray[np.int64]:
    """Gives every node a lane such that no two nodes fall on one place.

    Args:
        parent: row of each node's parent; row 0 is the root, and parents come before children.
        column: place from left to right (a step index); smaller than the parent's where a move
            went back up the schedule.
        score: of each node, NaN where unknown; a line of descent goes on with the child whose
            subtree holds the best one.
        trunk: nodes from the root to the winner, drawn in lane 0.

    Returns:
        The lane of each node; 0 for the trunk, larger further below.
    """
    num_nodes = len(parent)
    best = np.where(np.isfinite(score), score, -np.inf)
    size = np.ones(num_nodes, dtype=np.int64)
    children: list[list[int]] = [[] for _ in range(num_nodes)]
    for node in range(num_nodes - 1, 0, -1):
        above = int(parent[node])
        best[above] = max(best[above], best[node])
        size[above] += size[node]
        children[above].append(node)
    on_trunk = set(trunk)

    def chain_from(node: int) -> list[int]:
        chain = [node]
        while children[chain[-1]]:
            chain.append(
                max(children[chain[-1]], key=lambda c: (c in on_trunk, best[c], size[c], -c))
            )
        return chain

    lanes = np.zeros(num_nodes, dtype=np.int64)
    taken: list[list[tuple[int, int]]] = []  # intervals of columns, by lane
    waiting = [(ROOT, 0)]  # the head of a chain, and the first lane it may take
    while waiting:
        head, lowest = waiting.pop()
        chain = chain_from(head)
        columns = column[chain]
        span = (int(columns.min()), int(columns.max()))
        lane = lowest
        while lane < len(taken) and any(
            span[0] <= other[1] and other[0] <= span[1] for other in taken[lane]
        ):
            lane += 1
        while len(taken) <= lane:
            taken.append([])
        taken[lane].append(span)
        lanes[chain] = lane
        members = set(chain)
        branches = [c for node in chain for c in children[node] if c not in members]
        # A stack: what is pushed last is placed first. Late branches sit next to their line, early
        # ones, which run longest, below them; of siblings the better one is nearer.
        branches.sort(key=lambda c: (column[parent[c]], best[c], -c))
        waiting.extend((branch, lane + 1) for branch in branches)
    return lanes


def _edge_curve(start: tuple[float, float], end: tuple[float, float]) -> Curve:
    """Bends an edge to leave its parent downwards and to arrive from the left."""
    (x0, y0), (x1, y1) = start, end
    if y0 == y1:
        return Curve([start, end], [Curve.MOVETO, Curve.LINETO])
    middle = x0 + 0.35 * (x1 - x0)
    return Curve(
        [start, (middle, y0), (x0 + 0.1 * (x1 - x0), y1), end],
        [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4],
    )


def _thumbnail_nodes(path: Sequence[int], column: npt.NDArray[np.int64], wide: float) -> list[int]:
    """Picks nodes of the path that are at least ``wide`` columns apart, the last one included."""
    chosen = [path[-1]]
    for node in reversed(path[:-1]):
        if column[chosen[-1]] - column[node] >= wide:
            chosen.append(node)
    return chosen[::-1]


def draw_tree(
    tree: Tree,
    *,
    winner: int,
    num_steps: int,
    title: str = "",
    subtitle: str = "",
    previews: Mapping[int, Image.Image] | None = None,
) -> Figure:
    """Draws the tree of a search.

    Args:
        tree: any search's.
        winner: node of the best finished sample; its path is emphasised.
        num_steps: steps of the schedule; a node there is finished.
        title: usually the prompt.
        subtitle: usually the name of the search and what it spent.
        previews: pictures by node of the winner's path: its denoised estimates, and the finished
            sample; as many as fit are drawn above their step.

    Returns:
        A figure without a window; ``figure.savefig(path)`` writes it.
    """
    parent, column = tree.parent, tree.step_index
    path = path_to_root(tree, winner)[::-1]
    score = node_scores(tree.value, tree.reward)
    height = -assign_lanes(parent, column, score, path).astype(np.float64)
    thumbs = _thumbnails(path, column, num_steps, previews or {})

    depth_in = min(max(2.2, 0.13 * (1 - height.min()) + 1.3), 7.5)
    strip_in = 1.45 if thumbs else 0.0
    head_in = 0.75
    width_in, height_in = 11.0, head_in + strip_in + depth_in
    figure = Figure(figsize=(width_in, height_in), dpi=150, facecolor="white")
    bottom_in = 0.62
    axes = figure.add_axes((0.04, bottom_in / height_in, 0.865, (depth_in - bottom_in) / height_in))
    axes.set_xlim(-1.3 - 0.05 * num_steps, 1.045 * num_steps)
    axes.set_ylim(height.min() - 1.0, 1.0)

    _draw_edges(axes, parent, column, height, path)
    _draw_fusions(axes, tree, column, height)
    norm = _value_scale(score)
    points = 72 * (depth_in - bottom_in) / (2.0 - height.min())
    area = _areas(tree.visit_count, most=(0.95 * points) ** 2)
    _draw_nodes(axes, column, height, score, area, norm, winner, tree.move == FUSE)
    _draw_pruned(axes, column[~tree.live], height[~tree.live], area[~tree.live])
    _label_axes(axes, num_steps)
    _draw_key(figure, norm, tree, area, height_in, bottom_in, depth_in)
    for node, picture in thumbs.items():
        _draw_thumbnail(
            figure,
            axes,
            picture,
            x=float(column[node]),
            top_in=height_in - head_in - 0.05,
            height_in=height_in,
            label=_thumbnail_label(int(column[node]), num_steps, float(score[node])),
            chosen=node == winner,
        )
    for text, down_in, style in (
        (textwrap.shorten(title, 92, placeholder=" ..."), 0.28, {"fontsize": 13, "weight": "bold"}),
        (subtitle, 0.56, {"fontsize": 9.5, "alpha": 0.8}),
    ):
        figure.text(0.04, 1 - down_in / height_in, text, color=INK, va="center", **style)
    return figure


def _thumbnails(
    path: Sequence[int],
    column: npt.NDArray[np.int64],
    num_steps: int,
    previews: Mapping[int, Image.Image],
) -> dict[int, Image.Image]:
    """Picks the pictures that fit side by side, by node."""
    shown = [node for node in path if node in previews]
    if not shown:
        return {}
    wide = (1.3 + 1.095 * num_steps) / (_MOST_THUMBNAILS + 0.6)
    return {node: previews[node] for node in _thumbnail_nodes(shown, column, wide)}


def _thumbnail_label(step_index: int, num_steps: int, score: float) -> str:
    name = "finished" if step_index == num_steps else f"step {step_index}"
    return name if math.isnan(score) else f"{name} · {score:.4g}"


def _value_scale(score: npt.NDArray[np.float64]) -> Normalize:
    """Spreads the colours over the values, a few very low ones left out of the scale."""
    known = score[np.isfinite(score)]
    if not known.size:
        return Normalize(0.0, 1.0)
    low, high = float(np.quantile(known, 0.03)), float(known.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    return Normalize(low, high)


def _draw_edges(
    axes: Axes,
    parent: npt.NDArray[np.int64],
    column: npt.NDArray[np.int64],
    height: npt.NDArray[np.float64],
    path: Sequence[int],
) -> None:
    winners = set(path)
    for node in range(1, len(parent)):
        above = int(parent[node])
        wins = node in winners
        back = column[node] <= column[above]
        curve = _edge_curve(
            (float(column[above]), float(height[above])),
            (float(column[node]), float(height[node])),
        )
        axes.add_patch(
            PathPatch(
                curve,
                fill=False,
                edgecolor=WINNER if wins else FAINT,
                linewidth=2.6 if wins else 0.8,
                linestyle="--" if back else "-",
                zorder=2 if wins else 1,
                capstyle="round",
            )
        )


def _draw_fusions(
    axes: Axes,
    tree: Tree,
    column: npt.NDArray[np.int64],
    height: npt.NDArray[np.float64],
) -> None:
    """Draws a thin line from every particle to what it was fused into."""
    for node in np.flatnonzero(tree.move == FUSE).tolist():
        for particle in makers(tree, node):
            # Both stand at one step, so the line is bent out to the right of it.
            x, low, high = float(column[node]), float(height[particle]), float(height[node])
            curve = Curve(
                [(x, low), (x + 0.5, (low + high) / 2), (x, high)],
                [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3],
            )
            axes.add_patch(
                PathPatch(
                    curve, fill=False, edgecolor=FUSED, linewidth=0.9, linestyle=":", zorder=2
                )
            )


def _draw_pruned(
    axes: Axes,
    column: npt.NDArray[np.int64],
    height: npt.NDArray[np.float64],
    area: npt.NDArray[np.float64],
) -> None:
    """Crosses out the nodes that were pruned."""
    axes.scatter(column, height, s=area, marker="x", color=INK, linewidth=0.8, zorder=5)


def _areas(visits: npt.NDArray[np.int64], most: float) -> npt.NDArray[np.float64]:
    """Gives the areas of nodes in points squared: that of one visit, and up to eighteen times that.

    Args:
        visits: of each node.
        most: largest area of a node of one visit that leaves its neighbours free.
    """
    one = min(14.0, most)
    more = np.sqrt(np.maximum(visits, 1) - 1.0)
    return np.asarray(one + more * min(1.1 * one, 17.0 * one / max(1.0, float(more.max()))))


def _draw_nodes(
    axes: Axes,
    column: npt.NDArray[np.int64],
    height: npt.NDArray[np.float64],
    score: npt.NDArray[np.float64],
    area: npt.NDArray[np.float64],
    norm: Normalize,
    winner: int,
    fused: npt.NDArray[np.bool_],
) -> None:
    known = np.isfinite(score)
    unknown = ~known
    known[winner] = unknown[0] = False
    for some, marker, edge in ((unknown & ~fused, "o", FAINT), (unknown & fused, "D", FUSED)):
        axes.scatter(
            column[some], height[some], s=area[some] * 0.7, facecolor="white", marker=marker,
            edgecolor=edge, linewidth=0.8, zorder=3,
        )  # fmt: skip
    for some, marker, edge in ((known & ~fused, "o", INK), (known & fused, "D", FUSED)):
        axes.scatter(
            column[some], height[some], s=area[some], c=score[some], cmap=PALETTE, norm=norm,
            marker=marker, edgecolor=edge, linewidth=0.4, zorder=4, clip_on=False,
        )  # fmt: skip
    axes.scatter(column[:1], height[:1], s=60, marker="s", facecolor=INK, edgecolor=INK, zorder=4)
    axes.text(
        column[0] - 0.02 * float(column.max()), 0.0, "prompt", color=INK, fontsize=8.5,
        ha="right", va="center",
    )  # fmt: skip
    axes.scatter(
        column[winner], height[winner], s=230, marker="*", c=[score[winner]], cmap=PALETTE,
        norm=norm, edgecolor=WINNER, linewidth=1.4, zorder=6, clip_on=False,
    )  # fmt: skip


def _label_axes(axes: Axes, num_steps: int) -> None:
    every = next(gap for gap in (1, 2, 4, 5, 8, 10, 20, 25, 50, 100) if num_steps / gap <= 17)
    ticks = [t for t in range(0, num_steps, every) if num_steps - t > every / 2]
    axes.set_xticks(
        [*ticks, num_steps],
        [*(str(t) if t else "0\nnoise" for t in ticks), f"{num_steps}\nfinished"],
    )
    axes.set_xlabel("step of the schedule", color=INK, fontsize=9.5, labelpad=-8)
    axes.set_yticks([])
    axes.tick_params(colors=INK, labelsize=8.5, length=0)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)


def _draw_key(
    figure: Figure,
    norm: Normalize,
    tree: Tree,
    area: npt.NDArray[np.float64],
    height_in: float,
    bottom_in: float,
    depth_in: float,
) -> None:
    tall = min(2.0, depth_in - bottom_in - 0.2) / height_in
    bar_axes = figure.add_axes((0.925, (bottom_in + 0.1) / height_in, 0.012, tall))
    bar = figure.colorbar(ScalarMappable(norm, PALETTE), cax=bar_axes, extend="min")
    bar.set_label("value of the estimate,\nreward where finished", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7.5, colors=INK, length=2)
    bar.outline.set_visible(False)
    visits = tree.visit_count
    most = max(1, int(visits[1:].max()))
    shown = {1: float(area.min())}
    for wanted in (math.sqrt(most), most):
        node = 1 + int(np.abs(visits[1:] - wanted).argmin())
        shown.setdefault(max(1, int(visits[node])), float(area[node]))
    handles = [
        Line2D([], [], color=WINNER, linewidth=2.6, marker="*", markersize=11,
               markeredgecolor=WINNER, markerfacecolor="white", label="path of the best sample"),
        *(
            Line2D([], [], linestyle="", marker="o", color="white", markeredgecolor=INK,
                   markersize=math.sqrt(shown[count]), label=f"{count} visit" + "s" * (count > 1))
            for count in sorted(shown)
        ),
        Line2D([], [], linestyle="", marker="o", color="white", markeredgecolor=FAINT,
               markersize=3.2, label="not valued"),
    ]  # fmt: skip
    if (tree.move == FUSE).any():
        handles.append(
            Line2D([], [], linestyle=":", marker="D", color=FUSED, markeredgecolor=FUSED,
                   markerfacecolor="white", markersize=4.5, linewidth=0.9, label="fused")
        )  # fmt: skip
    if not tree.live.all():
        handles.append(
            Line2D([], [], linestyle="", marker="x", color=INK, markersize=5, label="pruned")
        )
    rows = 1 if len(handles) <= 5 else 2  # or it would run into the subtitle
    figure.legend(
        handles=handles,
        loc="upper right",
        borderaxespad=0.0,
        bbox_to_anchor=(0.985, 1 - (0.48 - 0.1 * rows) / height_in),
        ncols=-(-len(handles) // rows),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handletextpad=0.4,
        columnspacing=1.2,
    )


def _draw_thumbnail(
    figure: Figure,
    axes: Axes,
    picture: Image.Image,
    *,
    x: float,
    top_in: float,
    height_in: float,
    label: str,
    chosen: bool,
) -> None:
    side_in = 0.95
    width_in = float(figure.get_figwidth())
    box = axes.get_position()
    low, high = axes.get_xlim()
    centre = box.x0 + box.width * (x - low) / (high - low)
    left = centre - side_in / 2 / width_in
    frame = figure.add_axes(
        (left, (top_in - side_in) / height_in, side_in / width_in, side_in / height_in)
    )
    frame.imshow(np.asarray(picture.convert("RGB")), interpolation="lanczos")
    frame.set_xticks([])
    frame.set_yticks([])
    for spine in frame.spines.values():
        spine.set_color(WINNER if chosen else FAINT)
        spine.set_linewidth(2.2 if chosen else 0.8)
    frame.set_xlabel(label, fontsize=8, color=WINNER if chosen else INK, labelpad=3)
    axes.plot([x, x], [0.0, 1.0], color=WINNER, linewidth=0.8, linestyle=":", zorder=1)
