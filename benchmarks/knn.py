"""Seconds and memory of the exact weighted kNN of `care_hub.metrics` on random features.

python benchmarks/knn.py --bank 50000 --queries 10000 --dim 512
"""

import json
import resource
import statistics
import time

import click
import torch

from care_hub.metrics import knn_scores


def memory_mib() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@click.command()
@click.option("--bank", default=50000, show_default=True)
@click.option("--queries", default=10000, show_default=True)
@click.option("--dim", default=512, show_default=True)
def main(bank: int, queries: int, dim: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features, labels = torch.randn(bank, dim, device=device), torch.arange(bank, device=device) % 100
    queried = torch.randn(queries, dim, device=device)
    before, times = memory_mib(), []
    for _ in range(3):
        began = time.perf_counter()
        knn_scores(features, labels, queried, 100).sum().item()
        times.append(time.perf_counter() - began)
    row = {
        "bank": bank,
        "queries": queries,
        "dim": dim,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seconds": round(statistics.median(times), 2),
        "memory_beyond_features_mib": round(memory_mib() - before),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
