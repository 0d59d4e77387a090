"""The interface of networks in FCFD: N stages and a classifier (Sec. 2)."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Taps(NamedTuple):
    """What the methods in ablations/baselines compare, from one forward pass (`StagedNet.taps`).

    Attributes:
        features: [f^2, ..., f^N], one per stage without the stem; see `StagedNet.tap`.
        last: F^N after ReLU, which the classifier pools, [B, C_N, H, W].
        pooled: the input of the classifier's linear layer, [B, C_N].
        logits: [B, num_classes].
    """

    features: list[Tensor]
    last: Tensor
    pooled: Tensor
    logits: Tensor


class StagedNet(nn.Module, ABC):
    """A network M = C . M^N . ... . M^1 whose intermediate features F^k = M^k(F^(k-1)) can be exchanged.

    Subclasses set the first two attributes and implement `stage` and `classifier_layer`.

    Attributes:
        num_stages: N; the stem is stage 1.
        post_relu: whether the features F^k are outputs of a ReLU. If so, bridges into the network end in a leaky ReLU.
        projected: whether stage N ends with SimKD's projector into the teacher's feature space (common/simkd.py).
    """

    num_stages: int
    post_relu: bool
    projected: bool = False

    @abstractmethod
    def stage(self, k: int, x: Tensor) -> Tensor:
        """M^k: F^(k-1) -> F^k [B, C_k, H_k, W_k] for k = 1..N; F^0 is the image batch [B, 3, H, W]."""

    @property
    @abstractmethod
    def classifier_layer(self) -> nn.Module:
        """The layer after pooling, [B, C_N] -> [B, num_classes]; its attribute name depends on the network."""

    def classify(self, feature: Tensor) -> Tensor:
        """C: F^N [B, C_N, H_N, W_N] -> logits [B, num_classes]. Its ReLU is a no-op on post-ReLU features."""
        return self.classifier_layer(pool(feature))

    def features(self, x: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> [F^1, ..., F^N]."""
        out = []
        for k in range(1, self.num_stages + 1):
            x = self.stage(k, x)
            out.append(x)
        return out

    def tap(self, k: int, x: Tensor, pre_relu: bool) -> tuple[Tensor, Tensor]:
        """Run stage k: (f^k, F^k). Other methods compare f^k, before the stage's last ReLU if `pre_relu`.

        Where their published code reads another tensor than F^k, such as the input of a final convolution, f^k is that
        tensor.

        Raises:
            ValueError: the network does not provide its features before the ReLU.
        """
        x = self.stage(k, x)
        if self.post_relu and pre_relu:
            raise ValueError(f"{type(self).__name__} does not provide its features before the ReLU")
        return (x if self.post_relu or pre_relu else F.relu(x)), x

    def taps(self, x: Tensor, pre_relu: bool = False) -> Taps:
        """Images [B, 3, H, W] -> features and outputs. Not used by FCFD."""
        features, x = [], self.stage(1, x)
        for k in range(2, self.num_stages + 1):
            feature, x = self.tap(k, x, pre_relu)
            features.append(feature)
        pooled = pool(x)
        return Taps(features, F.relu(x), pooled, self.classifier_layer(pooled))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, num_classes]."""
        return self.classify(self.features(x)[-1])


def pool(feature: Tensor) -> Tensor:
    """ReLU and global average pooling, the first step of every classifier here: [B, C, H, W] -> [B, C]."""
    return torch.flatten(F.adaptive_avg_pool2d(F.relu(feature), 1), 1)


def tap_last(x: Tensor, pre_relu: bool) -> tuple[Tensor, Tensor]:
    """`StagedNet.tap` of a stage whose last block outputs x before its ReLU."""
    after = F.relu(x)
    return (x if pre_relu else after), after


def init_fan_out(net: nn.Module) -> None:
    """Initialize convolutions with Kaiming normal, fan_out: standard deviation sqrt(2 / (k^2 C_out)), zero bias."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_classifier(layer: nn.Linear) -> None:
    """Initialize a classifier with standard deviation 0.01 and zero bias (VGG, MobileNetV2)."""
    nn.init.normal_(layer.weight, 0, 0.01)
    nn.init.zeros_(layer.bias)
