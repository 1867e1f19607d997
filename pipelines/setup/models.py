"""Models and tokenizers from the hub or a folder, ready to be captured."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path

import torch
import transformers
from huggingface_hub import list_repo_files
from safetensors import SafetensorError
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as progress_bars

from residua.capture.forward.inputs import first_position
from residua.capture.runtime.pipeline_schedule import PIPELINES, as_model
from residua.capture.runtime.wrappers import replica_of
from residua.pipelines.setup.settings import CaptureSettings
from residua.pipelines.setup.stage_plans import stages_in_parallel
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive

_TOKENIZER_FILES = frozenset(
    ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
)


def load_model(name: str, settings: CaptureSettings) -> PreTrainedModel:
    """Load the model `name`, a hub id or a folder, in evaluation mode on its device.

    The class is the one that its config names, so that heads come along; no code of the checkpoint is ever run.

    Raises:
        PlanError: There is no such model, or the device is not there; the message says what was tried.
    """
    device = choose_device(settings.device)
    is_split = settings.tp * settings.pp > 1
    if is_split and settings.device not in ("auto", torch._C._get_accelerator().type):
        raise PlanError(f"--device {settings.device} and --tp or --pp contradict each other: leave the device to them")
    spread: str | dict[str, torch.device] | None = settings.device_map
    if spread is None and device.type != "cpu" and not is_split:
        spread = {"": device}  # straight to where it runs: a large model need not fit the host's memory
    torch.manual_seed(settings.seed)
    _, kind = _config_and_class(name, settings.revision)
    try:
        with stages_in_parallel() if min(settings.tp, settings.pp) > 1 else nullcontext(), _bar_on_a_terminal():
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
    model.requires_grad_(False).train(False)
    return model


@contextmanager
def _bar_on_a_terminal() -> Iterator[None]:
    """Let transformers draw the bar of its loading only where somebody sees it move, and in one process of many."""
    is_seen = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    was_on = progress_bars.is_progress_bar_enabled()
    if was_on and not is_seen:
        progress_bars.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it bare
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
    """Return a model and its tokenizer, both loaded if `model` is a name and no tokenizer is given.

    Raises:
        PlanError: There is no such model, the device is not there, or the tokenizer cannot be loaded.
    """
    if isinstance(model, PIPELINES):
        raise PlanError(
            f"a model was expected, and a {type(model).__name__} was given: torch's pipelines can be captured, "
            "replayed and tapped, and not swept"
        )
    if not isinstance(model, str | PathLike):
        return replica_of(model), tokenizer
    name = fspath(model)
    return load_model(name, settings), tokenizer or load_tokenizer(name, settings)


@contextmanager
def replayed_model(
    archive: Archive, model: str | PathLike[str] | PreTrainedModel | PipelineScheduleSingle, settings: CaptureSettings
) -> Iterator[PreTrainedModel]:
    """Yield what `captured_model` returns; of a torch pipeline's schedule, the part of the model that is here.

    Raises:
        PlanError: There is no such model, the device is not there, or the pipeline's stages cannot be run.
    """
    if not isinstance(model, PIPELINES):
        yield captured_model(archive, model, settings)
        return
    with as_model(model) as part:
        yield part


def captured_model(
    archive: Archive, model: str | PathLike[str] | PreTrainedModel, settings: CaptureSettings
) -> PreTrainedModel:
    """Return `model`, loaded in the type and with the attention that `archive` was captured with if it is a name.

    Args:
        archive: The archive.
        model: A model, or its name; one that is wrapped for training comes back without what is around it.
        settings: How one is loaded otherwise: device, and over how many processes it is split.

    Raises:
        PlanError: There is no such model, or the device is not there.
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
    wanted = (config.architectures or [""])[0]
    kind = getattr(transformers, wanted, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise PlanError(
            f"--model {name} names the class {wanted!r}, which transformers {transformers.__version__} does not have: "
            "load the model yourself and pass it to residua.capture_dataset"
        )
    return config, kind


def _not_loaded(name: str, error: Exception) -> PlanError:
    where = "that folder" if Path(name).exists() else "the hub (and there is no such folder here)"
    return PlanError(f"--model {name} could not be loaded from {where}: {error}")


def load_tokenizer(name: str, settings: CaptureSettings) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of `name`; None if it comes without one.

    Raises:
        PlanError: It has a tokenizer that cannot be loaded; the cause is chained.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=settings.revision)
    except Exception as error:  # whatever the library, or the Rust one below it, makes of a broken file
        if not any(file in _TOKENIZER_FILES for file in _files_of(name, settings.revision)):
            return None
        raise PlanError(f"the tokenizer of --model {name} could not be loaded: {error}") from error
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def _files_of(name: str, revision: str | None) -> list[str]:
    if Path(name).is_dir():
        return [path.name for path in Path(name).iterdir()]
    try:
        return list_repo_files(name, revision=revision)
    except Exception as error:  # offline, gated, gone: the library has a class for each
        raise PlanError(
            f"there is no folder {name}, and the tokenizer of --model {name} could not be loaded from the hub: {error}"
        ) from error


def choose_device(name: str) -> torch.device:
    """Return the device that `name` means; ``auto`` is CUDA where there is one, else the CPU.

    Of several processes on a machine, each takes the device of its `LOCAL_RANK`.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PlanError(f"--device {name} is not a device: use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PlanError(f"--device {name} was asked for, but torch {torch.__version__} sees no CUDA device here")
    return device


def token_limit(model: PreTrainedModel) -> int | None:
    """Return the most tokens that the model takes in one example, or None if it states no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit - first_position(model) if isinstance(limit, int) and limit > 0 else None


def load_empty_model(name: str, revision: str | None = None) -> PreTrainedModel:
    """Build the model `name` from its config alone, without weights or memory, to ask what it looks like.

    Raises:
        PlanError: There is no such model.
    """
    config, kind = _config_and_class(name, revision)
    with torch.device("meta"):
        model: PreTrainedModel = kind._from_config(config)  # type: ignore[no-untyped-call]  # transformers leaves it bare
    model.train(False)
    return model
