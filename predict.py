"""Detect objects in images: `detector predict` in a checkout. `python predict.py --help` says how."""

from detector.commands.programs import predict

if __name__ == "__main__":
    predict()
