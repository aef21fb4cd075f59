"""The search tree of one image: a struct of growable arrays that only this module writes.

Row 0 is ``ROOT``: the problem itself, before any noise is drawn. (This departs from the glossary's
'row of the initial noise': a search draws several initial noises, and they are the root's
children.) Rows are appended in the order of expansion, so an index is also a date and a parent
comes before its children. Latents are never here: the column ``handle`` names them in the
environment.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mctd_diffusers.errors import CapacityError
from mctd_diffusers.search.environment import FIRST_DRAW, Handles, Values
from mctd_diffusers.search.seeding import child_seed

ROOT: Final = 0
"""Row of the problem itself (or of the node that a tree was re-rooted at)."""
NO_PARENT: Final = -1
NO_HANDLE: Final = -1
NO_STEP: Final = -1
"""``step_index`` of the root: nothing is drawn yet."""
DRAW: Final = 1
"""Move of an edge from the root to an initial noise."""
STEP: Final = 2
"""Move of an edge that crosses ``stride`` steps of the schedule."""
RENOISE: Final = 3
"""Move of an edge back up the schedule, from the denoised estimate."""
PERTURB: Final = 4
"""Move of an edge to a variant of the same step index, with other noise on its last edge."""
FUSE: Final = 5
"""Move of an edge from the lowest common ancestor of several particles to what they fused into."""

STRIDE_REASONS: Final = (
    "",
    "budget",
    "fine_to_coarse",
    "constant",
    "fixed",
    "uniform",
    "random",
    "ays",
    "gits",
    "gain",
    "tolerance",
    "only",
    "fallback",
)
"""What the column ``stride_reason`` numbers: no policy chose; the plan of that name; as fixed;
evenly; by chance; by a table of typical costs; by predicted gain; the same among strides whose
predicted error is tolerated; as the only one that fits; by typical costs or evenly, since what the
policy asks for was not known."""

Nodes: TypeAlias = npt.NDArray[np.int64]

_COLUMNS: Final[dict[str, tuple[type[Any], Any]]] = {
    "parent": (np.int64, NO_PARENT),
    "handle": (np.int64, NO_HANDLE),
    "step_index": (np.int64, NO_STEP),
    "stride": (np.int64, 0),
    "eta": (np.float64, np.nan),
    "guidance": (np.float64, np.nan),
    "seed": (np.int64, 0),
    "move": (np.int64, 0),
    "depth": (np.int64, 0),
    "visit_count": (np.int64, 0),
    "in_flight": (np.int64, 0),
    "total_value": (np.float64, 0.0),
    "max_value": (np.float64, -np.inf),
    "value": (np.float64, np.nan),
    "reward": (np.float64, np.nan),
    "evaluated": (np.bool_, False),
    "live": (np.bool_, True),
    "stride_reason": (np.int64, 0),
    "predicted_gain": (np.float64, np.nan),
    "predicted_error": (np.float64, np.nan),
}


class Fusion(NamedTuple):
    """What a fused node is made of.

    Attributes:
        particles: rows, all at the step index of the fused node.
        weights: of each; they sum to 1.
        method: name of the fusion.
    """

    particles: tuple[int, ...]
    weights: tuple[float, ...]
    method: str


class Tree:
    """One image's search tree.

    ============== ======= ==================================================================
    column         dtype   meaning
    ============== ======= ==================================================================
    parent         int64   row of the parent; ``NO_PARENT`` for the root
    handle         int64   the environment's id of the sample; ``NO_HANDLE`` for the root
    step_index     int64   position in the schedule, 0 is noisiest; ``NO_STEP`` for the root
    stride         int64   schedule steps that the edge to this node crosses; 0 if not a step
    eta            float64 share of fresh noise on that edge; NaN: as the user's own scheduler;
                           of a ``PERTURB`` its strength
    guidance       float64 guidance scale on that edge; NaN: the call's own; of a ``FUSE`` that of
                           the particles' estimates
    seed           int64   seed of that edge; ``FIRST_DRAW`` for the noise that came along
    move           int64   ``DRAW``, ``STEP``, ``RENOISE``, ``PERTURB`` or ``FUSE``; 0 for the root
    depth          int64   edges from the root
    visit_count    int64   backups through this node
    in_flight      int64   virtual visits: simulations under way through this node
    total_value    float64 sum of the values backed up through this node, reward units
    max_value      float64 greatest of them; ``-inf`` until the first
    value          float64 the node's own estimate by its denoised estimate; NaN until valued
    reward         float64 score of a finished sample; NaN until it is scored
    evaluated      bool    its one network call is made
    live           bool    False once pruned: its sample is released, it cannot be resumed
    stride_reason  int64   why the edge has its stride: a place in ``STRIDE_REASONS``
    predicted_gain float64 what was predicted of the edge, by the target of its policy (higher is
                           better); NaN if nothing was
    predicted_error float64 predicted truncation error of the edge, latent units; NaN likewise
    ============== ======= ==================================================================

    The columns are read-only views of the used rows; a view taken before an expansion keeps its
    length. Only the functions of this module write.

    Args:
        root_seed: seed from which all edge seeds derive, 0 to 2**63 - 1.
    """

    def __init__(self, root_seed: int) -> None:
        self.root_seed = root_seed
        self.num_nodes = 0
        self._capacity = 64
        for name, (dtype, fill) in _COLUMNS.items():
            setattr(self, f"_{name}", np.full(self._capacity, fill, dtype=dtype))
        self._views: dict[str, npt.NDArray[Any]] = {}
        self._children: list[list[int]] = []
        self._node_of: dict[int, int] = {}
        self._issued: dict[tuple[int, int, int], int] = {}
        self._fusions: dict[int, Fusion] = {}
        self._pruned: dict[int, str] = {}
        _append(self, NO_PARENT, seed=root_seed)

    # One declaration a column, so that readers and type checkers find them.
    _parent: npt.NDArray[np.int64]
    _handle: npt.NDArray[np.int64]
    _step_index: npt.NDArray[np.int64]
    _stride: npt.NDArray[np.int64]
    _eta: npt.NDArray[np.float64]
    _guidance: npt.NDArray[np.float64]
    _seed: npt.NDArray[np.int64]
    _move: npt.NDArray[np.int64]
    _depth: npt.NDArray[np.int64]
    _visit_count: npt.NDArray[np.int64]
    _in_flight: npt.NDArray[np.int64]
    _total_value: npt.NDArray[np.float64]
    _max_value: npt.NDArray[np.float64]
    _value: npt.NDArray[np.float64]
    _reward: npt.NDArray[np.float64]
    _evaluated: npt.NDArray[np.bool_]
    _live: npt.NDArray[np.bool_]
    _stride_reason: npt.NDArray[np.int64]
    _predicted_gain: npt.NDArray[np.float64]
    _predicted_error: npt.NDArray[np.float64]

    def _view(self, name: str) -> npt.NDArray[Any]:
        """Read-only view of a column's used rows, made once between two expansions."""
        view = self._views.get(name)
        if view is None:
            column: npt.NDArray[Any] = getattr(self, f"_{name}")
            view = self._views[name] = column[: self.num_nodes]
            view.flags.writeable = False
        return view

    @property
    def parent(self) -> npt.NDArray[np.int64]:
        """``[num_nodes]`` rows of the parents; ``NO_PARENT`` for the root."""
        return self._view("parent")

    @property
    def handle(self) -> npt.NDArray[np.int64]:
        """``[num_nodes]`` the environment's ids; ``NO_HANDLE`` for the root."""
        return self._view("handle")

    @property
    def step_index(self) -> npt.NDArray[np.int64]:
        """``[num_nodes]`` positions in the schedule, 0 is noisiest; ``NO_STEP`` for the root."""
        return self._view("step_index")

    @property
    def stride(self) -> npt.NDArray[np.int64]:
        """``[num_nodes]`` schedule steps crossed by the edge to each node; 0 if it is no step."""
        return self._view("stride")

    @property
    def eta(self) -> npt.NDArray[np.float64]:
        """``[num_nodes]`` share of fresh noise of the edges; NaN: as the user's own scheduler."""
        return self._view("eta")

    @property
    def guidance(self) -> npt.NDArray[np.float64]:
        """``[num_nodes]`` guidance scales of the edges; NaN: the call's own."""
        return self._view("guidance")

    @property
    def seed(self) -> npt.NDArray[np.int64]:
        """``[num_nodes]`` seeds of the edges; ``FIRST_DRAW`` for the noise that came along."""
        return self._view("seed")

    @property
    def move(self) -> npt.NDArray[np.int64]:
        """``[num_nodes]`` ``DRAW``, ``STEP``, ``RENOISE``, ``PERTURB``, ``FUSE``; 0: the root."""
        return self._view("move")

    @property
    def depth(self) -> npt.NDArray[np.int64]:
        """``[num_nodes]`` edges from the root."""
        return self._view("depth")

    @property
    def visit_count(self) -> npt.NDArray[np.int64]:
        """``[num_nodes]`` backups through each node."""
        return self._view("visit_count")

    @property
    def in_flight(self) -> npt.NDArray[np.int64]:
        """``[num_nodes]`` virtual visits: simulations under way through each node."""
        return self._view("in_flight")

    @property
    def total_value(self) -> npt.NDArray[np.float64]:
        """``[num_nodes]`` sums of the values backed up, in reward units."""
        return self._view("total_value")

    @property
    def max_value(self) -> npt.NDArray[np.float64]:
        """``[num_nodes]`` greatest value backed up; ``-inf`` until the first."""
        return self._view("max_value")

    @property
    def value(self) -> npt.NDArray[np.float64]:
        """``[num_nodes]`` own estimates in reward units; NaN until valued."""
        return self._view("value")

    @property
    def reward(self) -> npt.NDArray[np.float64]:
        """``[num_nodes]`` scores of finished samples; NaN until scored."""
        return self._view("reward")

    @property
    def evaluated(self) -> npt.NDArray[np.bool_]:
        """``[num_nodes]`` whether the node's one network call is made."""
        return self._view("evaluated")

    @property
    def live(self) -> npt.NDArray[np.bool_]:
        """``[num_nodes]`` False once pruned."""
        return self._view("live")

    @property
    def stride_reason(self) -> npt.NDArray[np.int64]:
        """``[num_nodes]`` why the edges have their strides: places in ``STRIDE_REASONS``."""
        return self._view("stride_reason")

    @property
    def predicted_gain(self) -> npt.NDArray[np.float64]:
        """``[num_nodes]`` what was predicted of the edges by the target; NaN if nothing was."""
        return self._view("predicted_gain")

    @property
    def predicted_error(self) -> npt.NDArray[np.float64]:
        """``[num_nodes]`` predicted truncation errors of the edges, latent units; NaN likewise."""
        return self._view("predicted_error")

    def children(self, node: int) -> tuple[int, ...]:
        """Rows of a node's children, in the order of their expansion."""
        self._check(node)
        return tuple(self._children[node])

    def fusion_of(self, node: int) -> Fusion | None:
        """What a fused node was made of; ``None`` of all others."""
        self._check(node)
        return self._fusions.get(node)

    def pruned_by(self, node: int) -> str | None:
        """Name of the rule that pruned a node; ``None`` while it is live, or for no rule."""
        self._check(node)
        return self._pruned.get(node)

    def node_of(self, handle: int) -> int:
        """Row of the node that has ``handle``.

        Raises:
            CapacityError: no node has it.
        """
        try:
            return self._node_of[handle]
        except KeyError:
            raise CapacityError(
                f"handle {handle} has no node in a tree of {self.num_nodes} nodes; "
                "add_child it before asking for its value or reward.",
                handles=[handle],
            ) from None

    def copy(self) -> Tree:
        """Independent copy, for tests."""
        return from_json(to_json(self))

    def _check(self, node: int) -> None:
        if not 0 <= node < self.num_nodes:
            raise CapacityError(
                f"node {node} does not exist in a tree of {self.num_nodes} nodes; "
                f"name a row from 0 to {self.num_nodes - 1}."
            )


