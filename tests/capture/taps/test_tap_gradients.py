"""Gradients at taps equal those of an added tensor, slopes of the loss, hand-written hooks; training inside works."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.capture.sites.names_to_modules import model_sites
from residua.capture.taps.reading import reading
from residua.store.base.errors import CaptureError
from tests.capture.manual_hooks import hooked
from tests.capture.site_readings import attention, batch, loss_of, tapped
from tests.models.tiny import TINY


def moving(by: Tensor) -> Callable[[str, Tensor], Tensor]:
    return lambda _site, tensor: tensor + by


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_gradients_equal_those_of_a_tensor_added_at_the_site(name: str) -> None:
    model: PreTrainedModel = TINY[name]()
    found = model_sites(model).values()
    numbers = [info.name for info in found if info.dtype != "int64"]  # the choice of experts has no gradient
    sites = [site for site in numbers if site.endswith(".1") or site in ("embed", "final", "logits")]
    gradients = tapped(model, ",".join(sites), backward=True)
    assert gradients.keys() == set(sites)
    with attention(model, "eager"):
        for site in sites:
            added = torch.zeros_like(gradients[site]).requires_grad_()
            with reading(model, site, moving(added)):
                loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch has no types here
            torch.testing.assert_close(gradients[site], added.grad, rtol=1e-4, atol=1e-6)
            assert gradients[site].any()


def test_gradients_are_the_slopes_of_the_loss() -> None:
    model = TINY["gpt2"]()
    nn.Module.double(model)  # the model's own ``double`` has no usable annotation
    sites = [site for site in model_sites(model) if site.endswith(".1") or site in ("embed", "final", "logits")]
    with attention(model, "eager"):
        gradients = tapped(model, ",".join(sites), backward=True)
        for site in sites:
            direction = gradients[site] / gradients[site].norm()
            losses = []
            for step in (1e-6, -1e-6):
                with residua.tap(model, site, moving(step * direction)), torch.no_grad():
                    losses.append(loss_of(model))
            torch.testing.assert_close(gradients[site].norm(), (losses[0] - losses[1]) / 2e-6, rtol=1e-5, atol=0)


def test_a_replaced_gradient_flows_on() -> None:
    model = TINY["llama"]()
    with residua.tap(model, "resid_post.1", lambda _site, tensor: tensor * 0, backward=True):
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch has no types here
    below, above = (model.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight for layer in (1, 2))
    assert isinstance(below, Tensor)
    assert isinstance(above, Tensor)
    assert below.grad is not None
    assert not below.grad.any()
    assert above.grad is not None
    assert above.grad.any()


def test_the_gradient_of_the_stream_is_that_of_a_retained_hidden_state() -> None:
    model = TINY["gpt2"]()
    gradients = tapped(model, "resid_post.0,resid_pre.1,final", backward=True)
    padded = batch()
    output = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask, output_hidden_states=True)
    output.hidden_states[1].retain_grad()
    output.logits.square().mean().backward()
    assert torch.equal(gradients["resid_post.0"], output.hidden_states[1].grad)
    assert torch.equal(gradients["resid_pre.1"], gradients["resid_post.0"])


def test_a_module_can_be_trained_inside() -> None:
    model = TINY["llama"]()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lens = nn.Linear(32, 32)
    nn.init.zeros_(lens.weight)
    nn.init.zeros_(lens.bias)
    with torch.no_grad():
        target = model(batch().input_ids).logits.roll(1, dims=0)
    optimizer = torch.optim.Adam(lens.parameters(), lr=1e-2)
    losses = []
    with residua.tap(model, "resid_post.1", lambda _site, tensor: tensor + lens(tensor), differentiable=True):
        for _ in range(20):
            loss = (model(batch().input_ids).logits - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_gradients_before_a_differentiable_replacement_equal_those_of_a_hand_written_hook() -> None:
    model = TINY["llama"]()
    gradients: list[list[Tensor]] = []
    contexts: list[Callable[[], Any]] = [
        lambda: residua.tap(model, "mlp_out.1", lambda _site, tensor: tensor.tanh(), differentiable=True),
        lambda: hooked(model.get_submodule("model.layers.1.mlp"), lambda _m, _a, output: output.tanh()),
    ]
    for context in contexts:
        model.zero_grad()
        with context():
            loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch has no types here
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


def test_a_gradient_that_arrives_while_the_tap_is_off_is_left_alone() -> None:
    model = TINY["gpt2"]()
    weight = model.get_input_embeddings().weight
    loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch has no types here
    assert isinstance(weight, Tensor)
    assert weight.grad is not None
    expected = weight.grad.clone()
    model.zero_grad()
    with residua.tap(model, "resid_post.1", lambda _site, tensor: tensor * 0, backward=True) as taps:
        loss = loss_of(model)
        with taps.group.off():
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
    assert torch.equal(weight.grad, expected)


def test_a_backward_pass_after_the_context_is_not_tapped() -> None:
    model, seen = TINY["gpt2"](), []
    with (
        pytest.raises(CaptureError, match=r"'resid_post\.1' .*never had a gradient.*1 more"),
        residua.tap(model, "resid_post.1,final", lambda site, _tensor: seen.append(site), backward=True),
    ):
        loss = loss_of(model)
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
    assert seen == []


def test_a_tapped_gradient_keeps_no_activation_alive() -> None:
    import weakref

    model = TINY["gpt2"]()
    alive: list[weakref.ref[Tensor]] = []
    with (
        hooked(model.get_submodule("transformer.h.1"), lambda _m, _a, output: alive.append(weakref.ref(output))),
        residua.tap(model, "resid_post.1", lambda *_: None, backward=True),
    ):
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch has no types here
        assert [ref() for ref in alive] == [None]
