"""The classifier that judges nano's pictures really learns, from a small data set drawn here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tools.nano.classifier import UNSEEN, Classifier, held_out_accuracy, train_classifier
from tools.nano.scenes import STYLES, Subject

TRAINED = 8  # subjects


@pytest.fixture(scope="module")
def trained(data: Path, subjects: list[Subject]) -> Iterator[Classifier]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train_classifier(data, subjects[:TRAINED], steps=80, views=8, batch=32)
    torch.set_num_threads(threads)


def test_a_little_training_is_better_than_chance_and_what_is_held_out_is_told(data: Path, trained: Classifier) -> None:
    rows = held_out_accuracy(trained, data, views=4)
    assert set(rows) == {*STYLES, UNSEEN}
    assert sum(row["top-1"] for row in rows.values()) / len(rows) > 2 / TRAINED, rows
    assert sum(rows[style]["style"] for style in STYLES) / len(STYLES) > 0.5, rows
    assert "style" not in rows[UNSEEN]