def _append(tree: Tree, parent: int, **entries: Any) -> int:
    """Append a row of defaults and ``entries``; returns its index."""
    node = tree.num_nodes
    if node == tree._capacity:
        tree._capacity *= 2
        for name, (dtype, fill) in _COLUMNS.items():
            grown = np.full(tree._capacity, fill, dtype=dtype)
            grown[:node] = getattr(tree, f"_{name}")
            setattr(tree, f"_{name}", grown)
    tree._views.clear()
    tree._parent[node] = parent
    for name, entry in entries.items():
        getattr(tree, f"_{name}")[node] = entry
    tree._children.append([])
    if parent != NO_PARENT:
        tree._children[parent].append(node)
    tree.num_nodes += 1
    return node


def add_child(
    tree: Tree,
    parent: int,
    *,
    handle: int,
    step_index: int,
    move: int,
    stride: int,
    eta: float | None,
    seed: int,
    guidance: float | None = None,
) -> int:
    """Expand ``parent`` by one lazy child; its columns are those of :class:`Tree`.

    Returns:
        The row of the child.

    Raises:
        CapacityError: ``parent`` does not exist, or ``handle`` already has a node.
    """
    tree._check(parent)
    if handle in tree._node_of:
        raise CapacityError(
            f"handle {handle} is already node {tree._node_of[handle]}; handles are never reused.",
            handles=[handle],
        )
    node = _append(
        tree,
        parent,
        handle=handle,
        step_index=step_index,
        move=move,
        stride=stride,
        eta=np.nan if eta is None else eta,
        guidance=np.nan if guidance is None else guidance,
        seed=seed,
        depth=tree._depth[parent] + 1,
    )
    tree._node_of[handle] = node
    return node


