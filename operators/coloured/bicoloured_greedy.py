"""Greedy star and acyclic colouring in rounds of vertices that are not adjacent.

Each class keeps what tells a forbidden path or cycle of two colours before it is closed, colours a
front of vertices at once, and takes back those that together would close one.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
from scipy.sparse import csgraph

from operators.coloured.colouring import least_free
from operators.coloured.vertex_order import Flags, Graph, Integers


class Greedy:
    """Colours so far, and how many neighbours of each colour a vertex has."""

    def __init__(self, graph: Graph, priority: Integers) -> None:
        self.graph, self.priority = graph, priority
        self.colours = np.full(graph.size, -1, np.int64)
        self.most = 0
        self.counts = np.zeros((graph.size, 8), np.int32)

    def choose(self, front: Integers, owner: Integers, near: Integers) -> Integers:
        """First fit given the coloured vertices; makes room for a new colour."""
        raise_to = self.most + 1
        while raise_to > self.counts.shape[1]:
            self.widen()
        taken = self.colours[near]
        known = taken >= 0
        where, what = self.forbidden(front, owner, near)
        where = np.concatenate([owner[known], where])
        what = np.concatenate([taken[known], what])
        ordered = np.argsort(where, kind="stable") if len(front) > 2**20 else slice(None)
        chosen = least_free(where[ordered], what[ordered], len(front), self.most)
        self.most = max(self.most, int(chosen.max()) + 1)
        while self.most > self.counts.shape[1]:
            self.widen()
        return chosen

    def forbidden(
        self, front: Integers, owner: Integers, near: Integers
    ) -> tuple[Integers, Integers]:
        """Colours that would complete a forbidden path or cycle: position in the front, colour."""
        raise NotImplementedError

    def widen(self) -> None:
        """Room for as many colours again."""
        self.counts = np.pad(self.counts, ((0, 0), (0, self.counts.shape[1])))


class Stars(Greedy):
    """First fit such that no path of four vertices gets two colours.

    With d(x, b) neighbours of x coloured b, vertex v may not take
    c(w) for w in N(v); c(x) for x in N(w) where d(x, c(w)) >= 2 (v would be an end of the path);
    c(x) for x in N(w) where d(v, c(w)) >= 2 (v would be inside it).
    """

    def __init__(self, graph: Graph, priority: Integers) -> None:
        super().__init__(graph, priority)
        # Whether some x in N(w) of this colour has d(x, c(w)) >= 2.
        self.blocked = np.zeros((graph.size, 8), bool)
        self.fresh = np.full(graph.size, -1, np.int64)

    def widen(self) -> None:
        """Room for as many colours again."""
        super().widen()
        self.blocked = np.pad(self.blocked, ((0, 0), (0, self.blocked.shape[1])))

    def forbidden(
        self, front: Integers, owner: Integers, near: Integers
    ) -> tuple[Integers, Integers]:
        """Colours that would complete a path or cycle: position in the front, colour."""
        edge, colour = np.nonzero(self.blocked[near])
        taken = self.colours[near]
        inside = (taken >= 0) & (self.counts[front[owner], taken] > 1)
        middle, other = np.nonzero(self.counts[near[inside]])
        return (
            np.concatenate([owner[edge], owner[inside][middle]]),
            np.concatenate([colour, other]),
        )

    def colour(self, front: Integers) -> Flags:
        """Colour what can be coloured together."""
        owner, near = self.graph.around(front)
        self.colours[front] = self.choose(front, owner, near)
        given = self.colours[front][owner]
        np.add.at(self.counts, (near, given), 1)
        kept = self._without_paths(front, owner, near, given)
        lost = ~kept[owner]
        np.subtract.at(self.counts, (near[lost], given[lost]), 1)
        self.colours[front[~kept]] = -1
        near, given, own = near[~lost], given[~lost], front[owner[~lost]]
        taken = self.colours[near]
        known = taken >= 0
        ends = known & (self.counts[own, taken] > 1)
        self.blocked[near[ends], given[ends]] = True
        # Neighbours that now have two of this colour block theirs.
        hubs = known & (self.counts[near, given] > 1)
        width = self.counts.shape[1]
        pairs = np.unique(near[hubs] * width + given[hubs])
        hub, two = pairs // width, pairs % width
        which, reached = self.graph.around(hub)
        same = self.colours[reached] == two[which]
        self.blocked[reached[same], self.colours[hub[which[same]]]] = True
        return kept

    def _without_paths(
        self, front: Integers, owner: Integers, near: Integers, given: Integers
    ) -> Flags:
        """Which of the front stay: of those on one forbidden path the first in the order."""
        c, counts, width = self.colours, self.counts, self.counts.shape[1]
        places = np.unique(np.concatenate([front, near]))
        which, b = self.graph.around(places)
        a = places[which]
        known = (c[a] >= 0) & (c[b] >= 0)
        a, b = a[known], b[known]
        bad = (counts[a, c[b]] > 1) & (counts[b, c[a]] > 1)
        a, b = a[bad], b[bad]
        if not len(a):
            return np.ones(len(front), bool)
        self.fresh[front] = self.priority[front]
        # The greatest new neighbour of each vertex in each colour.
        pairs, back = np.unique(near * width + given, return_inverse=True)
        greatest = np.full(len(pairs) + 1, -1, np.int64)
        np.maximum.at(greatest, back, self.priority[front[owner]])

        def greatest_beside(x: Integers, colour: Integers) -> Integers:
            keys = x * width + colour
            at = np.searchsorted(pairs, keys)
            hit = pairs[np.minimum(at, len(pairs) - 1)] == keys
            return greatest[np.where(hit, at, len(pairs))]

        best = np.maximum.reduce(
            [self.fresh[a], self.fresh[b], greatest_beside(a, c[b]), greatest_beside(b, c[a])]
        )
        loses = np.zeros(self.graph.size, bool)
        loses[a[self.fresh[a] < best]] = True
        loses[b[self.fresh[b] < best]] = True
        # New neighbours of an end that are coloured as the other end.
        sides, back = np.unique(
            np.concatenate([a * width + c[b], b * width + c[a]]), return_inverse=True
        )
        bound = np.full(len(sides) + 1, -1, np.int64)
        np.maximum.at(bound, back, np.concatenate([best, best]))
        keys = near * width + given
        at = np.searchsorted(sides, keys)
        hit = sides[np.minimum(at, len(sides) - 1)] == keys
        outdone = bound[np.where(hit, at, len(sides))] > self.priority[front[owner]]
        loses[front[owner[outdone]]] = True
        self.fresh[front] = -1
        return ~loses[front]


class Forests(Greedy):
    """First fit such that no cycle gets two colours.

    Vertex v may not take colour a where two of its neighbours of one colour b are in one tree of
    the forest of {a, b}. The trees are kept by union and find, over nodes (u, b).
    """

    def __init__(self, graph: Graph, priority: Integers) -> None:
        super().__init__(graph, priority)
        self.parent = np.arange(graph.size * 8)

    def widen(self) -> None:
        """Room for as many colours again."""
        width = self.counts.shape[1]
        super().widen()
        wide = self.counts.shape[1]
        parent = np.arange(self.graph.size * wide).reshape(-1, wide)
        parent[:, :width] = (self.parent // width * wide + self.parent % width).reshape(-1, width)
        self.parent = parent.reshape(-1)

    def _find(self, nodes: Integers) -> Integers:
        root = self.parent[nodes]
        while True:
            above = self.parent[root]
            if np.array_equal(above, root):
                self.parent[nodes] = root
                return root
            root = above

    def forbidden(
        self, front: Integers, owner: Integers, near: Integers
    ) -> tuple[Integers, Integers]:
        """Colours that would complete a path or cycle: position in the front, colour."""
        width = self.counts.shape[1]
        known = self.colours[near] >= 0
        owner, near = owner[known], near[known]
        edge, colour = np.nonzero(self.counts[near])
        root = self._find(near[edge] * width + colour)
        # One root stands for one pair of colours, so that equal keys mean equal b too.
        where = owner[edge]
        ranked = np.lexsort((root, colour, where))
        where, colour, root = where[ranked], colour[ranked], root[ranked]
        twice = (np.diff(where) == 0) & (np.diff(colour) == 0) & (np.diff(root) == 0)
        return where[1:][twice], colour[1:][twice]

    def colour(self, front: Integers) -> Flags:
        """Colour what can be coloured together."""
        owner, near = self.graph.around(front)
        chosen = self.choose(front, owner, near)
        width = self.counts.shape[1]
        known = self.colours[near] >= 0
        own, other = front[owner[known]], near[known]
        # New edges: from node (v, c(w)) to the tree of (w, c(v)).
        ends = np.concatenate(
            [
                own * width + self.colours[other],
                self._find(other * width + chosen[owner[known]]),
            ]
        )
        nodes, back = np.unique(ends, return_inverse=True)
        own_nodes, trees_met = back[: len(own)], back[len(own) :]
        edges = (own_nodes, trees_met)
        shape = (len(nodes), len(nodes))
        # A spanning forest in the order of the colouring: an edge that is not in it closes a cycle.
        weight = 1.0 + self.priority.max(initial=0) - self.priority[own]
        forest = csgraph.minimum_spanning_tree(
            scipy.sparse.coo_array((weight, edges), shape).tocsr()
        ).tocoo()
        kept = np.ones(len(front), bool)
        if forest.nnz < len(own):
            place = own_nodes * len(nodes) + trees_met
            spare = ~np.isin(
                place, forest.coords[0].astype(np.int64) * len(nodes) + forest.coords[1]
            )
            kept[owner[known][spare]] = False
        self.colours[front[kept]] = chosen[kept]
        stays = kept[owner]
        np.add.at(self.counts, (near[stays], chosen[owner[stays]]), 1)
        stays = stays[known]
        joined = scipy.sparse.coo_array(
            (np.ones(np.count_nonzero(stays), bool), (own_nodes[stays], trees_met[stays])), shape
        )
        label = csgraph.connected_components(joined.tocsr(), directed=False)[1]
        first = np.zeros(label.max(initial=-1) + 1, np.int64)
        first[label[::-1]] = nodes[::-1]
        self.parent[nodes] = first[label]
        return kept
