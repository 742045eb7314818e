"""train.py and predict.py, as someone calls them."""

from __future__ import annotations

import sys

import pytest

import predict as predict_module
import train as train_module
from dali_pipeline.cli.app import run


def train(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return run(train_module.app, "train.py")


def predict(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
    return run(predict_module.app, "predict.py")
