"""Standardised, FeatureViews: show a detector the size of each feature, and the pattern of a row. Shapes like in lstm.py."""

from __future__ import annotations

import torch
from torch import nn


class Standardised(nn.Module):
    """Features as deviations from their mean in standard deviations, (…, F).

    The symmetric logarithm (Hafner et al. 2023) limits outliers. Until `set_statistics` is called, features are assumed to have
    mean 0 and standard deviation 1.
    """

    mean: torch.Tensor
    inverse: torch.Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("inverse", torch.ones(features))

    def set_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set the mean and standard deviation of each feature, (F,); a feature that never varies becomes 0."""
        self.mean.copy_(mean)
        self.inverse.copy_(torch.where(std > 0, 1 / std, 0))

    def standardised(self, rows_NF: torch.Tensor) -> torch.Tensor:
        """Return the deviations, for rows of any leading shape."""
        deviations_NF = (rows_NF - self.mean) * self.inverse
        return deviations_NF.sign() * deviations_NF.abs().log1p()

    def forward(self, rows_NF: torch.Tensor) -> torch.Tensor:
        """Return the deviations, for rows of any leading shape."""
        return self.standardised(rows_NF)


class FeatureViews(Standardised):
    """Two views of a row of F features side by side, 2F values: the standardised row, and that row layer-normalised.

    LayerNorm (Ba et al. 2016) removes the mean and the scale of a row. That helps if scales differ a hundredfold, like between
    the layers of a language model. But it also removes what a row of few features says; of one feature nothing is left. The
    standardised view keeps the size of each feature, relative to the training split.
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.norm = nn.LayerNorm(features)

    def forward(self, rows_NF: torch.Tensor) -> torch.Tensor:
        """Return both views, (…, 2F), for rows of any leading shape."""
        standardised_NF = self.standardised(rows_NF)
        return torch.cat([standardised_NF, self.norm(standardised_NF)], dim=-1)


def set_statistics(
    model: nn.Module, mean: torch.Tensor, std: torch.Tensor, edges: tuple[torch.Tensor, torch.Tensor] | None = None
) -> None:
    """Give a model the statistics of the features of its steps or nodes, (F,) each, and of its edges, (D,) each, or None."""
    for module in model.modules():
        if isinstance(module, FeatureViews):
            module.set_statistics(mean, std)
        elif isinstance(module, Standardised) and edges is not None:
            module.set_statistics(*edges)
