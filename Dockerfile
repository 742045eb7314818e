# Two images of one project, with the same make targets inside.
#
#   docker build --target gpu -t dali-pipeline:gpu .   on NVIDIA's PyTorch image: its torch, DALI and NumPy are kept, not replaced
#   docker build --target cpu -t dali-pipeline:cpu .   on plain Python: everything from requirements.txt
#
# Layers from the slowest to change to the fastest: system, packages, project.
ARG NVIDIA_TAG=25.10-py3
ARG PYTHON_TAG=3.11-slim-bookworm

FROM python:${PYTHON_TAG} AS cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --no-install-recommends --yes git make && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PYTHON=python3 PATH=/app/.venv/bin:$PATH
WORKDIR /app
COPY Makefile requirements.txt requirements-base.txt requirements-frameworks.txt requirements-cuda12.txt requirements-cuda13.txt requirements-dev.txt requirements-demo.txt ./
RUN make .venv/.installed
COPY . .
RUN make .venv/.ready && python -m dali_pipeline versions
RUN useradd --create-home --uid 10001 trainer && mkdir -p data runs && chown trainer: . data runs
USER 10001
ENTRYPOINT ["python", "train.py"]
CMD ["--help"]

FROM nvcr.io/nvidia/pytorch:${NVIDIA_TAG} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# PIP_CONSTRAINT: the image pins what it was tested with; what we add lies in an environment of its own, and shadows nothing of torch
ENV PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT="" PYTHON=python3 FRAMEWORKS=image PATH=/app/.venv/bin:$PATH
WORKDIR /app
COPY Makefile requirements.txt requirements-base.txt requirements-frameworks.txt requirements-cuda12.txt requirements-cuda13.txt requirements-dev.txt requirements-demo.txt ./
RUN make .venv/.installed
COPY . .
RUN make .venv/.ready && python -m dali_pipeline versions
RUN useradd --create-home --uid 10001 trainer && mkdir -p data runs && chown trainer: . data runs
USER 10001
ENTRYPOINT ["python", "train.py"]
CMD ["--help"]