def add_fused(
    tree: Tree,
    fusion: Fusion,
    *,
    handle: int,
    seed: int,
    guidance: float | None = None,
) -> int:
    """Add what several particles fused into, below their lowest common ancestor.

    Returns:
        The row of the fused node.

    Raises:
        CapacityError: ``handle`` already has a node.
    """
    node = add_child(
        tree,
        common_ancestor(tree, fusion.particles),
        handle=handle,
        step_index=int(tree._step_index[fusion.particles[0]]),
        move=FUSE,
        stride=0,
        eta=None,
        guidance=guidance,
        seed=seed,
    )
    tree._fusions[node] = fusion
    return node


def issue_seeds(tree: Tree, parent: int, *, move: int, stride: int, count: int) -> list[int]:
    """Seeds for ``count`` new edges below ``parent``, each given out once.

    The ordinal of an edge counts the seeds given out before for the same parent, move and stride,
    so an edge's noise is decided by its path alone, whatever the wave it rides in; edges that are
    under way side by side never share a seed.

    Returns:
        The seeds; the root's first draw is ``FIRST_DRAW``, the noise that came with the problem.
    """
    tree._check(parent)
    key = (parent, move, stride)
    first = tree._issued.get(key, 0)
    tree._issued[key] = first + count
    base = int(tree._seed[parent])
    if base == FIRST_DRAW:
        base = child_seed(tree.root_seed, DRAW, 0, 0)
    return [
        FIRST_DRAW if move == DRAW and ordinal == 0 else child_seed(base, move, stride, ordinal)
        for ordinal in range(first, first + count)
    ]


