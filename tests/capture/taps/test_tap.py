"""The tap in one process: values, replacements, switches, refusals, wrappers, restoration."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import residua
from residua.capture.runtime.wrappers import core_of, named_modules
from residua.capture.sites.names_to_modules import model_sites
from residua.store.base.errors import CaptureError, PlanError, UnknownSiteError
from tests.capture.manual_hooks import state_of
from tests.capture.site_readings import loss_of, read, run, tapped
from tests.models.tiny import TINY

SITES = "resid_pre.1,resid_mid.1,resid_post.1,attn_out.1,mlp_out.1,mlp_act.1,q.1,k.1,v.1,z.1,pattern.1,final,logits"


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_values_are_copies_of_those_that_reading_gives(name: str) -> None:
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
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
    assert state_of(model) == before
    assert torch.equal(run(model), logits)
    foreign.remove()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: tensor[:, :1], r"'mlp_out\.1' holds float32\[3, 11, 32\].*\[3, 1, 32\]"),
        (lambda tensor: tensor.double(), "float64"),
        (lambda _tensor: 3, "int"),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_a_misfit_is_refused_by_name(change: Callable[[Tensor], Any], words: str, backward: bool) -> None:
    model = TINY["llama"]()
    with (
        pytest.raises(CaptureError, match=words),
        residua.tap(model, "mlp_out.1", lambda _site, tensor: change(tensor), backward=backward),
    ):
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch has no types here


def test_a_site_that_never_fires_is_an_error_that_names_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"unused": nn.Linear(2, 2)}))
    setattr(model[1], "forward", nn.Identity().forward)  # noqa: B010 - mypy allows no other way
    with (
        pytest.raises(CaptureError, match=r"'module:1\.unused@output' \(1\.unused output\).* never met"),
        residua.tap(model, "module:1.unused", lambda *_: None),
    ):
        model(torch.ones(1, 2))
    with pytest.raises(CaptureError, match="never called"), residua.tap(model, "module:0", lambda *_: None):
        pass
    with residua.tap(model, "module:0", lambda *_: None) as taps:
        taps.enabled = False


def test_contradicting_options_and_unusable_sites_are_refused() -> None:
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
        pytest.raises(CaptureError, match=r"'final' has no gradient"),
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
def test_wrapped_models_have_the_sites_of_the_plain_one(name: str) -> None:
    plain, model = TINY["llama"](), WRAPPED[name](TINY["llama"]())
    sites = "embed,resid_pre.1,resid_post.1,attn_out.1,mlp_act.1,q.1,z.1,final,logits,module:model.layers.1.mlp"
    assert list(named_modules(model)) == list(named_modules(plain))
    assert isinstance(core_of(model), type(plain))
    assert model_sites(model) == model_sites(plain)
    assert tapped(model, sites).keys() == tapped(plain, sites).keys()
    for options in ({}, {"backward": True}):
        expected, got = tapped(plain, sites, **options), tapped(model, sites, **options)
        assert all(torch.equal(got[site], value) for site, value in expected.items())
