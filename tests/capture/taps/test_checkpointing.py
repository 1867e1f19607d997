"""Parts that run again in the backward pass: edits act in them too, and gradients equal those of plain hooks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import residua
from residua.store.base.errors import CaptureError
from tests.capture.manual_hooks import hooked, state_of
from tests.capture.site_readings import batch
from tests.models.tiny import _GPT, LAYERS, TINY, _build

pytestmark = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad", "ignore:.*gradient_checkpointing_enable"
)
Model = Any
Checkpointing = Callable[[Model], None]


def of_transformers(model: Model, *, reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()


def blocks_of(model: Model) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def of_fsdp(model: Model, *, reentrant: bool, inner: str = "") -> None:
    """Wrap each block, or a module in it, as FSDP's users do."""
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    model.enable_input_require_grads()
    for number, block in enumerate(blocks_of(model)):
        if inner:
            setattr(block, inner, checkpoint_wrapper(block.get_submodule(inner), kind))
        else:
            blocks_of(model)[number] = checkpoint_wrapper(block, kind)


def by_hand(model: Model, *, nested: bool = False) -> None:
    """Let each block call torch's checkpoint itself, perhaps around a checkpointed MLP."""
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if nested:
            block.mlp.forward = partial(checkpoint, block.mlp.forward, use_reentrant=False)


def selective(model: Model) -> None:
    """Keep the results of matrix products, and compute the rest again."""
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.bmm.default])
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


WAYS: dict[str, Checkpointing] = {
    "transformers": partial(of_transformers, reentrant=False),
    "transformers, reentrant": partial(of_transformers, reentrant=True),
    "FSDP": partial(of_fsdp, reentrant=False),
    "FSDP, reentrant": partial(of_fsdp, reentrant=True),
    "FSDP around the MLP": partial(of_fsdp, reentrant=False, inner="mlp"),
    "torch": by_hand,
    "torch, nested": partial(by_hand, nested=True),
    "torch, selective": selective,
}


def model_of(name: str, way: Checkpointing | None = None) -> Model:
    model = TINY[name]().train()
    if way is not None:
        way(model)
    return model


def loss_of(model: Model, n_positions: int = 11) -> Tensor:
    padded = batch()
    ids, mask = padded.input_ids[:, :n_positions], padded.attention_mask[:, :n_positions]
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the parameters, under their names without wrappers."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name.replace("_checkpoint_wrapped_module.", "")] = parameter.grad.clone()
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def tanh_of(module: nn.Module, *, before: bool = False) -> Any:
    """Return a plain hook that changes what a module gets or returns."""

    def after(_module: nn.Module, _args: object, output: Any) -> Any:
        return (output[0].tanh() * 2, *output[1:]) if isinstance(output, tuple) else output.tanh() * 2

    if before:
        return hooked(module, lambda _m, args: (args[0].tanh() * 2, *args[1:]), before=True)
    return hooked(module, after)


PLAIN: dict[str, tuple[str, bool]] = {
    "resid_pre.1": ("", True),
    "resid_post.1": ("", False),
    "attn_out.1": ("self_attn", False),
    "mlp_out.1": ("mlp", False),
    "z.1": ("self_attn.o_proj", True),
    "v.1": ("self_attn.v_proj", False),
    "module:model.layers.1.mlp.act_fn": ("mlp.act_fn", False),
}
"""From a site to a module of the block, and whether a plain hook changes its input."""


@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_those_of_plain_hooks_without_checkpointing(way: str) -> None:
    found: dict[str, dict[str, Tensor]] = {}
    for site, (path, before) in PLAIN.items():
        plain, model = model_of("llama"), model_of("llama", WAYS[way])
        with tanh_of(blocks_of(plain)[1].get_submodule(path), before=before):
            loss_of(plain).backward()  # type: ignore[no-untyped-call]  # torch has no types here
        found[site] = gradients(plain)
        with residua.tap(model, site, lambda _site, x: x.tanh() * 2, differentiable=True) as taps:
            loss_of(model).backward()  # type: ignore[no-untyped-call]  # as above
        assert taps.n_fired == dict.fromkeys(taps.sites, 1)
        assert_equal(gradients(model), found[site])
    some = [values["model.embed_tokens.weight"] for values in found.values()]
    assert not any(torch.equal(some[0], other) for other in some[2:])


INSIDE = ["resid_mid.1", "q.1", "k.1", "pattern.1", "attn_out.1"]
AROUND = ["embed", "resid_pre.1", "resid_post.1", "final", "logits"]
"""A replacement without a graph there ends what reentrant checkpointing needs, as torch warns."""