def record_evaluated(tree: Tree, handles: Handles) -> None:
    """Note that the network calls of these samples are made."""
    for handle in handles.tolist():
        tree._evaluated[tree.node_of(handle)] = True


def record_values(tree: Tree, handles: Handles, values: Values) -> None:
    """Note the estimates of unfinished samples."""
    for handle, value in zip(handles.tolist(), values.tolist(), strict=True):
        tree._value[tree.node_of(handle)] = value


def record_rewards(tree: Tree, handles: Handles, rewards: Values) -> None:
    """Note the scores of finished samples."""
    for handle, reward in zip(handles.tolist(), rewards.tolist(), strict=True):
        tree._reward[tree.node_of(handle)] = reward


def record_stride_choice(
    tree: Tree, node: int, *, reason: str, predicted_gain: float, predicted_error: float
) -> None:
    """Note why the edge to ``node`` has its stride, and what was predicted of it."""
    tree._stride_reason[node] = STRIDE_REASONS.index(reason)
    tree._predicted_gain[node] = predicted_gain
    tree._predicted_error[node] = predicted_error


def backup(tree: Tree, node: int, value: float) -> None:
    """Add one visit and ``value`` (reward units) to every node from ``node`` to the root."""
    path = path_to_root(tree, node)
    tree._visit_count[path] += 1
    tree._total_value[path] += value
    tree._max_value[path] = np.maximum(tree._max_value[path], value)


