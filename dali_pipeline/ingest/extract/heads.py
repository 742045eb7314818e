"""Figures of every attention head: the lookback ratio and the largest eigenvalues of the attention's Laplacian.

B: prompts; H: heads; R: rows, the tokens that attend; C: columns, the tokens attended to, which end with those of the rows; K:
eigenvalues.
Rows behind the end of a prompt are padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Received(NamedTuple):
    """Attention among the tokens of a prefix, whose rows are not in an attention map.

    total: (H, P) attention that each token receives. own: (H, P) attention of each token to itself.
    """

    total: torch.Tensor
    own: torch.Tensor

    @classmethod
    def of(cls, attention_HPP: torch.Tensor) -> Received:
        """Return the sums of an attention map of the prefix alone."""
        return cls(attention_HPP.sum(-2), attention_HPP.diagonal(dim1=-2, dim2=-1))


def lookback_ratio(attention_BHRC: torch.Tensor, prompt_B: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
    """Return the lookback ratio of each head (Chuang et al. 2024), the mean over the answer's tokens, (B, H).

    For a token it is the mean attention to the prompt's tokens, divided by that plus the mean attention to the answer's tokens
    so far, itself included.

    Args:
        attention_BHRC: Attention; row r is the token C - R + r.
        prompt_B: Number of tokens of each prompt.
        length_B: Number of tokens of each prompt with its answer.
    """
    rows, columns = attention_BHRC.shape[-2:]
    column_C = torch.arange(columns, device=attention_BHRC.device)
    row_R = column_C[columns - rows :]
    is_prompt_BC = (column_C < prompt_B[:, None]).to(attention_BHRC.dtype)
    is_answer_BR = (row_R >= prompt_B[:, None]) & (row_R < length_B[:, None])
    answered_BR = (row_R + 1 - prompt_B[:, None]).clamp(min=1)
    prompt_BHR = torch.einsum("bhrc,bc->bhr", attention_BHRC, is_prompt_BC) / prompt_B[:, None, None]
    answer_BHR = torch.einsum("bhrc,bc->bhr", attention_BHRC, 1 - is_prompt_BC) / answered_BR[:, None]
    ratio_BHR = prompt_BHR / (prompt_BHR + answer_BHR).clamp(min=torch.finfo(attention_BHRC.dtype).tiny)
    counted_BR = is_answer_BR.to(attention_BHRC.dtype)
    return (ratio_BHR * counted_BR[:, None]).sum(-1) / counted_BR.sum(-1)[:, None]


def laplacian_eigenvalues(
    attention_BHRC: torch.Tensor, length_B: torch.Tensor, count: int, before: Received | None = None
) -> torch.Tensor:
    """Return the largest eigenvalues of each head's Laplacian (Binkowski et al. 2025), largest first, (B, H, K).

    The Laplacian is D - A, where D holds the mean attention that a token receives from the tokens that can attend to it, itself
    included. For causal attention it is triangular, so its eigenvalues are its diagonal. Of fewer tokens than K the rest is 0.

    Args:
        attention_BHRC: Attention; row r is the token C - R + r.
        length_B: Number of tokens of each prompt with its answer.
        count: K.
        before: Attention among the first C - R tokens, if there are any.
    """
    rows, columns = attention_BHRC.shape[-2:]
    column_C = torch.arange(columns, device=attention_BHRC.device)
    is_real_BR = (column_C[columns - rows :] < length_B[:, None]).to(attention_BHRC.dtype)
    received_BHC = torch.einsum("bhrc,br->bhc", attention_BHRC, is_real_BR)
    own_BHC = attention_BHRC.diagonal(columns - rows, dim1=-2, dim2=-1)
    if before is not None:
        received_BHC[..., : columns - rows] += before.total
        own_BHC = torch.cat([before.own.expand(len(own_BHC), -1, -1), own_BHC], dim=-1)
    left_BC = length_B[:, None] - column_C
    eigenvalue_BHC = received_BHC / left_BC.clamp(min=1)[:, None] - own_BHC
    eigenvalue_BHC = eigenvalue_BHC.masked_fill(left_BC[:, None] < 1, -torch.inf)
    largest_BHK = eigenvalue_BHC.topk(min(count, columns), dim=-1).values
    largest_BHK = largest_BHK.masked_fill(largest_BHK == -torch.inf, 0)
    return torch.nn.functional.pad(largest_BHK, (0, count - largest_BHK.shape[-1]))
