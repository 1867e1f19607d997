"""Load models and tokenizers from the hub or a folder, ready for a job."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import list_repo_files, try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as progress_bars

from residua.capture.forward.inputs import first_position
from residua.capture.runtime.compat import commit_of_folder, model_from_config, model_revision, set_model_revision
from residua.capture.runtime.pipeline_schedule import PIPELINE_TYPES, as_model
from residua.capture.runtime.wrappers import core_of, replica_of
from residua.capture.sites.pipeline_stages import is_placeholder
from residua.capture.sites.stacks import is_encoder_decoder
from residua.pipelines.data.tokenizer import knows_text
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.format.archive_metadata import ROOT
from residua.store.read.archive import Archive
from residua.store.storage.address import is_remote

_TOKENIZER_FILES = frozenset(
    ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
)
_APPLY_PLAN = "apply_tensor_parallelism"


def transformers_model(model: nn.Module, job: str) -> PreTrainedModel:
    """Return `model` if it is a transformers model; raises PlanError otherwise.

    Args:
        model: Any torch module.
        job: What was to run it, for the message.
    """
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise PlanError(
            f"{job} runs transformers models over token ids, and was given a {type(model).__name__}: call it "
            "in your own loop inside residua.Recorder or residua.tap, which read any torch module, or pass the "
            "transformers model that it contains"
        )
    return cast("PreTrainedModel", model)


def load_model(name: str, settings: CaptureSettings) -> PreTrainedModel:
    """Load the model `name`, a hub id or a folder, in evaluation mode on its device.

    The class is the one that the config names, so the model keeps its LM head. No code of the checkpoint is run.

    Raises:
        PlanError: There is no such model or no such device.
    """
    device = choose_device(settings.device)
    is_split = settings.tp * settings.pp > 1
    accelerator = torch.accelerator.current_accelerator(check_available=False) or torch.device("cpu")
    if is_split and settings.device not in ("auto", accelerator.type):
        raise PlanError(
            f"{named('device', settings.device)} cannot be combined with {named('tp')} or {named('pp')}, which choose "
            f"the device of each process: leave {named('device')} out"
        )
    spread: str | dict[str, torch.device] | None = settings.device_map
    if spread is None and device.type != "cpu" and not is_split:
        spread = {"": device}  # load it there directly: a large model need not fit into host memory
    _, kind = _config_and_class(name, settings.revision)
    try:
        # weights that the checkpoint lacks are drawn by the seed; the caller's generators stay as they are
        with (
            _seeded(settings.seed),
            stages_in_parallel() if min(settings.tp, settings.pp) > 1 else nullcontext(),
            _bar_on_a_terminal(),
        ):
            model: PreTrainedModel = kind.from_pretrained(
                name,
                revision=settings.revision or "main",
                dtype=settings.model_dtype,
                attn_implementation=settings.attn_implementation,
                device_map=spread,
                distributed_config=DistributedConfig(tp_size=settings.tp, pp_size=settings.pp) if is_split else None,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loaded(name, error) from error
    if model_revision(model.config) is None:
        set_model_revision(model.config, _commit_of(name, settings.revision))
    model.requires_grad_(False).train(False)
    return model


def _commit_of(name: str, revision: str | None) -> str | None:
    """Return the commit of a model on the hub that was just loaded; None if it came from a folder of the user's."""
    if Path(name).exists():
        return None
    found = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    return commit_of_folder(found) if isinstance(found, str) else None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators inside, and give them back their state."""
    cuda_in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch has no types here
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda_in_use else ()):
        torch.manual_seed(seed)
        yield


@contextmanager
def _bar_on_a_terminal() -> Iterator[None]:
    """Let transformers draw its loading bar only on a terminal, and only in one process of many."""
    is_seen = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    was_on = progress_bars.is_progress_bar_enabled()
    if was_on and not is_seen:
        progress_bars.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no annotations
    try:
        yield
    finally:
        if was_on and not is_seen:
            progress_bars.enable_progress_bar()  # type: ignore[no-untyped-call]  # as above


def named_model(
    model: str | PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: CaptureSettings,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return a model and its tokenizer; load both if `model` is a name, unless a tokenizer is given.

    Raises:
        PlanError: There is no such model or device, the tokenizer cannot be loaded, or `model` is a torch pipeline.
    """
    if isinstance(model, PIPELINE_TYPES):
        raise PlanError(
            f"a model was expected, and a {type(model).__name__} was given: torch's pipelines can be captured, "
            "replayed and tapped, but not swept"
        )
    if not isinstance(model, str | PathLike):
        return replica_of(model), tokenizer
    name = fspath(model)
    return load_model(name, settings), tokenizer or load_tokenizer(name, settings)