def add_virtual_visit(tree: Tree, node: int) -> None:
    """Count a simulation that is under way, from ``node`` to the root, inclusive."""
    tree._in_flight[path_to_root(tree, node)] += 1


def settle(tree: Tree, node: int) -> None:
    """Take back one :func:`add_virtual_visit` at ``node``: its simulation is over."""
    path = path_to_root(tree, node)
    assert bool((tree._in_flight[path] > 0).all()), f"no virtual visit to settle at node {node}"
    tree._in_flight[path] -= 1


def path_to_root(tree: Tree, node: int) -> list[int]:
    """Rows from ``node`` (first) to the root (last)."""
    tree._check(node)
    path = []
    parent = tree._parent
    while node != NO_PARENT:
        path.append(node)
        node = int(parent[node])
    return path


def common_ancestor(tree: Tree, nodes: Sequence[int]) -> int:
    """The lowest node above all of ``nodes``: for a single one, or for one given twice, its parent.

    Raises:
        CapacityError: a node is the root, which has none above it, or does not exist.
    """
    shared = set(path_to_root(tree, nodes[0])[1:])
    for node in nodes[1:]:
        shared &= set(path_to_root(tree, node)[1:])
    if not shared:
        raise CapacityError(f"no node is above all of {list(nodes)}: the root is one of them.")
    return max(shared)  # a parent comes before its children


def ancestry(tree: Tree, nodes: Sequence[int]) -> list[int]:
    """Rows that must be made to make ``nodes`` again, these included, in the order of expansion.

    Parents, and of a fused node its particles in the place of its parent; never the root.
    """
    rows: set[int] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        tree._check(node)
        if node == ROOT or node in rows:
            continue
        rows.add(node)
        pending += makers(tree, node)
    return sorted(rows)


def makers(tree: Tree, node: int) -> tuple[int, ...]:
    """Rows that a node was made from: its particles where it is fused, else its parent."""
    fusion = tree._fusions.get(node)
    return (int(tree._parent[node]),) if fusion is None else fusion.particles


def ancestor_at(tree: Tree, node: int, step_index: int) -> int:
    """The nearest node at ``step_index`` on the way from ``node``, inclusive, to the root.

    Raises:
        CapacityError: there is none.
    """
    for row in path_to_root(tree, node):
        if tree._step_index[row] == step_index:
            return row
    raise CapacityError(
        f"no node at step index {step_index} leads to node {node}; its path stands at "
        f"{tree.step_index[path_to_root(tree, node)].tolist()}."
    )


def subtree(tree: Tree, node: int) -> Nodes:
    """Rows of ``node`` and all its descendants, in the order of their expansion."""
    tree._check(node)
    rows = [node]
    for row in rows:  # grows while it is read
        rows.extend(tree._children[row])
    return np.sort(np.array(rows, dtype=np.int64))


def reroot(tree: Tree, node: int) -> Tree:
    """New tree that holds ``node`` as its root and everything below it; handles and seeds are kept.

    Re-rooting at the root is the identity.
    """
    rows = subtree(tree, node)
    new_row = {int(old): new for new, old in enumerate(rows)}
    columns = {name: getattr(tree, f"_{name}")[rows] for name in _COLUMNS}
    columns["parent"] = np.array([new_row.get(int(old), NO_PARENT) for old in columns["parent"]])
    columns["parent"][0] = NO_PARENT
    columns["depth"] = columns["depth"] - columns["depth"][0]
    issued = {
        (new_row[parent], move, stride): count
        for (parent, move, stride), count in tree._issued.items()
        if parent in new_row
    }
    fused = {
        new_row[node]: fusion._replace(particles=tuple(new_row[row] for row in fusion.particles))
        for node, fusion in tree._fusions.items()
        if all(row in new_row for row in (node, *fusion.particles))
    }
    pruned = {new_row[row]: rule for row, rule in tree._pruned.items() if row in new_row}
    return _from_columns(tree.root_seed, columns, issued, fused, pruned)


