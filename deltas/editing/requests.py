"""What a delta asks of the training: a look at the data, a penalty, a schedule, a rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from deltacontrol.deltas.editing.control_tree import ControlTree

# Losses of the model under control, each with its graph: of batches, or of single examples where a
# quantity is defined by them; anew at each call.
Losses = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Preparation:
    """A look at the data before the training.

    Attributes:
        act: is called with the losses.
        examples: each loss has to be that of one example alone. Otherwise it may be the mean loss
            of a batch, which takes one pass instead of many.
    """

    act: Callable[[Losses], None]
    examples: bool


class Requests:
    """What the deltas on one model ask of the training, each with the namespace of its delta.

    Args:
        controls: of the model.

    Attributes:
        namespace: of the delta that asks.
        preparations: what wants to see the data before the training.
        preparing: such a look is going on, so that a delta that waits for its own lets the model
            pass as it is.
        penalties: what is added to the loss.
        after_step: what is called after an update.
        rate_factors: control parameter -> factor on its learning rate.
    """

    def __init__(self, controls: ControlTree) -> None:
        self._controls = controls
        self.namespace = ""
        self.preparations: list[tuple[str, Preparation]] = []
        self.preparing = False
        self.penalties: list[tuple[str, Callable[[], Tensor]]] = []
        self.after_step: list[tuple[str, Callable[[int, int], bool | None]]] = []
        self.rate_factors: dict[str, float] = {}

    def on_data(self, prepare: Callable[[Losses], None], *, examples: bool = True) -> None:
        """Call ``prepare(losses)`` before training: for controls that depend on the data.

        Args:
            prepare: may run through the losses as often as it likes.
            examples: whether it needs the loss of each example alone, as a Fisher information does;
                a mean gradient or the states of a pass are the same from batches.
        """
        self.preparations.append((self.namespace, Preparation(prepare, examples)))

    @contextmanager
    def looking(self) -> Iterator[Requests]:
        """Says inside that preparations look at the data."""
        self.preparing = True
        try:
            yield self
        finally:
            self.preparing = False

    def add_penalty(self, penalty: Callable[[], Tensor]) -> None:
        """Add a scalar to the training loss."""
        self.penalties.append((self.namespace, penalty))

    def on_step(self, act: Callable[[int, int], bool | None]) -> None:
        """Call ``act(step, num_steps)`` after update ``step`` (from 1); gradients still stand.

        It returns true where it has put the controls elsewhere, so that the training should forget
        the optimiser's moments and its best evaluation.
        """
        self.after_step.append((self.namespace, act))

    def scale_rate(self, controller: nn.Module, leaf: str, factor: float) -> None:
        """Train the parameter ``leaf`` of a controller at ``factor`` times the learning rate."""
        parameter = controller.get_parameter(leaf)
        owners = self._controls.named_parameters()
        self.rate_factors[next(name for name, p in owners if p is parameter)] = factor
