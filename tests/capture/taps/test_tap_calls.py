"""Calls of a tapped model: by the function itself, by several threads, by compiled code."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

import residua
from residua.store.base.errors import CaptureError
from tests.capture.site_readings import batch, read, run
from tests.models.tiny import TINY

SITES = "embed,resid_pre.0,q.0,mlp_out.0,resid_post.0,z.1,mlp_out.1,resid_post.2,final,logits"


def doubled(_site: str, tensor: Tensor) -> Tensor:
    return tensor * 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_function_may_call_the_model_and_still_sees_every_site(name: str) -> None:
    """For example to compare with a run on other tokens, of another shape."""
    model = TINY[name]()
    expected = read(model, SITES)
    other = torch.arange(3, 9)[None]
    outer, inner = dict[str, Tensor](), dict[str, Tensor]()
    group = residua.TapGroup()

    def keep(site: str, tensor: Tensor) -> None:
        outer[site] = tensor
        if site == "mlp_out.0":
            with group.off(), residua.tap(model, "mlp_out.0,final", inner.__setitem__), torch.no_grad():
                model(other)

    with residua.tap(model, SITES, keep, group=group) as taps:
        assert torch.equal(run(model), expected.logits)
    assert outer.keys() == expected.sites.keys()
    assert all(torch.equal(outer[site], value) for site, value in expected.sites.items())
    assert set(taps.n_fired.values()) == {1}
    with residua.tap(model, "mlp_out.0,final", outer.__setitem__), torch.no_grad():
        model(other)
    assert all(torch.equal(inner[site], outer[site]) for site in ("mlp_out.0", "final"))


def test_a_thread_that_ends_its_call_does_not_end_the_call_of_another() -> None:
    """One call begins, another thread makes a full call, then the first call continues."""
    model = TINY["llama"]()
    expected = read(model, SITES).sites
    seen: dict[int, dict[str, Tensor]] = {}
    begun, other_is_done = threading.Event(), threading.Event()

    def keep(site: str, tensor: Tensor) -> None:
        seen.setdefault(threading.get_ident(), {})[site] = tensor
        if site == "mlp_out.0" and threading.current_thread() is first:
            begun.set()
            assert other_is_done.wait(timeout=60)

    first = threading.Thread(target=run, args=(model,))
    with residua.tap(model, SITES, keep):
        first.start()
        assert begun.wait(timeout=60)
        run(model)
        other_is_done.set()
        first.join(timeout=60)
    for thread in (first.ident, threading.get_ident()):
        assert thread is not None
        assert seen[thread].keys() == expected.keys()
        assert all(torch.equal(seen[thread][site], value) for site, value in expected.items())


class Compiler:
    """A backend of torch.compile that counts how often what it compiled runs."""

    def __init__(self) -> None:
        self.n_runs = 0

    def __call__(self, graph: fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        def compiled(*args: Any) -> Any:
            self.n_runs += 1
            return graph.forward(*args)

        return compiled


def wrapped(model: PreTrainedModel, compiler: Compiler) -> nn.Module:
    compiled = torch.compile(model, backend=compiler)
    assert isinstance(compiled, nn.Module)
    return compiled


def in_place(model: PreTrainedModel, compiler: Compiler) -> nn.Module:
    model.compile(backend=compiler)
    return model


def block_by_block(model: PreTrainedModel, compiler: Compiler) -> nn.Module:
    for block in model.get_submodule("model.layers").children():
        block.compile(backend=compiler)
    return model


def its_forward(model: PreTrainedModel, compiler: Compiler) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=compiler)
    return model


def its_step(model: PreTrainedModel, compiler: Compiler) -> nn.Module:
    """Return a module whose calls are a compiled function around the model; the model itself is not compiled."""
    steps[model] = torch.compile(lambda **batch: model(**batch), backend=compiler)
    return model


steps: WeakKeyDictionary[nn.Module, Callable[..., Any]] = WeakKeyDictionary()


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = steps.get(model, model)(input_ids=batch().input_ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("compile_model", [wrapped, in_place, block_by_block, its_forward, its_step])
def test_a_compiled_model_can_be_tapped_repeatedly_and_then_runs_compiled(
    compile_model: Callable[[PreTrainedModel, Compiler], nn.Module],
) -> None:
    plain, compiler = TINY["llama"](), Compiler()
    model = compile_model(TINY["llama"](), compiler)
    before = logits_of(model)
    n_runs = compiler.n_runs
    assert n_runs > 0, "nothing is compiled: no test"
    for site in ("mlp_out.0", "z.1", "resid_post.1"):
        with residua.tap(plain, site, doubled):
            expected = logits_of(plain)
        with residua.tap(model, site, doubled) as taps:
            assert torch.equal(logits_of(model), expected)
        assert taps.n_fired == {site: 1}
    assert compiler.n_runs == n_runs
    assert torch.equal(logits_of(model), before)
    assert compiler.n_runs > n_runs


def test_a_recorder_inside_a_compiled_step_and_a_capture_of_a_compiled_forward(tmp_path: Path) -> None:
    plain, compiler = TINY["gpt2"](), Compiler()
    ids = batch().input_ids[:1]
    with torch.no_grad():
        expected = plain(ids, output_hidden_states=True).hidden_states[2][0]
    for warm in (False, True):
        model = TINY["gpt2"]()
        its_step(model, compiler)
        if warm:
            steps[model](input_ids=ids)
        with residua.Recorder(model, sites="resid_post.1", out=tmp_path / str(warm)), torch.no_grad():
            steps[model](input_ids=ids)
        assert torch.equal(residua.Archive(tmp_path / str(warm))["resid_post.1"].torch(slice(None)), expected)
    model = TINY["gpt2"]()
    its_forward(model, compiler)
    with pytest.raises(CaptureError, match="compile"):
        residua.Recorder(model, sites="resid_post.1", out=tmp_path / "c")
    result = residua.capture_dataset(model, [ids[0].tolist()], sites="resid_post.1", out=tmp_path / "d")
    assert torch.equal(result.archive["resid_post.1"].torch(slice(None)), expected)
    assert any("compiled" in note for note in result.notes)


def test_taps_of_compiled_models_may_end_in_any_order() -> None:
    model, compiler = TINY["llama"](), Compiler()
    block_by_block(model, compiler)
    seen: list[str] = []
    first, second = (residua.tap(model, site, lambda site, _: seen.append(site)) for site in ("mlp_out.0", "mlp_out.1"))
    first.__enter__()
    second.__enter__()
    logits_of(model)
    first.__exit__(None, None, None)
    logits_of(model)
    second.__exit__(None, None, None)
    assert seen == ["mlp_out.0", "mlp_out.1", "mlp_out.1"]
    assert compiler.n_runs == 0
    logits_of(model)
    assert compiler.n_runs > 0


def test_data_parallel_copies_are_refused() -> None:
    """As torch makes them for two devices; nothing has to run, so none is needed."""
    model = nn.DataParallel(TINY["llama"]())
    model.device_ids = [0, 1]
    with (
        pytest.raises(CaptureError, match=r"DataParallel over 2 devices.*model\.module.*DistributedDataParallel"),
        residua.tap(model, "final", lambda *_: None),
    ):
        pass