@contextmanager
def replayed_model(
    archive: Archive, model: str | PathLike[str] | PreTrainedModel | PipelineScheduleSingle, settings: CaptureSettings
) -> Iterator[PreTrainedModel]:
    """Yield what `captured_model` returns; for the schedule of a torch pipeline, this process's stage.

    Raises:
        PlanError: There is no such model or device, or the pipeline's stages cannot be run.
    """
    if not isinstance(model, PIPELINE_TYPES):
        yield captured_model(archive, model, settings)
        return
    with as_model(model) as stage:
        yield stage


def model_first(model: Any, archive: Any, call: str) -> tuple[Any, Any]:
    """Return a model and an archive in this order, as they were given or, with a warning, in the order of version 0.1.

    Args:
        model: The first argument.
        archive: The second argument.
        call: The public name that was called.
    """
    is_archive_first = isinstance(model, Archive) or (
        isinstance(model, str | PathLike)
        and (not isinstance(archive, str | PathLike) or not _may_be_archive(archive))
        and _may_be_archive(model)
    )
    if not is_archive_first:
        return model, archive
    warnings.warn(
        f"{call} takes the model first, then the archive: the other order will be refused in the next version",
        DeprecationWarning,
        stacklevel=3,
    )
    return archive, model


def _may_be_archive(place: str | PathLike[str]) -> bool:
    return is_remote(place) or (Path(place) / ROOT).is_file()


def captured_model(
    archive: Archive, model: str | PathLike[str] | PreTrainedModel, settings: CaptureSettings
) -> PreTrainedModel:
    """Return `model`; if it is a name, load it with the data type and the attention of the capture.

    Args:
        archive: The archive that was captured.
        model: A model or its name; a model that is wrapped for training is unwrapped.
        settings: The device to load it on, and the number of processes to split it over.

    Raises:
        PlanError: There is no such model or device.
    """
    if not isinstance(model, str | PathLike):
        return replica_of(model)
    attention, dtype = archive.plan.model["attention"], str(archive.plan.model["dtype"])
    wanted = None if attention is None else str(attention)
    return load_model(fspath(model), replace(settings, attn_implementation=wanted, model_dtype=dtype))


