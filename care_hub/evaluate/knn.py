"""k-nearest-neighbour accuracy of frozen features."""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_top1(
    bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int = 200, temperature: float = 0.5, chunk: int = 1024
) -> float:
    """Weighted kNN classification: cosine similarity s, votes e^{s / temperature}; top-1 accuracy in per cent.

    `bank` (N, d) with `labels` (N,), `queries` (M, d) with `truth` (M,). k = 200, t = 0.5 as in the public CARE code
    (weighting: Wu et al. 2018). k is cut to N.
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    classes = int(max(labels.max(), truth.max())) + 1
    k = min(k, len(bank))
    right = 0
    for start in range(0, len(queries), chunk):
        similarity, index = (queries[start : start + chunk] @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(index), classes, device=bank.device)
        votes.scatter_add_(1, labels[index], (similarity / temperature).exp())
        right += int((votes.argmax(dim=1) == truth[start : start + chunk]).sum())
    return 100 * right / len(queries)
