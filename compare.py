"""Compare training runs: `detector compare` in a checkout. `python compare.py --help` says how."""

from detector.commands.compare import main

if __name__ == "__main__":
    main()
