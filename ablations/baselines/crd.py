"""CRD (Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablations.baselines.batch import Batch
from common.models import Taps


class CRD(nn.Module):
    """Contrasts the embeddings of both networks, using memory banks.

    Given a student embedding, the teacher's stored embedding of the same image must be distinguished from those of
    images of other classes, and vice versa (Sec. 3.1). Computes in float32, even under autocast.

    Like the published code, each step gathers copies of the rows that it needs from both banks. These 2 B (1 + m) dim
    floats (1 GiB for 64 images of CIFAR-100) are kept for the backward pass.

    Args:
        c_s, c_t: length of the student's and the teacher's pooled vector.
        labels: [n], of all training images.
        replacement: sample negatives with replacement. Always so if a class has fewer than m images outside it.
        negatives: m, the number per image.
        dim: size of the embeddings.
        momentum: weight of the old row when a bank is updated.

    Attributes:
        bank_s, bank_t: [n, dim], one row per image: random at first, of unit length once the image was in a batch.
        z_s, z_t: normalizers of the scores against each bank; -1 until the first batch sets them.

    Raises:
        ValueError: all images are of one class.
    """

    EPSILON = 1e-7  # added to P + m Pn

    def __init__(
        self,
        c_s: int,
        c_t: int,
        labels: Tensor,
        replacement: bool = False,
        negatives: int = 16384,
        dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ):
        super().__init__()
        labels = labels.cpu()
        n, counts = len(labels), labels.bincount()
        if counts.max() == n:
            raise ValueError("CRD contrasts images of different classes, but all are of one: choose other images")
        self.replacement = replacement or n - counts.max().item() < negatives
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self.embed_s, self.embed_t = nn.Linear(c_s, dim), nn.Linear(c_t, dim)
        bound = (3 / dim) ** 0.5  # for an expected squared length of 1
        for bank in ("bank_s", "bank_t"):
            self.register_buffer(bank, torch.empty(n, dim).uniform_(-bound, bound))
        for z in ("z_s", "z_t"):
            self.register_buffer(z, torch.tensor(-1.0))
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Sum of the losses in both directions; also updates the batch's rows of both banks."""
        rows = torch.cat([batch.index[:, None], self.draw(batch.index, batch.generator)], 1)
        with torch.autocast(rows.device.type, enabled=False):
            v_s = F.normalize(self.embed_s(student.pooled.float()))
            v_t = F.normalize(self.embed_t(teacher.pooled.detach().float()))
            loss = self.contrast(v_s, self.bank_t, self.z_t, rows) + self.contrast(v_t, self.bank_s, self.z_s, rows)
            self.update_bank(self.bank_s, batch.index, v_s)
            self.update_bank(self.bank_t, batch.index, v_t)
        return loss

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """[B] -> [B, m]: negatives for each image, sampled uniformly from the images of other classes."""
        label, shape = self.labels[index, None], (len(index), self.negatives)
        if not self.replacement:
            keys = torch.rand(len(index), len(self.labels), generator=generator, device=index.device)
            return keys.masked_fill(label == self.labels, -1).topk(self.negatives, sorted=False).indices
        # In by_class, the images of a class are the `size` images from position `first` on.
        size, first = self.counts[label], (self.counts.cumsum(0) - self.counts)[label]
        # randint does not support a different bound for each image; float32 is too coarse for a large dataset.
        position = torch.randint(2**62, shape, generator=generator, device=index.device)
        position %= len(self.by_class) - size  # with a bias below 1e-9 for any dataset
        return self.by_class[position + size * (position >= first)]

    def contrast(self, v: Tensor, bank: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        """The loss of embeddings v [B, dim] against `rows` [B, 1 + m] of a bank, the positive first.

        With P = exp(dot / T) / Z, m negatives and Pn = 1 / n, the loss is -log(P / (P + m Pn)) of the positive minus
        the sum of log(m Pn / (P + m Pn)) over the negatives, averaged over the batch. The first batch fixes Z to n
        times its mean exponential.
        """
        copies = bank.index_select(0, rows.flatten()).view(*rows.shape, -1)
        scores = torch.exp((v[:, None] @ copies.mT).squeeze(1) / self.temperature)
        normalizer = torch.where(z < 0, scores.detach().mean() * len(bank), z)
        z.copy_(normalizer)
        positive, negatives = (scores / normalizer).split([1, rows.shape[1] - 1], 1)
        noise = (rows.shape[1] - 1) / len(bank)
        # log1p: P of a negative is far below the noise, and the rounding errors of many negatives would add up.
        negative_loss = torch.log1p((negatives + self.EPSILON) / noise).sum(1)
        return negative_loss.mean() - torch.log(positive / (positive + noise + self.EPSILON)).mean()

    @torch.no_grad()
    def update_bank(self, bank: Tensor, index: Tensor, v: Tensor) -> None:
        """Move rows `index` of a bank towards embeddings v, in place."""
        bank.index_copy_(0, index, F.normalize(self.momentum * bank[index] + (1 - self.momentum) * v))
