"""Train a model: `torchrun --nproc_per_node=4 -m fer_dist.train --config vit --data fer2013.csv`.

Alone: `python -m fer_dist.train`. Without --data it trains on the embedded drawn faces.
"""

import sys

from fer_dist.commandline import parse, run

ABOUT = "Train a facial-expression classifier. Under torchrun, on all its ranks; alone, as one process."


def train() -> None:
    """Parse, join, fit, close."""
    config = parse(sys.argv[1:], prog="python -m fer_dist.train", about=ABOUT)
    from fer_dist.engine.trainer import fit

    fit(config)


def main() -> None:
    run(train)


if __name__ == "__main__":
    main()
