"""Seconds and memory of the exact weighted kNN of `care_hub.measures` on random features.

python benchmarks/knn.py --bank 50000 --queries 10000 --dim 512
"""

import json
import resource
import time

import click
import torch

from care_hub.measures import knn_scores


@click.command()
@click.option("--bank", default=50000, show_default=True)
@click.option("--queries", default=10000, show_default=True)
@click.option("--dim", default=512, show_default=True)
def main(bank: int, queries: int, dim: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, q, y = torch.randn(bank, dim, device=device), torch.randn(queries, dim, device=device), torch.arange(bank, device=device) % 100
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(3):
        began = time.perf_counter()
        knn_scores(x, y, q, 100).sum().item()
        times.append(round(time.perf_counter() - began, 2))
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    row = {"bank": bank, "queries": queries, "dim": dim, "device": str(device), "threads": torch.get_num_threads()}
    print(json.dumps(row | {"seconds": sorted(times)[1], "memory_beyond_features_mib": round(more)}))


if __name__ == "__main__":
    main()
