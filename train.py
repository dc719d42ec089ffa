"""Train CARE: `accelerate launch train.py`, `python train.py`, or `torchrun --nproc_per_node 2 train.py`."""

from care_hub.cli import train

if __name__ == "__main__":
    train()
