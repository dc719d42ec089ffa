"""Linear probe: `python eval_linear.py --encoder runs/shapes-simclr-1 --dataset-name shapes`."""

from care_hub.cli import eval_linear

if __name__ == "__main__":
    eval_linear()
