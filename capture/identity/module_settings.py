"""What a model computes with beside its weights and its config: classes, attributes, adapters and hooks of its modules.

A layer's scale or epsilon is an attribute that anybody may set; an adapter is switched on and off by one. The
description is short enough to be kept in an archive: modules that differ by their number only are one entry, such as
``model.layers.*.self_attn.scaling``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from torch import nn

from residua.capture.identity.fingerprint import WeightsSeen
from residua.capture.runtime.compat import ADAPTER_STATE, forward_hooks_of
from residua.capture.runtime.sharded import plain_class
from residua.capture.runtime.wrappers import core_of, named_modules
from residua.store.base.canonical import Json, digest_of

HOOKS = "hooks"
"""Last part of an entry that lists a module's hooks, and what replaces its forward."""

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "fairscale", "peft", "residua", "bitsandbytes")
_ADAPTED_LAYERS = ("BaseTunerLayer", "AuxiliaryTrainingWrapper")  # PEFT's: with adapters, or trained as a whole
_ADAPTER = {**ADAPTER_STATE, "merged adapters": "merged_adapters", "scaling": "scaling"}
# Attributes that a model changes by itself, or that number its modules.
_NOT_SETTINGS = frozenset(
    (
        *("training", "layer_idx", "layer_id", "gradient_checkpointing", "max_seq_len_cached", "name_or_path"),
        *("use_cache", "compute_type_is_set", "support_avx512bf16_for_cpu"),
    )
)
_MOST_ENTRIES = 2_000
_MOST_RUNS = 8
_MOST_CHANGES = 4


def module_settings(model: nn.Module) -> dict[str, Json]:
    """Return the settings of a model's modules, as texts by the path of the module and the attribute's name."""
    found: dict[str, list[str]] = {}
    for path, module in named_modules(model).items():
        for name, value in _settings(core_of(module)):
            key = _NUMBER.sub(".*", f"{path}.{name}" if path else name)
            found.setdefault(key, []).append(value)
    settings: dict[str, Json] = {key: _collapsed(values) for key, values in sorted(found.items())}
    return settings if len(settings) <= _MOST_ENTRIES else {"digest": digest_of(settings)}


def _settings(module: nn.Module) -> Iterator[tuple[str, str]]:
    kind = plain_class(module)
    yield "class", kind.__name__
    is_of_torch = kind.__module__.startswith("torch.")
    is_adapter = not {base.__name__ for base in kind.__mro__}.isdisjoint(_ADAPTED_LAYERS)
    hooks = [name for name in map(_users, forward_hooks_of(module)) if name]
    for name, value in sorted(vars(module).items()):
        if name == "forward":
            hooks += [f"forward = {function}" for function in [_users(value)] if function]
        elif name.startswith("_") or name in _NOT_SETTINGS or (is_adapter and name in _ADAPTER.values()):
            continue
        elif isinstance(value, float) or (isinstance(value, bool | int | str) and not is_of_torch):
            yield name, repr(value)
        elif callable(value) and not isinstance(value, nn.Module | type) and (function := _users(value)):
            yield name, function
    if is_adapter:
        yield from ((name, _text(getattr(module, attribute, None))) for name, attribute in _ADAPTER.items())
    if hooks:
        yield HOOKS, ", ".join(hooks)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return repr({str(key): value[key] for key in sorted(value, key=str)})
    return repr([value] if isinstance(value, str) else value)


def _users(function: Any) -> str:
    """Return the name of a function of the user's; empty for a library's, which wraps and shards modules."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    named = function if hasattr(function, "__qualname__") else type(function)
    home = str(getattr(named, "__module__", ""))
    return "" if home.partition(".")[0] in _LIBRARIES else f"{home}.{named.__qualname__}"


def _collapsed(values: Sequence[str]) -> str:
    """Return the values of an attribute over numbered modules as one text."""
    runs = [(value, len(list(equal))) for value, equal in groupby(values)]
    if len(runs) == 1:
        return runs[0][0]
    text = ", ".join(f"{value} x {count}" for value, count in runs)
    return text if len(runs) <= _MOST_RUNS else f"{len(values)} values, digest {digest_of(list(values))[:16]}"


def adapters_of(model: nn.Module) -> dict[str, Json]:
    """Return the configs of the adapters (PEFT) in a model by name, as texts by setting; empty if there is none."""
    core = core_of(model)
    wrapped = [model, core, *core.modules()]
    configs = next((found for module in wrapped if (found := vars(module).get("peft_config"))), None)
    if not isinstance(configs, Mapping):
        return {}
    return {str(name): _config(config) for name, config in configs.items()}


def _config(config: Any) -> dict[str, Json]:
    values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return {
        str(key): repr(sorted(value, key=str)) if isinstance(value, set) else str(getattr(value, "value", value))
        for key, value in values.items()
        if value not in (None, False, [], {}, set())
    }


@dataclass(frozen=True, kw_only=True)
class SettingsComparison:
    """How the settings of a model's modules differ from those of the captured one, one line each.

    Attributes:
        attributes: Differing attributes, classes and adapters.
        hooks: Differing hooks and replaced forwards, which may change nothing.
    """

    attributes: tuple[str, ...]
    hooks: tuple[str, ...]


def compare_settings(
    then: Mapping[str, object],
    now: Mapping[str, object],
    *,
    both: bool,
    times: tuple[str, str] = ("in the archive", "here"),
) -> SettingsComparison:
    """Compare the settings of a model's modules with those of the captured one.

    Args:
        then: Those of the captured model.
        now: Those of this model.
        both: Compare only what both have, as other versions of a library may have other attributes.
        times: What to call the two.
    """
    lines: list[tuple[str, str]] = []
    for key in sorted({*then, *now}):
        before, after = then.get(key), now.get(key)
        is_hook = key.rpartition(".")[2] == HOOKS
        if before == after or (both and not is_hook and (before is None or after is None)):
            continue
        lines.append((key, f"{key}: {before or 'nothing'} {times[0]}, {after or 'nothing'} {times[1]}"))
    return SettingsComparison(
        attributes=tuple(line for key, line in lines if key.rpartition(".")[2] != HOOKS),
        hooks=tuple(line for key, line in lines if key.rpartition(".")[2] == HOOKS),
    )


class ModelState:
    """What a model was at one time, to notice that it changed since: weights, settings of modules, adapters, hooks."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights = WeightsSeen(core_of(model))
        self._settings = module_settings(model)

    def changes(self) -> list[str]:
        """Return one line for each thing that changed since, at most a few."""
        settings = compare_settings(
            self._settings, module_settings(self._model), both=False, times=("before", "afterwards")
        )
        lines = [*(["weights"] if self._weights.have_changed() else []), *settings.attributes, *settings.hooks]
        return lines if len(lines) <= _MOST_CHANGES else [*lines[:_MOST_CHANGES], f"{len(lines) - _MOST_CHANGES} more"]
