"""Train a detector: `detector train` in a checkout. `python train.py --help` says how."""

from detector.commands.train import main

if __name__ == "__main__":
    main()
