"""Detect objects in images: `detector predict` in a checkout. `python predict.py --help` says how."""

from detector.commands.predict import main

if __name__ == "__main__":
    main()
