"""Features of weights and biases against forward-mode derivatives of the model."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jvp

from deltacontrol.deltas.dynamics.logit_features import bias_features, weight_features
from deltacontrol.deltas.editing.sites import SiteMap
from deltacontrol.theory.convex import OuterProducts
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.linearisation import differentiable_attention
from tests.deltas.zoo import batch_of, build

SITES = ("attention.query", "attention.key", "attention.value", "attention.output")
SITES += ("mlp.up", "mlp.down")


@pytest.mark.parametrize("chunk", [2, 64])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_features_are_derivatives_of_the_logits(chunk: int, kind: str) -> None:
    """All maps at once, with padding, three classes, and batches of one and two examples."""
    model = build("bert", attention="sdpa", num_labels=3)
    batch = batch_of(model)
    paths = [site.path for site in SiteMap(model).resolve(SITES)]
    compute = weight_features if kind == "weight" else bias_features
    logits, features = compute(model, paths, batch, chunk=chunk)
    directions = {
        path: torch.randn(f.control_shape, dtype=torch.float64) for path, f in features.items()
    }
    weights = {f"{path}.{kind}": model.get_parameter(f"{path}.{kind}").detach() for path in paths}
    along = {f"{path}.{kind}": directions[path] for path in paths}

    def outputs(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, (), dict(batch)).logits

    with differentiable_attention(), torch.no_grad():
        z, exact = jvp(outputs, (weights,), (along,))
    products = [f @ directions[p].reshape(-1) for p, f in features.items()]
    found = torch.stack(products).sum(0).reshape(exact.shape)
    assert len(paths) == 12
    torch.testing.assert_close(logits, z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    for f in features.values() if kind == "weight" else ():
        assert isinstance(f, OuterProducts)
        assert f.left.shape[1] == 3
        assert not f.left[0, :, -2:].any()  # the first text has two tokens of padding
        assert f.left[1].any()


def test_nothing_is_left_behind() -> None:
    model = build("bert")
    batch = batch_of(model)
    before = model(**batch).logits
    weight_features(model, ["bert.encoder.layer.0.output.dense"], batch)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(**batch).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mistakes_are_named() -> None:
    model = build("bert")
    with pytest.raises(InputError, match="LayerNorm; the features"):
        weight_features(model, ["bert.embeddings.LayerNorm"], batch_of(model))
    with pytest.raises(InputError, match="no module"):
        weight_features(model, ["bert.nowhere"], batch_of(model))
    with pytest.raises(InputError, match="examples, tokens, width"):
        weight_features(model, ["classifier"], batch_of(model))


@pytest.mark.parametrize(
    ("kind", "found"),
    [("masked-lm", r"logits of shape \(3, 7, 100\)"), ("backbone", "no logits")],
)
def test_logits_of_tokens_are_refused(kind: str, found: str) -> None:
    """Where the axis of tokens would be taken for that of classes."""
    model = build("bert", kind)
    path = SiteMap(model).resolve(("mlp.up",))[0].path
    for compute in (weight_features, bias_features):
        with pytest.raises(InputError, match=f"gives {found}; .*examples, classes"):
            compute(model, [path], batch_of(model))
    assert not any(module._forward_hooks for module in model.modules())
