"""Several networks that answer as one."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def combined(logits: Tensor) -> Tensor:
    """Logits of m networks [m, n, k] -> the logarithm of their mean probabilities [n, k], which are logits, too.

    A deep ensemble (Lakshminarayanan et al. 2017) averages probabilities, so that no member's confidence outweighs the
    others' as in a mean of logits.
    """
    return torch.logsumexp(torch.log_softmax(logits, -1), 0) - math.log(len(logits))


class Ensemble(nn.Module):
    """Networks of one architecture whose answers are combined."""

    def __init__(self, members: Iterable[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def networks(self) -> list[nn.Module]:
        """The members."""
        return list(self.members)

    def forward(self, images: Tensor) -> Tensor:
        """Network input [n, 3, s, s] -> logits [n, k]."""
        return combined(torch.stack([member(images).float() for member in self.members]))
