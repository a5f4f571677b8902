"""Starts of LoRA's factors that follow from data: what each looks at, and what it makes of it.

Notation: W (out, in) is the map at a site and x (n, in) are the rows that go into it, padding left
out; L is the mean of the losses and G = ∂L/∂W (out, in) its gradient, G = U S V' with the singular
values in descending order; r is the rank, s the factor on B A, γ a number that sets the size: 16
for LoRA-GA and 128 for LoRA-One, as in their authors' code.

    EVA        A = V_r', B = 0; V_r (in, r) are the first r principal directions of the rows x
    CorDA      C = Σ x x', W C = U S V';  B = U √(S/s), A = √(S/s) V' C⁻¹ at r of the components:
               the largest (instruction-previewed) or the smallest (knowledge-preserved)
    LoRA-GA    A = c V_{1…r}', B = c U_{r+1…2r}, c = out^(1/4)/√γ
    LoRA-One   A = √(S_r/(γ S_1)) V_r', B = -U_r √(S_r/(γ S_1))

A gradient needs the memory of one weight for each site, moments of the rows that of in² numbers in
float64. Both are sums over batches; nothing of a batch is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.requests import Losses
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.theory.errors import InputError

Factors = tuple[Tensor, Tensor]  # A (r, in) and B (out, r), in float64
DAMPING = 0.01  # of C, in units of its mean diagonal entry; as in the authors' code of CorDA
# Keys and values of an attention to another text, in a decoder: their input is the encoder's.
_OTHER_TEXT = re.compile(r"(cross|encoder_attn|encdec).*\.(k|v|key|value)(_proj)?$", re.IGNORECASE)


class Waiting(Protocol):
    """A path whose factors are zero until data have been seen."""

    A: nn.Parameter
    started: Tensor | None

    def start(self, down: Tensor, up: Tensor) -> None:
        """Put the factors in place."""
        ...

    def forget_start(self) -> None:
        """Make them zero again."""
        ...


class Moments:
    """Number, mean and scatter Σ (x - mean)(x - mean)' of rows, in float64, batch by batch."""

    def __init__(self, width: int, like: Tensor) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=like.device)
        self.scatter = self.mean.new_zeros(width, width)
        self.eps = torch.finfo(like.dtype).eps

    def add(self, rows: Tensor) -> None:
        """Take rows (n, width) in; the formula for joint moments of two samples."""
        if not len(rows):
            return
        rows = rows.detach().double()
        mean = rows.mean(0)
        centred, apart = rows - mean, mean - self.mean
        total = self.count + len(rows)
        self.scatter.addmm_(centred.T, centred)
        self.scatter.addr_(apart, apart, alpha=self.count * len(rows) / total)
        self.mean += apart * (len(rows) / total)
        self.count = total

    def about_zero(self) -> Tensor:
        """Σ x x'."""
        return self.scatter + self.count * torch.outer(self.mean, self.mean)


def eva(site: Site, moments: Moments, rank: int) -> Factors:
    """A: the directions of the largest variance of a site's inputs; B: zero.

    Raises:
        InputError: the inputs vary in fewer than ``rank`` directions.
    """
    values, vectors = torch.linalg.eigh(moments.scatter)
    # A direction without variance shows that of rounding: eps² of the rows', eps of the sum's.
    rounding = max((len(values) * moments.eps) ** 2, len(values) * torch.finfo(values.dtype).eps)
    known = int((values > values[-1].clamp_min(0) * rounding).sum())
    _require(site, rank, known, "the inputs vary in", "eva", rank)
    down = vectors[:, -rank:].flip(1).T
    signs = down.gather(1, down.abs().argmax(1, keepdim=True)).sign()
    return down * signs, down.new_zeros(site.out_features, rank)


def corda(
    site: Site, moments: Moments, weight: Tensor, rank: int, scale: float, mode: str
) -> Factors:
    """Factors of s·B A = U S V' C⁻¹ at the largest ("ipm") or smallest ("kpm") components.

    C is taken with a mean diagonal entry of one, which leaves B A as it is and settles how the
    size is divided between both, and with `DAMPING` added to its diagonal, which makes it
    invertible whatever the rows span.

    Raises:
        InputError: all inputs are zero.
    """
    second = moments.about_zero()
    size = float(second.diagonal().mean())
    if not size > 0:
        raise InputError(
            f"lora: the inputs of {site.path} are all zero, so init=corda-{mode} has nothing to "
            "orient its weight by; show other rows, or choose other sites."
        )
    second /= size
    second.diagonal().add_(DAMPING)
    left, values, right = torch.linalg.svd(site.rows(weight.detach()).double() @ second, False)
    taken = slice(rank) if mode == "ipm" else slice(len(values) - rank, None)
    roots = (values[taken] / scale).sqrt()
    down = torch.linalg.solve(second, right[taken], left=False)
    return roots[:, None] * down, left[:, taken] * roots


