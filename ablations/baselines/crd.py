"""CRD (Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models import pool
from common.run.errors import UserError


class CRD(nn.Module):
    """Embeddings of both networks, contrasted with one another through memory banks.

    The student's embedding of an image must be told from noise among the teacher's stored ones, and the teacher's among
    the student's (Sec. 3.1). In float32, whatever autocast says.

    Args:
        c_s, c_t: channels of F^N of student and teacher.
        labels: [n], of all training images.
        negatives: m, how many each image is told from.
        dim: of the embeddings.
        momentum: the share of the old row in a new one.

    Attributes:
        bank_s, bank_t: [n, dim], a row for each image: random at first, of length 1 once the image was seen.
        z_s, z_t: what scores against either bank are divided by; -1 until the first batch has set it.

    Raises:
        UserError: all images are of one class.
    """

    EPSILON = 1e-7  # beside P + m Pn

    def __init__(
        self,
        c_s: int,
        c_t: int,
        labels: Tensor,
        negatives: int = 16384,
        dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ):
        super().__init__()
        labels = labels.cpu()
        n, counts = len(labels), labels.bincount()
        if counts.max() == n:
            raise UserError("CRD contrasts images of different classes, and all are of one: choose other images")
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self.embed_s, self.embed_t = nn.Linear(c_s, dim), nn.Linear(c_t, dim)
        bound = (3 / dim) ** 0.5  # for a mean square length of 1
        for bank in ("bank_s", "bank_t"):
            self.register_buffer(bank, torch.empty(n, dim).uniform_(-bound, bound))
        for z in ("z_s", "z_t"):
            self.register_buffer(z, torch.tensor(-1.0))
        # Sorted by class, an image's own class is a block of `size` images from place `first` on.
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)
        self.register_buffer("first", (counts.cumsum(0) - counts)[labels], persistent=False)
        self.register_buffer("size", counts[labels], persistent=False)

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """[B] -> [B, m]: for each image others of other classes, uniformly and independently, with replacement.

        Noise-contrastive estimation assumes independent draws. (The authors' code draws without replacement where
        there are enough images.) Nothing waits for the device, which is the generator's too.
        """
        first, size = self.first[index, None], self.size[index, None]
        shape = (len(index), self.negatives)
        # The bound is another one for each image, which randint cannot do; float32 would be too coarse for a large set.
        place = torch.randint(2**62, shape, generator=generator, device=index.device)
        place %= len(self.by_class) - size  # its bias is below 1e-9 for any set
        return self.by_class[place + size * (place >= first)]

    def forward(self, feature_s: Tensor, feature_t: Tensor, index: Tensor, negatives: Tensor) -> Tensor:
        """The sum of both directions' losses; then the batch's rows of both banks are moved.

        Args:
            feature_s, feature_t: F^N of each network, [B, C, H, W]; the teacher's is detached.
            index: [B], which training images these are, each at most once.
            negatives: [B, m], from `draw`.
        """
        with torch.autocast(index.device.type, enabled=False):
            v_s = F.normalize(self.embed_s(pool(feature_s.float())))
            v_t = F.normalize(self.embed_t(pool(feature_t.detach().float())))
            rows = torch.cat([index[:, None], negatives], 1)
            loss = self.contrast(v_s, self.bank_t, self.z_t, rows) + self.contrast(v_t, self.bank_s, self.z_s, rows)
            self.remember(self.bank_s, index, v_s)
            self.remember(self.bank_t, index, v_t)
        return loss

    def contrast(self, v: Tensor, bank: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        """The loss of embeddings v [B, dim] against `rows` [B, 1 + m] of a bank, the right one first.

        With P = exp(dot / T) / Z, m negatives, Pn = 1 / n: - log(P(right) / (P(right) + m Pn)) - the sum over the
        negatives of log(m Pn / (P + m Pn)), batch mean. The first batch fixes Z = n times its mean exponential.
        """
        # The products with the whole bank take less memory than a copy of all those rows. Backward needs the bank as it
        # is now.
        scores = torch.exp((v @ bank.clone().T).gather(1, rows) / self.temperature)
        fixed = torch.where(z < 0, scores.detach().mean() * len(bank), z)
        z.copy_(fixed)
        positive, negatives = (scores / fixed).split([1, rows.shape[1] - 1], 1)
        noise = (rows.shape[1] - 1) / len(bank)
        # log1p: P of a negative is far below the noise, and there are many whose rounding would add up.
        of_negatives = torch.log1p((negatives + self.EPSILON) / noise).sum(1)
        return of_negatives.mean() - torch.log(positive / (positive + noise + self.EPSILON)).mean()

    @torch.no_grad()
    def remember(self, bank: Tensor, index: Tensor, v: Tensor) -> None:
        """Move rows `index` of a bank, in place, towards embeddings v."""
        bank.index_copy_(0, index, F.normalize(self.momentum * bank[index] + (1 - self.momentum) * v))
