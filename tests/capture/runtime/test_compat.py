"""Every private name of torch, transformers and accelerate that is used still is what the project takes it for."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module  # type: ignore[import-untyped]  # it ships no types
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleMulti
from transformers import GenerationConfig, GPT2Config, MambaConfig, MambaForCausalLM, OPTConfig, TokenizersBackend
from transformers.integrations import deepspeed

from residua.capture.runtime import compat
from tests.models.tiny import TINY


@pytest.fixture
def one_rank() -> Iterator[Any]:
    """A process group of this process alone; yields its store."""
    store = cast("Any", dist).HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield store
    finally:
        dist.destroy_process_group()


def checkpointed(module: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


def flattened(module: nn.Module) -> nn.Module:
    from fairscale.nn.misc import FlattenParamsWrapper

    return cast("nn.Module", FlattenParamsWrapper(module))


def compiled(module: nn.Module) -> nn.Module:
    return cast("nn.Module", torch.compile(module, backend="eager"))


def test_the_stores_of_torch_distributed_are_these() -> None:
    public = cast("Any", dist)
    assert (compat.Store, compat.PrefixStore, compat.TCPStore) == (public.Store, public.PrefixStore, public.TCPStore)


def test_default_store(one_rank: Any) -> None:
    compat.PrefixStore("compat", compat.default_store()).set("key", "value")
    assert compat.PrefixStore("compat", compat.default_store()).get("key") == b"value"


def test_checkpoints_that_are_not_reentrant() -> None:
    from torch.utils import checkpoint as module

    ran: list[str] = []
    generator = getattr(module, compat.NOT_REENTRANT)(lambda _x: ran.append("again"), True, module.noop_context_fn)
    next(generator)
    with pytest.raises(StopIteration):
        next(generator)
    assert not ran


def test_compiled_function() -> None:
    layer: Any = nn.Linear(2, 2)
    assert not compat.is_compiled_function(layer.forward)
    assert compat.is_compiled_function(torch.compile(layer.forward, backend="eager"))


def test_in_backward() -> None:
    found = [compat.in_backward()]
    weight = torch.ones(2, requires_grad=True)
    weight.register_hook(lambda _grad: found.append(compat.in_backward()))  # type: ignore[no-untyped-call]  # no types
    weight.sum().backward()  # type: ignore[no-untyped-call]  # torch has no types here
    assert found == [False, True]


def test_without_dispatch_modes() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, compat.without_dispatch_modes():
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    assert counter.get_total_flops() == 0


def test_merged_generation_config() -> None:
    model = cast("Any", TINY["llama"]())
    model.generation_config.use_cache = False
    config = GenerationConfig(num_beams=3, top_k=5)  # type: ignore[no-untyped-call]  # transformers has no types here
    merged, others = compat.merged_generation_config(model, config, {"top_k": 7, "eos_token_id": None, "streamer": 1})
    found = (merged.num_beams, merged.top_k, merged.eos_token_id, merged.use_cache, merged.num_return_sequences)
    assert found == (3, 7, None, False, 1)
    assert others == {"streamer": 1}
    assert config.top_k == 5


def test_compiled_module() -> None:
    assert isinstance(compiled(nn.Linear(2, 2)), compat.CompiledModule)


def test_is_compiled_in_place() -> None:
    module = nn.Linear(2, 2)
    assert not compat.is_compiled_in_place(module)
    module.compile(backend="eager")
    assert compat.is_compiled_in_place(module)


def test_children_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert dict(compat.children_by_name(model)) == dict(model.named_children())


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # as there is one rank
@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("_fsdp_wrapped_module", lambda module: FullyShardedDataParallel(module, device_id=torch.device("cpu"))),
        ("_fpw_module", flattened),
        ("_checkpoint_wrapped_module", checkpointed),
        ("_orig_mod", compiled),
    ],
)
def test_wrapped_children(one_rank: Any, name: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = nn.Linear(2, 2)
    assert name in compat.WRAPPED_CHILDREN
    assert compat.children_by_name(wrap(module))[name] is module


def test_pipeline_schedules_and_stages(one_rank: Any) -> None:
    stage = PipelineStage(nn.Linear(2, 2), 0, 1, torch.device("cpu"))
    schedule = Schedule1F1B(stage, 3)
    assert isinstance(stage, compat.PipelineStageBase)
    assert isinstance(schedule, compat.PipelineSchedule)
    assert issubclass(ScheduleGPipe, compat.PipelineSchedule)
    assert issubclass(PipelineScheduleMulti, compat.PipelineSchedule)
    assert compat.stage_of(schedule) is stage
    assert compat.n_microbatches_of(schedule) == 3


def test_fsdp_meshes(one_rank: Any) -> None:
    mesh = init_device_mesh("cpu", (1,))
    module = fully_shard(nn.Linear(2, 2), mesh=mesh)
    assert isinstance(module, FSDPModule)
    assert list(compat.fsdp_meshes(module)) == [mesh]


def test_attention_implementation() -> None:
    model = TINY["llama"]()
    model.set_attn_implementation("eager")
    assert compat.attention_implementation(model.config) == "eager"
    compat.set_attention_implementation(model.config, "sdpa")
    assert compat.attention_implementation(model.config) == "sdpa"


def test_lacks_final_norm() -> None:
    assert compat.lacks_final_norm(OPTConfig(_remove_final_layer_norm=True))
    assert not compat.lacks_final_norm(OPTConfig())


def test_model_revision() -> None:
    config = GPT2Config.from_dict({}, _commit_hash="c0ffee")
    assert compat.model_revision(config) is None, "transformers 5.23 drops it; earlier versions of 5 keep it"
    config._commit_hash = "c0ffee"
    assert compat.model_revision(config) == "c0ffee"
    assert compat.model_revision(None) is None
    commit = "0123456789abcdef0123456789abcdef01234567"
    for folder, found in {
        f"/hub/models--org--m/snapshots/{commit}": commit,
        f"/hub/models--org--m/snapshots/{commit}/": commit,
        "/home/me/snapshots/best": None,
        "org/m": None,
        "": None,
    }.items():
        assert compat.commit_of_folder(folder) == found
        config = GPT2Config()
        config.name_or_path = folder
        assert compat.model_revision(config) == found
    compat.set_model_revision(config, commit)
    assert compat.model_revision(config) == commit


def test_model_from_config() -> None:
    model = TINY["llama"]()
    with torch.device("meta"):
        made = compat.model_from_config(type(model), model.config, dtype=torch.bfloat16)
    assert type(made) is type(model)
    assert {(parameter.device.type, parameter.dtype) for parameter in made.parameters()} == {("meta", torch.bfloat16)}


def test_deepspeed_config() -> None:
    class Given:
        """What transformers keeps a weak reference to."""

    given = Given()
    assert compat.deepspeed_config() is None
    deepspeed.set_hf_deepspeed_config(given)  # type: ignore[no-untyped-call]  # it has no annotations
    try:
        assert compat.deepspeed_config() is given
    finally:
        deepspeed.unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]  # it has no annotations
    assert compat.deepspeed_config() is None


def test_pipeline_stage_of(one_rank: Any) -> None:
    from transformers.distributed.pipeline_parallel import apply_pipeline_parallelism

    model = TINY["llama"]()
    assert compat.pipeline_stage_of(model) is None
    apply_pipeline_parallelism(model, init_device_mesh("cpu", (1,)))
    stage = compat.pipeline_stage_of(model)
    assert dist.get_world_size(stage.pp_group) == 1
    assert callable(stage.communicate)
    assert callable(stage.broadcast_from_last)


def test_device_meshes_of() -> None:
    from transformers.distributed.configuration_utils import DistributedConfig

    class Meshes:
        def get_mesh(self, _dims: object) -> None:
            """Return no mesh."""

    model, meshes = TINY["llama"](), Meshes()
    assert compat.device_meshes_of(model) is None
    assert compat.device_meshes_of(nn.Linear(2, 2)) is None
    type(model).maybe_distribute_model(model, DistributedConfig(), cast("Any", meshes))
    assert compat.device_meshes_of(model) is meshes


def test_accelerate_hook() -> None:
    module, hook = nn.Linear(2, 2), ModelHook()
    assert compat.accelerate_hook(module) is None
    add_hook_to_module(module, hook)
    assert compat.accelerate_hook(module) is hook


def test_forward_hooks_of() -> None:
    layer = nn.Linear(1, 1)
    assert compat.forward_hooks_of(layer) == []
    before, after = (lambda *_: None), (lambda *_: None)
    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
    assert compat.forward_hooks_of(layer) == [before, after]


def test_version_of() -> None:
    tensor = torch.zeros(2)
    first = compat.version_of(tensor)
    tensor += 1
    assert compat.version_of(tensor) > first


def test_plain_call() -> None:
    assert {"_encode_plus", "set_truncation_and_padding"} <= vars(TokenizersBackend).keys() & {*compat.PLAIN_CALL}


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT uses the old name
def test_adapter_state(options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(TINY["llama"](), LoraConfig(target_modules=["q_proj"], **options))
    active, disabled = compat.ADAPTER_STATE.values()
    layers = [layer for layer in model.modules() if hasattr(layer, active)]
    assert layers
    assert not any(getattr(layer, disabled) for layer in layers)
    with model.disable_adapter():
        assert all(getattr(layer, disabled) for layer in layers)


def test_has_state_without_length() -> None:
    assert compat.has_state_without_length(MambaForCausalLM(MambaConfig(num_hidden_layers=1, hidden_size=8)))
    assert not compat.has_state_without_length(TINY["gpt2"]())


def test_packed_codes_of_four_bits_come_back() -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, quantize_4bit

    codes, state = quantize_4bit(torch.randn(64, 128), quant_type="nf4")
    packed, state = _convert_weight_packed_for_cpu(codes.clone(), state)
    assert torch.equal(compat.unpacked_codes(packed, state), codes)
