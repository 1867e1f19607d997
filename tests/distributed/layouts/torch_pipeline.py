"""A stage of a torch pipeline, split as its documentation says, and the check of its sites."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor.parallel import parallelize_module
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from residua.capture.taps.tap import tap
from tests.distributed.checks.capture import captured
from tests.distributed.checks.replay import replay_row
from tests.distributed.layouts.case import Case, Row
from tests.distributed.layouts.single_process import EDITS, inner_weight, site_names
from tests.distributed.layouts.tensor_parallel_llama import plan_of
from tests.models.tiny import SPLIT

Loss = Callable[[Tensor, Tensor], Tensor]


class Part(nn.Module):
    """The blocks of one stage of a Llama-like model; embedding in the first stage, norm and head in the last.

    With ``identities`` there is one in place of every block of another stage, and else nothing.
    """

    def __init__(self, model: PreTrainedModel, stage: int, n_stages: int, *, identities: bool = False) -> None:
        super().__init__()
        self.llm = model
        base: Any = model.base_model
        n_blocks = len(base.layers)
        mine = range(stage * n_blocks // n_stages, (stage + 1) * n_blocks // n_stages)
        blocks = {str(i): base.layers[i] if i in mine else nn.Identity() for i in range(n_blocks)}
        base.layers = nn.ModuleDict({i: block for i, block in blocks.items() if identities or int(i) in mine})
        self.is_first, self.is_last = stage == 0, stage == n_stages - 1
        if not self.is_first:
            del base.embed_tokens
        if not self.is_last:
            del base.norm
            del model.lm_head

    def forward(self, hidden: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        base: Any = self.llm.base_model
        hidden = base.embed_tokens(hidden) if self.is_first else hidden
        mask = create_causal_mask(
            config=self.llm.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        rotary = base.rotary_emb(hidden, position_ids)
        for block in (block for block in base.layers.values() if not isinstance(block, nn.Identity)):
            hidden = block(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=position_ids)
        result: Tensor = self.llm.get_submodule("lm_head")(base.norm(hidden)) if self.is_last else hidden
        return result


class Pipeline:
    """Runs a batch through the stages, so many microbatches at a time."""

    def __init__(
        self,
        name: str,
        n_microbatches: int,
        mesh: DeviceMesh | None,
        kind: type[ScheduleGPipe | Schedule1F1B] = ScheduleGPipe,
        loss: Loss | None = None,
        *,
        identities: bool = False,
    ) -> None:
        group = dist.group.WORLD if mesh is None else mesh.get_group("pp")
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        part = Part(SPLIT[name](), rank, size, identities=identities)
        names = (mesh and mesh.mesh_dim_names) or ()
        if mesh is not None and "tp" in names:
            parallelize_module(part.llm, mesh["tp"], plan_of(part.llm))
        if mesh is not None and "fsdp" in names:
            for module in (*part.llm.get_submodule("model.layers").children(), part):
                fully_shard(module, mesh=mesh["fsdp"])
        self.stage = PipelineStage(part, rank, size, torch.device("cpu"), group=group)
        self.schedule = kind(self.stage, n_microbatches, loss, scale_grads=False)

    def train(self, inputs: Any) -> None:
        """Run the batch forward and backward; the microbatches take turns as torch's schedule has it."""
        kwargs = {key: inputs[key] for key in ("attention_mask", "position_ids")}
        first = (inputs["input_ids"],) if self.stage.is_first else ()
        target = inputs["input_ids"] if self.stage.is_last else None  # of no use to the loss
        self.schedule.step(*first, target=target, **kwargs)

    def run(self, inputs: Any) -> Tensor | None:
        """Logits of the whole batch, in the last stage."""
        kwargs = {key: inputs[key] for key in ("attention_mask", "position_ids")}
        first = (inputs["input_ids"],) if self.stage.is_first else ()
        with torch.no_grad():
            result = self.schedule.step(*first, **kwargs)
        return result if isinstance(result, Tensor) else None


class PipelineCase(Case):
    """As `Case`, for a torch pipeline: sites come by microbatch, and logits are in the last stage."""

    def rows(self, n_microbatches: int, mesh: DeviceMesh | None = None) -> list[Row]:
        pipeline, kept = Pipeline(self.name, n_microbatches, mesh), dict[str, list[Tensor]]()
        seen: list[int | None] = []

        def keep(site: str, tensor: Tensor) -> None:
            kept.setdefault(site, []).append(tensor)
            seen.append(taps.microbatch)

        with tap(pipeline.stage, site_names(pipeline.stage.submod.get_submodule("llm"), self.name), keep) as taps:
            pipeline.run(self.inputs)
        is_owner = mesh is None or mesh.get_local_rank("tp") == 0
        assert set(seen) == (set(range(n_microbatches)) if is_owner else set())
        assert {len(found) for found in kept.values()} == ({n_microbatches} if is_owner else set())
        values = {site: torch.cat(found) for site, found in kept.items()}
        return [
            self._row("forward", values, self.expected.values),
            self._edits(pipeline),
            self._gradients(n_microbatches, mesh),
            replay_row(self, pipeline.schedule),
            self._training(n_microbatches, mesh),
            captured(self, Pipeline(self.name, n_microbatches, mesh).schedule),
        ]

    def _gradients(self, n_microbatches: int, mesh: DeviceMesh | None) -> Row:
        pipeline = Pipeline(self.name, n_microbatches, mesh, Schedule1F1B, self._loss)
        found: dict[str, dict[int | None, Tensor]] = {}

        def keep(site: str, gradient: Tensor) -> None:
            found.setdefault(site, {})[taps.microbatch] = gradient

        names = site_names(pipeline.stage.submod.get_submodule("llm"), self.name)
        with tap(pipeline.stage, names, keep, backward=True) as taps:
            pipeline.train(self.inputs)
        kept = {site: torch.cat([parts[index] for index in range(n_microbatches)]) for site, parts in found.items()}
        return self._row("gradients", kept, self.expected.gradients)

    def _training(self, n_microbatches: int, mesh: DeviceMesh | None) -> Row:
        pipeline, got = Pipeline(self.name, n_microbatches, mesh, ScheduleGPipe, self._loss), dict[str, Tensor]()
        for site, wanted in self.expected.trained.items():
            weight, inside = inner_weight(len(wanted))
            with tap(pipeline.stage, site, inside, differentiable=True):
                pipeline.train(self.inputs)
            got |= {} if weight.grad is None else {site: weight.grad}
        return self._of_stages("training", got, self.expected.trained)

    def _loss(self, logits: Tensor, _target: Tensor) -> Tensor:
        return logits.square().sum() / self.expected.logits.numel()

    def _edits(self, pipeline: Pipeline) -> Row:
        got, wanted = {}, {}
        edits = {key: logits for key, logits in self.expected.edited.items() if key[1] != "replace"}
        for (site, kind), logits in edits.items():  # "replace" exchanges examples, which microbatches keep apart
            with tap(pipeline.stage, site, EDITS[kind]):
                result = pipeline.run(self.inputs)
            if result is not None:
                got[f"{site} {kind}"], wanted[f"{site} {kind}"] = result, logits
        return self.noted("edits", got, wanted, n_sites=len({site for site, _ in edits}))
