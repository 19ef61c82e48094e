"""Evaluate a checkpoint with COCO's metrics: `detector eval` in a checkout. `python eval.py --help` says how."""

from detector.commands.evaluate import main

if __name__ == "__main__":
    main()
