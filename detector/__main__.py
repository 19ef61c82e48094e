"""`python -m detector COMMAND ...`: the command `detector`, for torchrun and for checkouts that are not installed."""

import sys

from detector.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
