"""Attention graphs: tokens as nodes, attention above a threshold as edges."""

from __future__ import annotations

import numpy as np

from dali_pipeline.types import Array


def attention_edges(attention: Array, threshold: float) -> tuple[Array, Array, Array]:
    """Return the edges of B attention maps; has no loop over tokens, and costs a few passes over the maps.

    An edge goes from token j to token i if j <= i and the weight is above `threshold`.

    Args:
        attention: (B, n, n), the mean over heads; row i holds the weights with which token i attends to each token.
        threshold: Weight that an edge must exceed.

    Returns:
        edge_index (2, E) int64, numbered within each map; weights (E,) in the type of `attention`; edge_counts (B,) int64.
        Edges are ordered by map, then i, then j.
    """
    batch, target, origin = np.nonzero(np.tril(attention > threshold))
    counts = np.bincount(batch, minlength=len(attention))
    return np.stack([origin, target]), attention[batch, target, origin], counts
