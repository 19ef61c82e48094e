# GPU:  docker build -t detector --build-arg UID=$(id -u) .
#       docker run --gpus all -e NPROC=gpu -v $PWD/data:/app/data -v $PWD/runs:/app/runs --shm-size 8g detector experiment=...
# CPU:  docker build -t detector-cpu --build-arg UID=$(id -u) --build-arg BASE=python:3.12-slim .
#       (--build-arg PIP_ARGS="--index-url <index of CPU wheels>" makes a much smaller image)
# PyTorch's wheels bring CUDA along; the base only has to be an Ubuntu or Debian with Python >= 3.11. The compiler is for
# Triton and torch.compile, which build at run time. UID: --build-arg UID=$(id -u) lets the container write into your folders.
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

ARG PIP_ARGS=""
ARG UID=10001
ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && useradd --create-home --non-unique --uid ${UID} detector

WORKDIR /app
# The dependencies first: this layer is kept as long as the versions stay.
COPY pyproject.toml constraints.txt README.md ./
COPY detector/__init__.py detector/__init__.py
RUN pip install ${PIP_ARGS} -e . -c constraints.txt
COPY --chown=detector:detector . .
RUN mkdir -p data runs && chown detector:detector /app data runs
USER detector

# NPROC: processes on this machine, a number or "gpu" for one per GPU.
ENV NPROC=1
ENTRYPOINT ["tini", "--", "sh", "-c", "exec torchrun --standalone --nproc-per-node=$NPROC train.py \"$@\"", "train"]
