"""Choose a model and a mesh, plan, print the plan, train or resume: `python train.py --help`."""

import sys

from piperjax.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