def _config_and_class(name: str, revision: str | None) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error) from error
    if not config.architectures:
        raise PlanError(
            f"the configuration of {named('model', name)} names no class of transformers ('architectures' is "
            "empty), so the class of the model is not known: add it, or load the model yourself and pass it to "
            "residua.capture_dataset"
        )
    wanted = config.architectures[0]
    kind = getattr(transformers, wanted, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise PlanError(
            f"{named('model', name)} is of class {wanted!r}, which transformers {transformers.__version__} does not "
            "have: load the model yourself and pass it to residua.capture_dataset"
        )
    return config, kind


def is_pair_model(model: object, settings: CaptureSettings) -> bool:
    """Return whether a model, or the one of a name, is an encoder-decoder; of a name only its config is read.

    Raises:
        PlanError: There is no such model.
    """
    if isinstance(model, str | PathLike):
        try:
            config = AutoConfig.from_pretrained(fspath(model), revision=settings.revision)
        except (OSError, ValueError):
            return False  # loading the model says what is wrong
        return bool(getattr(config, "is_encoder_decoder", False))
    return isinstance(model, nn.Module) and is_encoder_decoder(model)


def _not_loaded(name: str, error: Exception) -> PlanError:
    where = "that folder" if Path(name).exists() else "the hub (and there is no such folder here)"
    return PlanError(f"{named('model', name)} could not be loaded from {where}: {error}")


def load_tokenizer(name: str, settings: CaptureSettings) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of the model `name`; None if the model comes without one.

    Raises:
        PlanError: The tokenizer cannot be loaded, or its files have no vocabulary; the cause is chained.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=settings.revision)
    except Exception as error:  # whatever transformers, or tokenizers below it, raises for a broken file
        if not any(file in _TOKENIZER_FILES for file in _files_of(name, settings.revision)):
            return None
        raise PlanError(f"the tokenizer of {named('model', name)} could not be loaded: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    if knows_text(tokenizer):
        return tokenizer
    # transformers 5 makes an empty tokenizer of whatever class the config suggests.
    found = sorted(_TOKENIZER_FILES.intersection(_files_of(name, settings.revision)))
    if found:
        raise PlanError(
            f"the tokenizer of {named('model', name)} has no vocabulary: of its files there is only "
            f"{', '.join(found)}; add the others, remove these, or pass a tokenizer"
        )
    return None


def tokenizer_of(model: nn.Module | PipelineScheduleSingle) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of the folder or hub id that a model was loaded from; None if there is none."""
    config = getattr(core_of(model), "config", None) if isinstance(model, nn.Module) else None
    name = getattr(config, "name_or_path", "")
    try:
        return load_tokenizer(name, CaptureSettings()) if name else None
    except PlanError:
        return None


def _files_of(name: str, revision: str | None) -> list[str]:
    if Path(name).is_dir():
        return [path.name for path in Path(name).iterdir()]
    try:
        return list_repo_files(name, revision=revision)
    except Exception as error:  # offline, gated, gone: the library has a class for each
        raise PlanError(
            f"there is no folder {name}, and the tokenizer of {named('model', name)} could not be loaded from the "
            f"hub: {error}"
        ) from error


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; ``auto`` is CUDA if there is a CUDA device, else the CPU.

    With ``auto``, each of several processes on a machine takes the device of its `LOCAL_RANK`.

    Raises:
        PlanError: There is no such device.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PlanError(f"{named('device', name)} is not a device: use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PlanError(
            f"{named('device', name)} was asked for, but torch {torch.__version__} sees no CUDA device here"
        )
    return device


def token_limit(model: PreTrainedModel) -> int | None:
    """Return the most tokens that the model takes in one example; None if its config has no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit - first_position(model) if isinstance(limit, int) and limit > 0 else None


def load_empty_model(name: str, revision: str | None = None) -> PreTrainedModel:
    """Build the model `name` from its config alone, on the meta device: it has shapes, but no weights.

    Raises:
        PlanError: There is no such model.
    """
    config, kind = _config_and_class(name, revision)
    with torch.device("meta"):
        model: PreTrainedModel = model_from_config(kind, config)
    model.train(False)
    return model


@contextmanager
def stages_in_parallel() -> Iterator[None]:
    """Let `from_pretrained` load a pipeline of tensor-parallel stages, which transformers 5.23 cannot do by itself.

    transformers makes the tensor-parallel plan of the full model, puts stand-ins where other stages have their blocks,
    and then looks up every module and parameter of the plan. That ends in a `KeyError` for those of other stages. Here
    they are removed from the plan before the look-up. A test fails as soon as this is no longer needed.

    Wrap the loading of one model in this. Meanwhile the step is replaced in all threads of the process.

    Raises:
        PlanError: This version of transformers loads such models in another way.
    """
    try:
        from transformers.distributed import mixin  # versions before 5.2x do not have it

        apply_plan = vars(mixin)[_APPLY_PLAN]
    except (ImportError, KeyError) as error:
        raise _other_transformers() from error
    n_calls = 0

    def apply_to_this_stage(model: nn.Module, mesh: Any, plan: dict[str, str]) -> Any:
        nonlocal n_calls
        n_calls += 1
        here = {name for name, module in model.named_modules() if not is_placeholder(module)}
        here |= {name for name, _ in model.named_parameters()}
        return apply_plan(model, mesh, {name: style for name, style in plan.items() if name in here})

    setattr(mixin, _APPLY_PLAN, apply_to_this_stage)
    try:
        yield
    except KeyError as error:
        raise _other_transformers() from error
    finally:
        setattr(mixin, _APPLY_PLAN, apply_plan)
    if n_calls != 1:
        raise _other_transformers()


def _other_transformers() -> PlanError:
    return PlanError(
        f"{named('tp')} and {named('pp')} together work with transformers 5.23 only, and transformers "
        f"{transformers.__version__} is installed, which splits models in another way: use one of the two flags, or "
        "install transformers 5.23"
    )
