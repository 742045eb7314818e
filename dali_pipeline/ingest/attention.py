"""Attention graphs: tokens as nodes, attention above a threshold as edges."""

from __future__ import annotations

import torch


def attention_edges(attention: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Edges of B attention maps at once, no loop over tokens.

    attention: (B, n, n), mean over heads, row i holding what token i attends to. An edge runs from j to i where j <= i and
    the weight is above `threshold`. Returns edge_index (2, E) int64 local to each map, weights (E,) in the type given, and
    edge_counts (B,) int64; edges are ordered by map, then i, then j. Costs a few passes over the maps.
    """
    chosen = (attention > threshold).tril()
    batch, target, origin = chosen.nonzero(as_tuple=True)
    counts = torch.bincount(batch, minlength=len(attention))
    return torch.stack([origin, target]), attention[batch, target, origin], counts