@pytest.mark.parametrize("name", ["llama", "mixtral", "opt"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("differentiable", [False, True])
def test_every_kind_of_site_has_the_gradients_that_it_has_without_checkpointing(
    name: str, reentrant: bool, differentiable: bool
) -> None:
    sites = [*INSIDE, *(AROUND if differentiable else [])]
    if name == "mixtral":
        sites = ["module:model.layers.1.mlp.gate@output"]  # (batch x positions, ...)
    for site in sites:
        found = []
        for way in (None, partial(of_transformers, reentrant=reentrant)):
            model = model_of(name, way)
            model.enable_input_require_grads()
            calls: list[str] = []

            def change(where: str, tensor: Tensor, calls: list[str] = calls) -> Tensor:
                calls.append(where)
                return tensor.sin() * 3

            with residua.tap(model, site, change, differentiable=differentiable) as taps:
                (loss_of(model) + loss_of(model, 7)).backward()  # type: ignore[no-untyped-call]  # as above
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            assert set(taps.n_fired.values()) == {2}
            if not differentiable:
                assert len(calls) == 2
        assert_equal(found[1], found[0])


@pytest.mark.parametrize("way", WAYS)
def test_random_numbers_are_drawn_once(way: str) -> None:
    """From torch's generator, which dropout uses too, and from one of the function's own."""

    def build() -> Model:
        dropout: dict[str, Any] = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
        return _build(hf.GPT2LMHeadModel, hf.GPT2Config(**_GPT, **dropout)).train()

    found = []
    for is_checkpointed in (False, True):
        model = build()
        if is_checkpointed:
            WAYS[way](model)
        own = torch.Generator().manual_seed(3)

        def noisy(_site: str, tensor: Tensor, own: torch.Generator = own) -> Tensor:
            drawn = torch.empty(tensor.shape).normal_(generator=own)
            return tensor + torch.randn_like(tensor) + drawn

        torch.manual_seed(5)
        sites = ",".join(f"attn_out.{i},mlp_out.{i}" for i in range(LAYERS))
        with residua.tap(model, sites, noisy):
            loss_of(model).backward()  # type: ignore[no-untyped-call]  # as above
        torch.manual_seed(7)
        found.append({n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in model.named_parameters()})
    for name, value in found[1].items():
        expected = found[0][name]
        assert (value is None) == (expected is None)
        assert value is None or torch.equal(value, expected), name


@pytest.mark.parametrize("way", WAYS)
def test_gradients_at_taps_are_those_without_checkpointing(way: str) -> None:
    found = []
    for checkpointing in (None, WAYS[way]):
        model, kept = model_of("llama", checkpointing), dict[str, Tensor]()

        def halved(site: str, gradient: Tensor, kept: dict[str, Tensor] = kept) -> Tensor:
            assert site not in kept
            kept[site] = gradient
            return gradient * 0.5

        sites = "resid_pre.1,resid_mid.1,q.1,z.1,mlp_out.1,resid_post.1,final"
        with residua.tap(model, sites, halved, backward=True) as taps:
            loss_of(model).backward()  # type: ignore[no-untyped-call]  # as above
        assert set(taps.n_fired.values()) == {1}
        assert kept.keys() == taps.sites.keys()
        found.append(kept | gradients(model))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("way", WAYS)
def test_a_switch_that_is_turned_between_the_passes_changes_nothing(way: str) -> None:
    found = []
    for checkpointing in (None, WAYS[way]):
        model = model_of("llama", checkpointing)
        for was_on in (True, False):
            model.zero_grad()
            with residua.tap(model, "mlp_out.*", lambda _site, x: x.tanh(), differentiable=True) as taps:
                taps.enabled = was_on
                loss = loss_of(model)
                taps.enabled = not was_on
                loss.backward()  # type: ignore[no-untyped-call]  # as above
            found.append(gradients(model))
    assert_equal(found[2], found[0])
    assert_equal(found[3], found[1])


@pytest.mark.parametrize("way", WAYS)
def test_a_backward_pass_after_the_context_is_refused_if_it_runs_an_edited_part_again(way: str) -> None:
    model = model_of("llama", WAYS[way])
    with residua.tap(model, "module:model.layers.1.mlp.up_proj", lambda _site, x: x * 2):
        loss = loss_of(model)
    with pytest.raises(CaptureError, match=r"up_proj.*checkpointing.*inside the context"):
        loss.backward()  # type: ignore[no-untyped-call]  # as above
    with residua.tap(model, "module:model.layers.1.mlp.up_proj", lambda *_: None):
        loss = loss_of(model)
    loss.backward()  # type: ignore[no-untyped-call]  # as above


def test_a_model_that_is_one_checkpointed_part_counts_one_call() -> None:
    plain, model = model_of("llama"), model_of("llama")
    with tanh_of(plain.get_submodule("model.layers.1.mlp")):
        loss_of(plain).backward()  # type: ignore[no-untyped-call]  # as above
    with residua.tap(model, "mlp_out.1", lambda _site, x: x.tanh() * 2, differentiable=True) as taps:
        loss = checkpoint(loss_of, model, use_reentrant=False)
        assert isinstance(loss, Tensor)
        loss.backward()  # type: ignore[no-untyped-call]  # as above
    assert taps.n_fired == {"mlp_out.1": 1}
    assert_equal(gradients(model), gradients(plain))


class Unknown(torch.autograd.Function):
    """A checkpointing that is not torch's, as DeepSpeed and fairscale have their own."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(hidden)
        return run(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.run(hidden), grads[0])
        return None, hidden.grad


def test_another_checkpointing_is_refused_where_an_edit_would_be_lost() -> None:
    model: Any = model_of("llama")
    model.enable_input_require_grads()
    for block in blocks_of(model):
        inner = block.mlp.forward
        apply: Callable[..., Any] = Unknown.apply
        block.mlp.forward = partial(apply, inner)
    with (
        residua.tap(model, "module:model.layers.1.mlp.up_proj", lambda _site, x: x * 2),
        pytest.raises(CaptureError, match=r"up_proj.*torch\.utils\.checkpoint"),
    ):
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # as above
    with residua.tap(model, "module:model.layers.1.mlp.up_proj", lambda *_: None):
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # as above


def test_the_model_and_torch_are_as_before() -> None:
    from torch.utils import checkpoint as module

    model = model_of("llama", WAYS["transformers"])
    before = state_of(model), module.CheckpointFunction.forward, dict(vars(module))
    with residua.tap(model, "mlp_out.*", lambda _site, x: x * 2):
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # as above
    assert (state_of(model), module.CheckpointFunction.forward, dict(vars(module))) == before