def lora_ga(site: Site, gradient: Tensor, rank: int, gamma: float = 16.0) -> Factors:
    """The first r right and the next r left singular vectors of G, times out^(1/4)/√γ.

    Raises:
        InputError: the gradient's rank is below 2 r.
    """
    left, _, right = _decomposed(site, gradient, 2 * rank, "lora-ga", rank)
    size = site.out_features**0.25 / gamma**0.5
    return size * right[:rank], size * left[:, rank : 2 * rank]


def lora_one(site: Site, gradient: Tensor, rank: int, gamma: float = 128.0) -> Factors:
    """B A = -G_r/(γ S_1), G_r the best approximation of G of rank r, both factors alike in size.

    Raises:
        InputError: the gradient's rank is below r.
    """
    left, values, right = _decomposed(site, gradient, rank, "lora-one", rank)
    roots = (values[:rank] / (gamma * values[0])).sqrt()
    return roots[:, None] * right[:rank], -left[:, :rank] * roots


def _decomposed(
    site: Site, gradient: Tensor, needed: int, init: str, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    rounding = max(gradient.shape) * torch.finfo(gradient.dtype).eps
    known = int((values > values[0] * rounding).sum())
    _require(site, needed, known, "the gradient has", init, rank)
    return left, values, right


def _require(site: Site, needed: int, known: int, what: str, init: str, rank: int) -> None:
    if known < needed:
        most = known * rank // needed
        tried = f"a rank of at most {most}, more rows" if most else "more rows"
        raise InputError(
            f"lora: {what} {known} directions at {site.path}, but init={init} with rank {rank} "
            f"needs {needed}; try {tried}, or other sites."
        )


class _Listening(torch.autograd.Function):
    """Passes a site's output on, and adds g'x to a total when its gradient g comes back."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, output: Tensor, _asked: Tensor, x: Tensor, watch: GradientSum
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.watch = watch
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        ctx.watch.add(gradient, *ctx.saved_tensors)
        return gradient, torch.zeros(()), None, None


class GradientSum:
    """Σ ∂loss/∂W of a site, (out, in), also where W itself is frozen or in few bits."""

    def __init__(self, site: Site, like: Tensor) -> None:
        self.site = site
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        self.total = torch.zeros(
            site.out_features, site.in_features, dtype=dtype, device=like.device
        )

    def add(self, gradient: Tensor, x: Tensor) -> None:
        """Add g'x for the gradient g of the module's output, and its input x."""
        mine = self.site.take(gradient).flatten(0, -2).to(self.total.dtype)
        self.total.addmm_(mine.T, x.flatten(0, -2).to(self.total.dtype))


class TextRows:
    """Takes the rows of a site's input that are text, by the masks that the present pass has.

    Where a pass has no mask that fits, every row counts.

    Attributes:
        listening: whether the arguments of passes are kept.
    """

    def __init__(self, host: Host) -> None:
        self._names = list(signature(type(host.model).forward).parameters)[1:]
        self._given: dict[str, Any] = {}
        self.listening = False
        self._both = bool(getattr(host.model.config, "is_encoder_decoder", False))
        encoder = host.model.get_encoder() if self._both else None
        self._encoder = set() if encoder is None else {id(m) for m in encoder.modules()}
        host.on_call(host.model, self._note)

    def _note(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._given = dict(zip(self._names, args, strict=False)) | kwargs if self.listening else {}
        return args, kwargs

    def __call__(self, site: Site, x: Tensor) -> Tensor:
        """The rows (n, in) of x (…, in)."""
        reads_encoder = id(site.module) in self._encoder or _OTHER_TEXT.search(site.path)
        own = "decoder_attention_mask" if self._both and not reads_encoder else "attention_mask"
        mask = self._given.get(own)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return x.flatten(0, -2)
        more = x.shape[1] - mask.shape[1] if x.dim() == 3 else 0
        mask = pad(mask.bool(), (max(more, 0), 0), value=True)  # what deltas put before the text
        if mask.numel() != x.shape[:-1].numel() or (x.dim() == 3 and mask.shape != x.shape[:2]):
            return x.flatten(0, -2)
        return x.flatten(0, -2)[mask.flatten()]


class DataStart:
    """Lets the paths of one delta start at factors that its sites' gradients or inputs give.

    Until then they add nothing, and a pass in which they would be trained is refused.

    Args:
        name: the delta's name, for messages.
        host: the model.
        by_gradient: whether a site's factors follow from its gradient, or else from its inputs.
        factors: a site and its gradient (out, in), or its `Moments` -> A and B.
    """

    def __init__(
        self,
        name: str,
        host: Host,
        *,
        by_gradient: bool,
        factors: Callable[[Site, Any], Factors],
    ) -> None:
        self._name, self._requests = name, host.requests
        self._by_gradient, self._factors = by_gradient, factors
        self._sites: list[Site] = []
        self._paths: list[Waiting] = []
        self._watches: dict[int, GradientSum | Moments] | None = None
        self._asked = torch.zeros((), requires_grad=True)  # so that frozen outputs have gradients
        self._text = None if by_gradient else TextRows(host)
        self._known: tuple[Tensor, int] | None = None
        host.edits.around_passes(self._check, lambda: None)  # type: ignore[call-arg]
        host.on_data(self.prepare, examples=False)

    def add(self, host: Host, site: Site, path: Waiting) -> None:
        """Have a path wait for its start; it is laid at the site already."""
        number = len(self._sites)
        self._sites.append(site)
        self._paths.append(path)
        host.on_output(site.module, lambda inputs, output: self._look(number, inputs[0], output))

    @torch.compiler.disable
    def _check(self) -> None:
        path = self._paths[0]
        assert path.started is not None
        now = (path.started, path.started._version)
        if self._known is not None and self._known[0] is now[0] and self._known[1] == now[1]:
            return
        if bool(path.started):
            self._known = now  # asked once for each change, as it waits for the device
        elif path.A.requires_grad and not self._requests.preparing:
            raise unseen(self._name)

    def _look(self, number: int, x: Tensor, output: Tensor) -> Tensor:
        if self._watches is None:
            return output
        site, watch = self._sites[number], self._watches.get(number)
        if self._text is not None:
            rows = self._text(site, x)
            watch = watch or Moments(site.in_features, x)
            watch.add(rows)  # type: ignore[call-arg]
        else:
            watch = watch or GradientSum(site, x)
            output = _Listening.apply(output, self._asked, x.detach(), watch)  # type: ignore[assignment]
        self._watches[number] = watch
        return output

    def prepare(self, losses: Losses) -> None:
        """See the data, and put all paths at their start.

        Raises:
            InputError: there is no loss, one is not finite or has no graph, a site takes no part in
                them, or the data span too few directions for the rank. No path has a start then.
        """
        for path in self._paths:
            path.forget_start()
        self._watches, count = {}, 0
        if self._text is not None:
            self._text.listening = True
        try:
            with torch.set_grad_enabled(self._by_gradient):
                for count, loss in enumerate(losses(), start=1):
                    self._take(loss, count)
            seen = self._watches
        finally:
            self._watches = None
            if self._text is not None:
                self._text.listening = False
        if not count:
            raise InputError(f"{self._name}: prepare got no loss; give at least one batch.")
        found = [self._made(number, seen) for number in range(len(self._sites))]
        for path, (down, up) in zip(self._paths, found, strict=True):
            path.start(down, up)

    def _take(self, loss: Tensor, count: int) -> None:
        if not bool(loss.isfinite()):
            raise InputError(
                f"{self._name}: loss {count} of the data is {float(loss.detach())}; its start "
                "needs finite losses."
            )
        if not self._by_gradient:
            return
        if not loss.requires_grad:
            raise InputError(
                f"{self._name}: loss {count} of the data has no graph; compute it from this model, "
                "without torch.no_grad(), each time that prepare asks for it."
            )
        torch.autograd.grad(loss, self._asked, allow_unused=True)

    def _made(self, number: int, seen: dict[int, Any]) -> Factors:
        site, watch = self._sites[number], seen.pop(number, None)
        if watch is None or (isinstance(watch, Moments) and not watch.count):
            raise InputError(
                f"{self._name}: {site.path} took no part in the losses; show rows that reach it, "
                "or choose other sites."
            )
        return self._factors(site, watch.total if isinstance(watch, GradientSum) else watch)


def unseen(name: str) -> InputError:
    """For a path that would be used before it has a start."""
    return InputError(
        f"{name} has not seen data and does not know yet where to start: call prepare(losses) on "
        "the DeltaModel, or load() controls saved after it."
    )
