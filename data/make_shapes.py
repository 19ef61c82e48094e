"""Generate the shapes data set: `detector shapes` in a checkout. `python data/make_shapes.py --help` says how."""

from detector.commands.make_shapes import main

if __name__ == "__main__":
    main()
