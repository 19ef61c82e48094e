"""Compare training runs: `detector compare` in a checkout. `python compare.py --help` says how."""

from detector.commands.programs import compare

if __name__ == "__main__":
    compare()
