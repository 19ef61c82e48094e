"""Train a detector: `detector train` in a checkout. `python train.py --help` says how."""

from detector.commands.programs import train

if __name__ == "__main__":
    train()
