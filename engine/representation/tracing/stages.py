"""A tapped network cut into stages, so that backward can compute one stage again at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from engine.representation.tracing.tap import is_visit


def cut(graph_module: fx.GraphModule, sizes: Sequence[int]) -> list[fx.GraphModule]:
    """Networks `(x, visit) -> y` that do, one after the other, what `graph_module` does; they share its parameters.

    Cuts go only where one tap is all that later layers read. Of all such partitions this is the one that needs the
    least memory in a backward pass from the last stage to the first, when the inputs of a stage and of all stages
    before it are kept and the stage itself is computed again:

        max over stages s of  Σ_{i ≤ s} size of stage i's input + Σ sizes of stage s's own taps

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
    cuts = _best_cuts(own, possible)
    inputs = next(node for node in nodes if node.op == "placeholder" and node.target != "visit")
    stages, begun = [], 0
    for entry, stop in zip([inputs, *(visits[n] for n in cuts)], [*(visits[n] for n in cuts), visits[-1]], strict=True):
        inside = [node for node in nodes[begun : place[stop] + 1] if node.op != "placeholder"]
        stages.append(_stage(graph_module, entry, inside, stop))
        begun = place[stop] + 1
    return stages


def _best_cuts(sizes: Sequence[int], possible: Sequence[int]) -> list[int]:
    """Indices of taps to cut behind, among the `possible`: see `cut`. Fewer cuts where nothing else decides."""
    best: tuple[int, int, list[int]] | None = None
    ends = [*possible, len(sizes) - 1]
    for limit in sorted({sum(sizes[i + 1 : j + 1]) for i in [-1, *possible] for j in ends if i < j}):
        # As few stages as there can be whose own taps stay within the limit.
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
