"""k-nearest-neighbour classification of frozen features."""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_scores(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int = 200, temperature: float = 0.5) -> Tensor:
    """Votes (M, classes): each query's k nearest by cosine similarity s vote for their label with e^{s / temperature}.

    `bank` (N, d) with `labels` (N,), `queries` (M, d); k is cut to N. Source: Wu et al. 2018; k = 200, t = 0.5 as in
    the public CARE code. Runs in chunks, so that memory stays bounded.
    """
    bank = F.normalize(bank.float(), dim=1)
    votes = torch.zeros(len(queries), classes, device=bank.device)
    for start in range(0, len(queries), 1024):
        chunk = slice(start, start + 1024)
        similarity, index = (F.normalize(queries[chunk].float(), dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes[chunk].scatter_add_(1, labels[index], (similarity / temperature).exp())
    return votes


def knn_top1(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int = 200, temperature: float = 0.5) -> float:
    """Top-1 accuracy of `knn_scores` in per cent; `truth` (M,)."""
    classes = int(max(labels.max(), truth.max())) + 1
    right = knn_scores(bank, labels, queries, classes, k, temperature).argmax(dim=1) == truth
    return 100 * right.float().mean().item()
