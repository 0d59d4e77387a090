"""Top-1 and top-5 accuracy."""

import pytest
import torch
from torch import nn

from common.run.evaluation import evaluate


class Echo(nn.Module):
    """Returns its input as logits; asserts that it is in evaluation mode."""

    def forward(self, x):
        assert not self.training
        return x


def logits_with_label_at_rank(ranks, classes):
    """One row per rank: `rank` classes score higher than the label, 0."""
    rows = [[0.5] + [1.0 + i for i in range(rank)] + [-1.0 - i for i in range(classes - 1 - rank)] for rank in ranks]
    return torch.tensor(rows), torch.zeros(len(ranks), dtype=torch.long)


def test_accuracy_over_batches_of_different_sizes():
    ranks = [0, 0, 1, 4, 5, 9, 0]  # rank 0 is a top-1 hit, ranks 0 to 4 are top-5 hits
    logits, labels = logits_with_label_at_rank(ranks, 10)
    batches = [(logits[:4], labels[:4]), (logits[4:], labels[4:])]
    accuracy = evaluate(Echo().train(), batches)
    assert accuracy == pytest.approx({"top1": 100 * 3 / 7, "top5": 100 * 5 / 7})


def test_top5_is_100_percent_with_fewer_than_five_classes():
    accuracy = evaluate(Echo(), [logits_with_label_at_rank([0, 2], 3)])
    assert accuracy == {"top1": 50.0, "top5": 100.0}
