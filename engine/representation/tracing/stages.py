"""Cut a tapped network into stages, so that backward can recompute one stage at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import fx

from engine.representation.tracing.tap import is_visit


def cut(graph_module: fx.GraphModule, sizes: Sequence[int]) -> list[fx.GraphModule]:
    """Networks `(x, visit) -> y` that do, one after the other, what `graph_module` does; they share its parameters.

    A cut is possible only behind a tap that is all that later layers read. Here a shortcut leads from t1 around t2 to
    t3, so there is no cut behind t2; cuts behind t0 and t3 give three stages:

                       │                            │
        images ──► t0 ─┼─► t1 ──┬──► t2 ──(+)─► t3 ─┼─► t4 ──► t5
                       │        └────────────┘      │
        stage 0        │ stage 1                    │ stage 2
        input: images  │ input: t0                  │ input: t3

    Backward goes from the last stage to the first. It holds the inputs of the present stage and of the stages before
    it, and computes the present stage's own taps again. Of all possible partitions this is the one with the smallest
    peak:

        max over stages s of  Σ_{i ≤ s} size of stage i's input + Σ sizes of stage s's own taps

    The images themselves count as 0: they are in memory anyway.

    Args:
        graph_module: from `engine.representation.tracing.tap.tap_network`.
        sizes: d_j of every tap of the extractor; the graph's visits say which are its own.
    """
    nodes = list(graph_module.graph.nodes)
    place = {node: n for n, node in enumerate(nodes)}
    last_reader = {node: max((place[user] for user in node.users), default=place[node]) for node in nodes}
    visits = [node for node in nodes if is_visit(node)]
    own = [sizes[int(visit.args[1])] for visit in visits]
    possible = [
        n
        for n, visit in enumerate(visits[:-1])
        if all(
            last_reader[node] <= place[visit] or node is visit or node.target == "visit"
            for node in nodes[: place[visit] + 1]
        )
    ]
    images = next(node for node in nodes if node.op == "placeholder" and node.target != "visit")
    bounds = [images, *(visits[n] for n in best_cuts(own, possible)), visits[-1]]
    stages, begun = [], 0
    for entry, stop in itertools.pairwise(bounds):
        inside = [node for node in nodes[begun : place[stop] + 1] if node.op != "placeholder"]
        stages.append(_stage(graph_module, entry, inside, stop))
        begun = place[stop] + 1
    return stages


def best_cuts(sizes: Sequence[int], possible: Sequence[int]) -> list[int]:
    """Indices of the taps to cut behind, among the `possible` ones, for the smallest peak (see `cut`).

    Args:
        sizes: d_j of the network's own taps, in order.
        possible: indices behind which a cut may go, ascending, without the last tap's.

    Of partitions with the same peak, the one with the fewest cuts.
    """
    best: tuple[int, int, list[int]] | None = None
    ends = [*possible, len(sizes) - 1]
    for limit in sorted({sum(sizes[i + 1 : j + 1]) for i in [-1, *possible] for j in ends if i < j}):
        # As few stages as possible whose own taps stay within the limit.
        cuts: list[int] = []
        begun = -1
        for end, following in zip(ends, [*ends[1:], None], strict=True):
            if following is not None and sum(sizes[begun + 1 : following + 1]) > limit:
                cuts.append(end)
                begun = end
        peak = kept = 0
        for first, stop in zip([-1, *cuts], [*cuts, len(sizes) - 1], strict=True):
            kept += sizes[first] if first >= 0 else 0
            peak = max(peak, kept + sum(sizes[first + 1 : stop + 1]))
        if best is None or (peak, len(cuts)) < best[:2]:
            best = (peak, len(cuts), cuts)
    assert best is not None
    return best[2]


def _stage(whole: fx.GraphModule, entry: fx.Node, inside: Sequence[fx.Node], stop: fx.Node) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {entry: graph.placeholder("x")}
    visit = next(node for node in whole.graph.nodes if node.op == "placeholder" and node.target == "visit")
    copies[visit] = graph.placeholder("visit")
    for node in inside:
        copies[node] = graph.node_copy(node, lambda other: copies[other])
    graph.output(copies[stop])
    graph.lint()
    return fx.GraphModule(whole, graph, "Stage")
