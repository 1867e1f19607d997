"""Reading: which calls count, and that leaving restores the model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from residua.capture.sites.names_to_modules import model_sites
from residua.capture.taps.reading import reading
from residua.store.base.errors import CaptureError
from tests.capture.manual_hooks import hooked, keep_nothing, state_of
from tests.capture.site_readings import batch, read, run
from tests.models.tiny import TINY


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "mixtral"])
def test_leaving_restores_everything(name: str) -> None:
    model = TINY[name]()
    foreign = model.base_model.register_forward_hook(lambda *_: None)
    before = state_of(model)
    with reading(model, [*model_sites(model), "module:lm_head"] if name == "llama" else "*", keep_nothing):
        assert state_of(model) != before
        run(model)
    assert state_of(model) == before
    foreign.remove()


class BoomError(Exception):
    pass


def fail(*_: object) -> None:
    raise BoomError


def test_an_exception_in_the_callback_restores_everything() -> None:
    model = TINY["llama"]()
    before = state_of(model)
    with pytest.raises(BoomError), reading(model, "*", fail):
        run(model)
    assert state_of(model) == before


def test_an_exception_in_the_model_restores_everything_and_the_next_call_counts() -> None:
    model = TINY["gpt2"]()
    before = state_of(model)
    with reading(model, "*", keep_nothing) as taps:
        with hooked(model.get_submodule("transformer.h.1"), fail), pytest.raises(BoomError):
            run(model)
        with pytest.raises(CaptureError, match="met 0 times"):
            taps.end_forward()
        run(model)
        taps.end_forward()
    assert state_of(model) == before


def test_after_an_exception_a_submodule_called_by_itself_is_not_read() -> None:
    model = TINY["gpt2"]()
    seen: list[str] = []
    with reading(model, "resid_post.0", lambda name, _tensor: seen.append(name)):
        with hooked(model.get_submodule("transformer.h.0.mlp"), fail), pytest.raises(BoomError):
            run(model)
        with torch.no_grad():
            model.base_model(batch().input_ids)
    assert seen == []


def test_a_reading_without_attention_may_end_inside_one_with() -> None:
    model = TINY["llama"]()
    before = AttentionInterface.get_interface
    plain, attentive = reading(model, "resid_post.0", keep_nothing), reading(model, "q.0", keep_nothing)
    plain.__enter__()
    attentive.__enter__()
    plain.__exit__(None, None, None)
    attentive.__exit__(None, None, None)
    assert AttentionInterface.get_interface is before


def test_two_readings_may_end_in_any_order() -> None:
    models = TINY["llama"](), TINY["qwen2"]()
    before = AttentionInterface.get_interface
    counts = {"a": 0, "b": 0}

    def counting(key: str) -> Callable[[str, Tensor], None]:
        def count(_name: str, _tensor: Tensor) -> None:
            counts[key] += 1

        return count

    first, second = reading(models[0], "q.*", counting("a")), reading(models[1], "q.*", counting("b"))
    first.__enter__()
    second.__enter__()
    run(models[0])
    first.__exit__(None, None, None)
    run(models[0])
    run(models[1])
    second.__exit__(None, None, None)
    assert counts == {"a": 3, "b": 3}
    assert AttentionInterface.get_interface is before


def test_the_model_has_to_be_called_once_between_checks() -> None:
    model = TINY["llama"]()
    with reading(model, "resid_post.0", keep_nothing) as taps:
        with pytest.raises(CaptureError, match="0 times"):
            taps.end_forward()
        run(model)
        run(model)
        with pytest.raises(CaptureError, match="2 times"):
            taps.end_forward()
        run(model)
        taps.end_forward()


def test_a_submodule_called_by_itself_is_not_read() -> None:
    model = TINY["llama"]()
    seen: list[str] = []
    with reading(model, "resid_post.0", lambda name, _tensor: seen.append(name)), torch.no_grad():
        model.base_model(batch().input_ids)
    assert seen == []


def test_a_module_that_runs_twice_is_refused_by_name() -> None:
    model = TINY["phi"]()
    with pytest.raises(CaptureError, match=r"module:model\.layers\.0\.resid_dropout@output.* 2 times"):
        read(model, ["module:model.layers.0.resid_dropout"])


def test_a_module_of_any_model_that_runs_twice_or_never_is_refused() -> None:
    twice, never = nn.Identity(), nn.Identity()

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never = twice, never

        def forward(self, tensor: Tensor) -> Tensor:
            result: Tensor = self.twice(self.twice(tensor))
            return result

    model = Odd()
    for site, count in (("module:twice@output", 2), ("module:never@output", 0)):
        with reading(model, site, keep_nothing) as taps:
            model(torch.zeros(2))
            with pytest.raises(CaptureError, match=f"'{site}' .* met {count} times"):
                taps.end_forward()


def test_checkpointed_blocks_are_read_once() -> None:
    model = TINY["llama"]()
    model.train(True)
    model.activation_checkpointing_enable()
    seen: list[str] = []
    with reading(model, "mlp_out.*,q.*,resid_post.*", lambda name, _tensor: seen.append(name)) as taps:
        loss = model(batch().input_ids, use_cache=False).logits.square().mean()
        taps.end_forward()
        loss.backward()
    assert len(seen) == 9


def test_a_model_that_is_already_compiled_is_noticed() -> None:
    model = TINY["llama"]()
    compiled = torch.compile(model, backend="eager")
    kwargs = {"input_ids": batch().input_ids, "use_cache": False}
    with torch.no_grad():
        compiled(**kwargs)
    with reading(model, "mlp_out.0", keep_nothing) as taps, torch.no_grad():
        compiled(**kwargs)
        with pytest.raises(CaptureError, match=r"compile|mlp_out\.0"):
            taps.end_forward()