def prune(tree: Tree, node: int, *, rule: str | None = None) -> list[int]:
    """Mark ``node`` and its descendants as no longer live.

    Returns:
        Handles of those that were live until now, to be released.
    """
    return prune_alone(tree, subtree(tree, node).tolist(), rule=rule)


def prune_alone(tree: Tree, nodes: Sequence[int], *, rule: str | None = None) -> list[int]:
    """Mark ``nodes`` as no longer live, and none of their descendants, which stay good without.

    Args:
        tree: of the search.
        nodes: rows; those that are not live any more stay as they are.
        rule: name of what prunes them, see :meth:`Tree.pruned_by`.

    Returns:
        Handles of those that were live until now, to be released.
    """
    rows = [row for row in dict.fromkeys(nodes) if tree._live[row]]
    tree._live[rows] = False
    if rule is not None:
        tree._pruned.update(dict.fromkeys(rows, rule))
    return [int(tree._handle[row]) for row in rows if tree._handle[row] != NO_HANDLE]


def to_json(tree: Tree) -> str:
    """The whole tree as JSON text: root seed, columns (NaN as null), seeds, fusions, the pruned."""
    columns = {name: _plain(getattr(tree, name)) for name in _COLUMNS}
    issued = [[*key, count] for key, count in sorted(tree._issued.items())]
    fused = [[node, *fusion] for node, fusion in sorted(tree._fusions.items())]
    return json.dumps(
        {
            "root_seed": tree.root_seed,
            "issued": issued,
            "fusions": fused,
            "pruned": sorted(tree._pruned.items()),
            "columns": columns,
        }
    )


def from_json(text: str) -> Tree:
    """The tree that :func:`to_json` wrote."""
    saved = json.loads(text)
    columns = {}
    for name, (dtype, _) in _COLUMNS.items():
        entries = [_number(entry) for entry in saved["columns"][name]]
        columns[name] = np.array(entries, dtype=dtype)
    issued = {(parent, move, stride): count for parent, move, stride, count in saved["issued"]}
    fused = {
        node: Fusion(tuple(particles), tuple(weights), method)
        for node, particles, weights, method in saved["fusions"]
    }
    return _from_columns(saved["root_seed"], columns, issued, fused, dict(saved["pruned"]))


def _from_columns(
    root_seed: int,
    columns: dict[str, npt.NDArray[Any]],
    issued: dict[tuple[int, int, int], int],
    fused: dict[int, Fusion],
    pruned: dict[int, str],
) -> Tree:
    tree = Tree(root_seed)
    tree._views.clear()
    tree.num_nodes = len(columns["parent"])
    tree._capacity = max(64, tree.num_nodes)
    for name, (dtype, fill) in _COLUMNS.items():
        column = np.full(tree._capacity, fill, dtype=dtype)
        column[: tree.num_nodes] = columns[name]
        setattr(tree, f"_{name}", column)
    tree._children = [[] for _ in range(tree.num_nodes)]
    for node in range(1, tree.num_nodes):
        tree._children[tree._parent[node]].append(node)
    tree._node_of = {
        int(handle): node for node, handle in enumerate(tree.handle) if handle != NO_HANDLE
    }
    tree._issued = dict(issued)
    tree._fusions = dict(fused)
    tree._pruned = dict(pruned)
    return tree


def _plain(column: npt.NDArray[Any]) -> Sequence[Any]:
    """Python numbers; NaN becomes ``None`` and infinities their names, since JSON has neither."""
    return [
        (None if np.isnan(entry) else str(entry))
        if isinstance(entry, float) and not np.isfinite(entry)
        else entry
        for entry in column.tolist()
    ]


def _number(entry: Any) -> Any:
    """Reverse of :func:`_plain` for one entry."""
    if entry is None:
        return np.nan
    return float(entry) if isinstance(entry, str) else entry
