"""Attention graphs: tokens as nodes, attention above a threshold as edges."""

from __future__ import annotations

import numpy as np

from dali_pipeline.types import Array


def attention_edges(attention: Array, threshold: float) -> tuple[Array, Array, Array]:
    """Edges of B attention maps at once, no loop over tokens.

    attention: (B, n, n), mean over heads, row i holding what token i attends to. An edge runs from j to i where j <= i and
    the weight is above `threshold`. Returns edge_index (2, E) int64 local to each map, weights (E,) in the type given, and
    edge_counts (B,) int64; edges are ordered by map, then i, then j. Costs a few passes over the maps.
    """
    batch, target, origin = np.nonzero(np.tril(attention > threshold))
    counts = np.bincount(batch, minlength=len(attention))
    return np.stack([origin, target]), attention[batch, target, origin], counts
