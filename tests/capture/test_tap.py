"""The tap in one process: values, gradients, replacements, trainable modules, switches, wrappers, restoration."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.capture.sites import model_sites
from residua.capture.taps import reading
from residua.capture.wrappers import core_of, named_parts
from residua.store.errors import CaptureError, PlanError, UnknownSiteError
from tests.capture.hooks_by_hand import hooked, state_of
from tests.capture.readings import attention, batch, read, run
from tests.models import TINY

SITES = "resid_pre.1,resid_mid.1,resid_post.1,attn_out.1,mlp_out.1,mlp_act.1,q.1,k.1,v.1,z.1,pattern.1,final,logits"


def loss_of(model: nn.Module) -> Tensor:
    padded = batch()
    logits: Tensor = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False).logits
    return logits.square().mean()


def tapped(model: nn.Module, sites: str, **options: Any) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    with residua.tap(model, sites, kept.__setitem__, **options):
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
    return kept


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_values_are_those_that_reading_gives_and_the_callers_own(name: str) -> None:
    model = TINY[name]()
    expected = read(model, SITES)
    kept: dict[str, Tensor] = {}

    def keep_and_spoil(site: str, tensor: Tensor) -> None:
        kept[site] = tensor.clone()
        tensor.fill_(7.0)

    with residua.tap(model, SITES, keep_and_spoil) as taps:
        assert torch.equal(run(model), expected.logits)
    assert kept.keys() == expected.sites.keys() == taps.n_fired.keys()
    assert all(torch.equal(kept[site], value) for site, value in expected.sites.items())


def moving(by: Tensor) -> Callable[[str, Tensor], Tensor]:
    return lambda _site, tensor: tensor + by


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_gradients_are_those_of_something_added_at_the_site(name: str) -> None:
    model: PreTrainedModel = TINY[name]()
    sites = [site for site in model_sites(model) if site.endswith(".1") or site in ("embed", "final", "logits")]
    gradients = tapped(model, ",".join(sites), backward=True)
    assert gradients.keys() == set(sites)
    with attention(model, "eager"):
        for site in sites:
            added = torch.zeros_like(gradients[site]).requires_grad_()
            with reading(model, site, moving(added)):
                loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
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


def test_a_replaced_gradient_is_what_flows_on() -> None:
    model = TINY["llama"]()
    with residua.tap(model, "resid_post.1", lambda _site, tensor: tensor * 0, backward=True):
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
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


def test_gradients_below_a_differentiable_replacement_are_those_of_a_hook_by_hand() -> None:
    model = TINY["llama"]()
    gradients: list[list[Tensor]] = []
    contexts: list[Callable[[], Any]] = [
        lambda: residua.tap(model, "mlp_out.1", lambda _site, tensor: tensor.tanh(), differentiable=True),
        lambda: hooked(model.get_submodule("model.layers.1.mlp"), lambda _m, _a, output: output.tanh()),
    ]
    for context in contexts:
        model.zero_grad()
        with context():
            loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


def test_a_replacement_that_would_lose_gradients_is_refused() -> None:
    model, shift = TINY["gpt2"](), torch.zeros(32, requires_grad=True)
    with (
        pytest.raises(CaptureError, match=r"'mlp_out\.1'.*differentiable=True"),
        residua.tap(model, "mlp_out.1", lambda _site, tensor: tensor + shift),
    ):
        loss_of(model)


def test_groups_are_switched_off_and_on_again() -> None:
    model, group = TINY["llama"](), residua.TapGroup()
    plain = run(model)
    with ExitStack() as stack:
        for site in ("mlp_out.1", "z.2"):
            stack.enter_context(residua.tap(model, site, lambda _site, tensor: tensor * 0, group=group))
        kept = stack.enter_context(residua.tap(model, "final", lambda *_: None))
        edited = run(model)
        with group.off():
            assert torch.equal(run(model), plain)
        assert torch.equal(run(model), edited)
        kept.enabled = False
        run(model)
    assert not torch.equal(edited, plain)
    assert kept.n_fired == {"final": 3}


def test_a_gradient_that_arrives_while_the_tap_is_off_is_left_alone() -> None:
    model = TINY["gpt2"]()
    weight = model.get_input_embeddings().weight
    loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
    assert isinstance(weight, Tensor)
    assert weight.grad is not None
    expected = weight.grad.clone()
    model.zero_grad()
    with residua.tap(model, "resid_post.1", lambda _site, tensor: tensor * 0, backward=True) as taps:
        loss = loss_of(model)
        with taps.group.off():
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
    assert torch.equal(weight.grad, expected)


class BoomError(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"backward": True}, {"differentiable": True}])
@pytest.mark.parametrize("ends_badly", [False, True])
def test_leaving_restores_everything(options: dict[str, bool], ends_badly: bool) -> None:
    model = TINY["llama"]()
    foreign = model.base_model.register_forward_hook(lambda *_: None)
    before, logits = state_of(model), run(model)

    def change(_site: str, tensor: Tensor) -> Tensor:
        if ends_badly:
            raise BoomError
        return tensor * 2

    with ExitStack() as stack:
        if ends_badly:
            stack.enter_context(pytest.raises(BoomError))
        with residua.tap(model, SITES, change, **options):  # type: ignore[arg-type]  # one dict for all options
            loss = loss_of(model)
            if options:
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
    assert state_of(model) == before
    assert torch.equal(run(model), logits)
    foreign.remove()


def test_a_backward_pass_after_the_context_is_not_tapped() -> None:
    model, seen = TINY["gpt2"](), []
    with (
        pytest.raises(CaptureError, match=r"'resid_post\.1' .*never had a gradient.*1 more"),
        residua.tap(model, "resid_post.1,final", lambda site, _tensor: seen.append(site), backward=True),
    ):
        loss = loss_of(model)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
    assert seen == []


def test_a_tapped_gradient_keeps_no_activation_alive() -> None:
    import weakref

    model = TINY["gpt2"]()
    alive: list[weakref.ref[Tensor]] = []
    with (
        hooked(model.get_submodule("transformer.h.1"), lambda _m, _a, output: alive.append(weakref.ref(output))),
        residua.tap(model, "resid_post.1", lambda *_: None, backward=True),
    ):
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare
        assert [ref() for ref in alive] == [None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: tensor[:, :1], r"'mlp_out\.1' holds float32\[3, 11, 32\].*\[3, 1, 32\]"),
        (lambda tensor: tensor.double(), "float64"),
        (lambda _tensor: 3, "int"),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_what_does_not_fit_is_refused_by_name(change: Callable[[Tensor], Any], words: str, backward: bool) -> None:
    model = TINY["llama"]()
    with (
        pytest.raises(CaptureError, match=words),
        residua.tap(model, "mlp_out.1", lambda _site, tensor: change(tensor), backward=backward),
    ):
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch leaves it bare


def test_a_site_that_never_fires_is_an_error_that_names_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"unused": nn.Linear(2, 2)}))
    setattr(model[1], "forward", nn.Identity().forward)  # noqa: B010 - mypy allows no other way
    with (
        pytest.raises(CaptureError, match=r"'module:1\.unused@output' \(1\.unused output\) was never met"),
        residua.tap(model, "module:1.unused", lambda *_: None),
    ):
        model(torch.ones(1, 2))
    with pytest.raises(CaptureError, match="never called"), residua.tap(model, "module:0", lambda *_: None):
        pass
    with residua.tap(model, "module:0", lambda *_: None) as taps:
        taps.enabled = False


def test_options_and_sites_that_make_no_sense_are_refused() -> None:
    model = TINY["gpt2"]()
    for sites, options, error in (
        ("final", {"backward": True, "differentiable": True}, PlanError),
        ("logits_top5", {}, PlanError),
        ("resid_post.9", {}, UnknownSiteError),
    ):
        with pytest.raises(error), residua.tap(model, sites, lambda *_: None, **options):  # type: ignore[arg-type]
            pass
    with (
        torch.no_grad(),
        pytest.raises(CaptureError, match=r"'final' takes part in no gradient"),
        residua.tap(model, "final", lambda *_: None, backward=True),
    ):
        loss_of(model)


def wrap_blocks(model: PreTrainedModel, wrap: Callable[[nn.Module], nn.Module]) -> PreTrainedModel:
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    for index, block in enumerate(layers):
        layers[index] = wrap(block)
    return model


def checkpointed(module: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped = checkpoint_wrapper(module)
    assert isinstance(wrapped, nn.Module)
    return wrapped


def compiled(module: nn.Module) -> nn.Module:
    wrapped = torch.compile(module, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


WRAPPED: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "data parallel": lambda model: nn.DataParallel(model),
    "compiled": compiled,
    "compiled blocks": lambda model: wrap_blocks(model, compiled),
    "checkpointed blocks": lambda model: wrap_blocks(model, checkpointed),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_models_have_the_sites_of_the_bare_one(name: str) -> None:
    bare, model = TINY["llama"](), WRAPPED[name](TINY["llama"]())
    sites = "embed,resid_pre.1,resid_post.1,attn_out.1,mlp_act.1,q.1,z.1,final,logits,module:model.layers.1.mlp"
    assert list(named_parts(model)) == list(named_parts(bare))
    assert isinstance(core_of(model), type(bare))
    assert model_sites(model) == model_sites(bare)
    assert tapped(model, sites).keys() == tapped(bare, sites).keys()
    for options in ({}, {"backward": True}):
        expected, got = tapped(bare, sites, **options), tapped(model, sites, **options)
        assert all(torch.equal(got[site], value) for site, value in expected.items())
