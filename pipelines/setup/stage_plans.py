"""Loading a pipeline of tensor-parallel stages, which transformers 5.23 cannot do by itself.

It makes the tensor-parallel plan of the whole model, then puts stand-ins where other stages have their blocks, and then
looks up every module and parameter of the plan, which ends in a `KeyError` over what another stage has. So what is not
here is left out of the plan between the two. A test says when this is no longer needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import nn

from residua.capture.sites.pipeline_stages import is_stand_in
from residua.store.base.errors import PlanError

_STEP = "apply_tensor_parallelism"


@contextmanager
def stages_in_parallel() -> Iterator[None]:
    """Let `from_pretrained` split each stage of a pipeline over processes; wrap the loading of one model in it.

    Meanwhile that step of transformers is another one, for all threads of this process.

    Raises:
        PlanError: This transformers goes about it in another way, so that its plan cannot be put right.
    """
    try:
        from transformers.distributed import mixin  # which versions before 5.2x do not have

        step = vars(mixin)[_STEP]
    except (ImportError, KeyError) as error:
        raise _unknown_way() from error
    n_calls = 0

    def split_what_is_here(model: nn.Module, mesh: Any, plan: dict[str, str]) -> Any:
        nonlocal n_calls
        n_calls += 1
        here = {name for name, module in model.named_modules() if not is_stand_in(module)}
        here |= {name for name, _ in model.named_parameters()}
        return step(model, mesh, {name: style for name, style in plan.items() if name in here})

    setattr(mixin, _STEP, split_what_is_here)
    try:
        yield
    except KeyError as error:
        raise _unknown_way() from error
    finally:
        setattr(mixin, _STEP, step)
    if n_calls != 1:
        raise _unknown_way()


def _unknown_way() -> PlanError:
    return PlanError(
        f"--tp and --pp were asked for together, and transformers {transformers.__version__} spreads models in another "
        "way than 5.23 does, which alone can be put right: choose one of the two, or install transformers 5.23"
    )
