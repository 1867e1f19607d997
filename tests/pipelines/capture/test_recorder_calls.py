"""What users do inside a recorder: caches, packing, embeddings, encoder-decoders, images, generation, taps."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

import residua
from residua.store.base.errors import CaptureError, PlanError, ResiduaError
from residua.store.examples.index import NO_TOKEN, OTHER_INPUTS
from tests.adapters import adapted, lora
from tests.models.tiny import LAYERS, LONGEST, TINY, VOCABULARY

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama() -> Any:
    model: Any = TINY["llama"]()
    model.generation_config.eos_token_id = None
    return model


def record(model: Any, out: Path, call: Callable[[], object], sites: str = "resid_post.1", **options: Any) -> Any:
    """Record what `call` runs, and open the archive."""
    with residua.Recorder(model, sites=sites, out=out, **options), torch.no_grad():
        call()
    assert residua.verify(out).is_sound
    return residua.open(out)


def states(model: Any, layer: int, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[layer]
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_packed_documents_are_recorded_as_if_each_ran_alone(name: str, tmp_path: Path) -> None:
    model: Any = TINY[name]()
    lengths = ((4, 5), (2, 1, 6))
    numbers = torch.tensor([[p for n in parts for p in range(n)] for parts in lengths])
    sites = "resid_post.1,pattern.0,z.1"
    archive = record(
        model,
        tmp_path / "a.zarr",
        lambda: model(input_ids=IDS, position_ids=numbers, use_cache=False),
        sites,
        max_length=LONGEST,
        rows_per_shard=4,
    )
    documents = [d for row, parts in zip(IDS, lengths, strict=True) for d in row.split(list(parts))]
    assert [list(ids) for ids in archive.examples["input_ids"].to_pylist()] == [d.tolist() for d in documents]
    assert archive.rows.position[...].tolist() == [p for d in documents for p in range(len(d))]
    eager: Any = TINY[name]()
    eager.set_attn_implementation("eager")
    for number, document in enumerate(documents):
        found = archive.example(number)
        with torch.no_grad():
            alone = eager(document[None], output_hidden_states=True, output_attentions=True, use_cache=False)
        assert np.allclose(found["resid_post.1"], alone.hidden_states[2][0].numpy(), atol=1e-4)
        pattern = found["pattern.0"]
        assert np.allclose(pattern[..., : len(document)], alone.attentions[0][0].transpose(0, 1).numpy(), atol=1e-5)
        assert not pattern[..., len(document) :].any()
    assert any("packed" in note for note in archive.provenance["notes"])


def test_rows_of_embeddings_have_no_token(llama: Any, tmp_path: Path) -> None:
    embedded = llama.get_input_embeddings()(IDS).detach()
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    calls = [
        {"inputs_embeds": embedded, "position_ids": torch.arange(9)[None]},
        {"inputs_embeds": embedded, "attention_mask": mask, "input_ids": None},
    ]
    archive = record(llama, tmp_path / "a.zarr", lambda: [llama(**call) for call in calls])
    assert set(archive.rows.token[...].tolist()) == {NO_TOKEN}
    assert archive.rows.position[...].tolist() == [*range(9), *range(9), *range(6), *range(9)]
    expected = torch.cat([states(llama, 2, **calls[0]).flatten(0, 1), states(llama, 2, **calls[1])[mask.bool()]])
    assert np.allclose(archive["resid_post.1"][...], expected.numpy(), atol=1e-5)
    with pytest.raises(PlanError, match="no tokens"), residua.replay(llama, archive, examples=[0]):
        pass
    with pytest.raises(ResiduaError, match="no token"):
        archive.text(0)


def evaluated(model: Any) -> Any:
    return model.train(False)


def bart() -> Any:
    sizes: dict[str, Any] = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
    }
    torch.manual_seed(0)
    config = hf.BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=LONGEST, **sizes)
    return evaluated(hf.BartForConditionalGeneration(config))


def t5() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ids: dict[str, Any] = {"pad_token_id": 0, "decoder_start_token_id": 0}
    return evaluated(hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCABULARY, **sizes, **ids)))


SOURCE_MASK = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
STACKS: dict[str, tuple[Callable[[], Any], str]] = {
    "bart": (bart, "module:model.{}.layers.0@output"),
    "t5": (t5, "module:{}.block.0@output"),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("length", [9, 5])
def test_encoder_and_decoder_have_tokens_of_their_own(name: str, length: int, tmp_path: Path) -> None:
    """Also where source and target are padded to the same length."""
    make, site = STACKS[name]
    model, target = make(), (IDS.flip(0, 1) % 50 + 3)[:, :length]
    target_mask = torch.ones_like(target)
    target_mask[1, 3:] = 0
    call = {"input_ids": IDS, "attention_mask": SOURCE_MASK, "decoder_input_ids": target}
    call["decoder_attention_mask"] = target_mask
    with torch.no_grad():
        plain = model(**call, output_hidden_states=True)
    for part, ids, mask, hidden in (
        ("encoder", IDS, SOURCE_MASK, plain.encoder_hidden_states),
        ("decoder", target, target_mask, plain.decoder_hidden_states),
    ):
        archive = record(model, tmp_path / f"{part}.zarr", lambda: model(**call), site.format(part), head=False)
        assert archive.rows.token[...].tolist() == ids[mask.bool()].tolist()
        assert np.array_equal(archive[archive.sites[0]][...], hidden[1][mask.bool()].numpy())


def test_the_decoder_gets_its_tokens_from_labels_too(tmp_path: Path) -> None:
    model, labels = t5(), IDS % 50 + 3
    encoded = model.encoder(IDS)
    calls = [{"input_ids": IDS, "labels": labels}, {"encoder_outputs": encoded, "labels": labels}]
    archive = record(
        model, tmp_path / "a.zarr", lambda: [model(**c) for c in calls], "module:decoder.block.1@output", head=False
    )
    shifted = [[0, *row[:-1]] for row in labels.tolist()]
    assert [list(ids) for ids in archive.examples["input_ids"].to_pylist()] == shifted * 2


def test_what_an_encoder_decoder_cannot_give_is_refused(tmp_path: Path) -> None:
    model = t5()
    both = ["module:encoder.block.0@output", "module:decoder.block.0@output"]
    with pytest.raises(PlanError, match=r"encoder.block.0.*decoder.block.0.*two"):
        residua.Recorder(model, sites=both, out=tmp_path / "a.zarr")
    with residua.Recorder(model, sites=both[:1], out=tmp_path / "a.zarr", head=False), torch.no_grad():
        with pytest.raises(CaptureError, match="encoder_outputs"):
            model(encoder_outputs=model.encoder(IDS), decoder_input_ids=IDS)
        model(input_ids=IDS, decoder_input_ids=IDS)


Llama: Any = hf.LlamaForCausalLM


class TextAndImage(Llama):  # type: ignore[misc]  # a class of type Any
    """A language model whose embeddings take an image, as those of vision-language models do."""

    def forward(self, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        """Add the image to every token."""
        embedded = self.get_input_embeddings()(input_ids)
        embedded = embedded if pixel_values is None else embedded + pixel_values.mean((1, 2, 3))[:, None, None]
        return super().forward(inputs_embeds=embedded, **kwargs)


def text_and_image() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    config: Any = TINY["llama"]().config
    return evaluated(TextAndImage(config)), {"pixel_values": torch.randn(2, 3, 4, 4)}


@pytest.mark.parametrize("at", [None, "resid_post.1"])
def test_a_replay_without_what_was_recorded_is_refused_unless_it_is_given(at: str | None, tmp_path: Path) -> None:
    model, others = text_and_image()
    archive = record(model, tmp_path / "a.zarr", lambda: [model(input_ids=IDS), model(input_ids=IDS, **others)])
    assert archive.examples[OTHER_INPUTS].to_pylist() == [None, None, ["pixel_values"], ["pixel_values"]]
    with torch.no_grad():
        plain, seen = model(input_ids=IDS).logits, model(input_ids=IDS, **others).logits
    with pytest.raises(PlanError, match=r"example 2 .* pixel_values.*inputs="):
        residua.replay(model, archive, examples=[0, 2], at=at).__enter__()
    with residua.replay(model, archive, examples=[0, 1], at=at) as run:
        assert all(map(torch.equal, run.logits, plain))
    with residua.replay(model, archive, examples=[2, 3], at=at, inputs=others) as run:
        assert all(map(torch.equal, run.logits, seen))
    with residua.replay(model, archive, examples=[2], force=True) as run:
        assert any("pixel_values" in note for note in run.notes)
        assert torch.allclose(run.logits[0], plain[0])
    with pytest.raises(PlanError, match="input_ids"):
        residua.replay(model, archive, examples=[2], inputs={"input_ids": IDS}).__enter__()


CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertForSequenceClassification(config_of("bert")),
    "gpt2, more labels than tokens": lambda: hf.GPT2ForSequenceClassification(labelled(20)),
    "gpt2": lambda: hf.GPT2ForSequenceClassification(labelled(2)),
}


def config_of(name: str) -> Any:
    return TINY[name]().config


def labelled(n: int) -> Any:
    config = config_of("gpt2")
    config.num_labels = n
    return config


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_sites_and_logits_of_a_classifier_are_replayed(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = evaluated(CLASSIFIERS[name]())
    out = tmp_path / "a.zarr"
    archive = residua.capture_dataset(model, IDS[:, :3].tolist(), sites="resid_post.*", out=out).archive
    with residua.replay(model, archive, examples=[0, 1], at="resid_post.0", keep="resid_post.1") as run:
        expected = states(model, 2, input_ids=IDS[:, :3])
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(run["resid_post.1"], expected, strict=True))
        with torch.no_grad():
            logits = model(input_ids=IDS[:, :3]).logits
        assert [tuple(each.shape) for each in run.logits] == [(1, logits.shape[1])] * 2
        torch.testing.assert_close(torch.cat(run.logits), logits)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("site", ["resid_pre.1", "attn_out.1", "z.1", "q.1", "mlp_out.0", "resid_post.1", "logits"])
def test_what_is_stored_is_what_flows_on(llama: Any, site: str, inside: bool, tmp_path: Path) -> None:
    """A tap may be opened before the recorder or inside it; the model goes on with the changed value."""
    changed: list[Tensor] = []

    def change(_name: str, tensor: Tensor) -> Tensor:
        changed.append(tensor * 1.5 + 1)
        return changed[-1]

    with ExitStack() as stack, torch.no_grad():
        if not inside:
            stack.enter_context(residua.tap(llama, site, change))
        stack.enter_context(residua.Recorder(llama, sites=site, out=tmp_path / "a.zarr"))
        if inside:
            llama(IDS[:1])
            stack.enter_context(residua.tap(llama, site, change))
        n_before = len(changed)  # making a recorder may run the model
        output = llama(IDS).logits
    stored = residua.open(tmp_path / "a.zarr")[site][9 if inside else 0 :]
    assert np.array_equal(stored, changed[n_before].flatten(0, 1).numpy())
    if site == "logits":
        assert np.array_equal(stored, output.flatten(0, 1).numpy())


def test_a_hook_of_the_users_own_is_seen_too(llama: Any, tmp_path: Path) -> None:
    block: nn.Module = llama.model.layers[LAYERS - 1]
    with residua.Recorder(llama, sites=f"resid_post.{LAYERS - 1}", out=tmp_path / "a.zarr"), torch.no_grad():
        handle = block.register_forward_hook(lambda *call: torch.zeros_like(call[2]))
        llama(IDS)
    handle.remove()
    assert not residua.open(tmp_path / "a.zarr")[f"resid_post.{LAYERS - 1}"][...].any()


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "none": lambda model: model,
    "DDP": DistributedDataParallel,
    "PEFT": lambda model: adapted(model, lora("q_proj")),
    "both": lambda model: DistributedDataParallel(adapted(model, lora("q_proj"))),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", WRAPPERS)
def test_calls_of_a_wrapped_model_are_counted_once_and_failed_ones_forgotten(name: str, tmp_path: Path) -> None:
    model: Any = TINY["llama"]()
    wrapped = WRAPPERS[name](model)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    def loop() -> None:
        handle = model.model.layers[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            wrapped(input_ids=IDS)
        handle.remove()
        for batch in (IDS, IDS[:1, :4]):
            wrapped(input_ids=batch)

    archive = record(wrapped, tmp_path / "a.zarr", loop, "resid_post.0,q.1,logits", dtype="float32")
    expected = torch.cat([states(model, 1, input_ids=batch).flatten(0, 1) for batch in (IDS, IDS[:1, :4])])
    assert np.array_equal(archive["resid_post.0"][...], expected.numpy())
    assert archive.rows.token[...].tolist() == [*IDS.flatten().tolist(), *IDS[0, :4].tolist()]


class WithoutParameters(nn.Module):
    """Features without weights, as of a fixed filter."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool1d(2)
        self.flat = nn.Flatten(1)

    def forward(self, signal: Tensor) -> Tensor:
        """Halve a signal, (examples, channels, samples)."""
        found: Tensor = self.flat(self.pool(signal))
        return found


class WithBuffers(WithoutParameters):
    """The same with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((1,), 2.0))


@pytest.mark.parametrize("make", [WithoutParameters, WithBuffers])
def test_a_module_without_parameters_can_be_recorded(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, signal = make(), torch.randn(3, 2, 8)
    archive = record(model, tmp_path / "a.zarr", lambda: model(signal), "module:pool@output,module:flat@output")
    assert np.allclose(archive["module:pool@output"][...], signal.view(3, 2, 4, 2).mean(-1).numpy())
    assert archive.rows.token[...].tolist() == [NO_TOKEN] * 3


def test_a_recorded_model_is_known_again_by_its_output(tmp_path: Path) -> None:
    model: Any = TINY["llama"]()
    record(model, tmp_path / "a.zarr", lambda: model(IDS), "resid_post.*")
    with residua.replay(model, tmp_path / "a.zarr", examples=[0], at="resid_post.0") as run:
        assert not any("output" in note for note in run.notes)
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    with (
        pytest.raises(PlanError, match=r"(?s)output on a few tokens.*act_fn"),
        residua.replay(model, tmp_path / "a.zarr", examples=[0], at="resid_post.0"),
    ):
        pass


def train(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)


def switch_off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def hook(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *call: call[2] * 2)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "trained": (train, r"\(weights\)"),
    "switched": (switch_off, "adapters disabled: False before, True afterwards"),
    "hooked": (hook, "hooks"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("n_before", [0, 1, 2])
def test_a_model_that_changes_while_it_is_recorded_is_noted(name: str, n_before: int, tmp_path: Path) -> None:
    model: Any = TINY["llama"]()
    model = adapted(model, lora("q_proj")) if name == "switched" else model
    change, named = CHANGES[name]

    def loop() -> None:
        for number in range(4):
            if number == n_before:
                change(model)
            model(input_ids=IDS[:, :5])

    archive = record(model, tmp_path / "a.zarr", loop)
    found: Any = archive.provenance
    if n_before:
        (note,) = [note for note in found["notes"] if "changed while" in note]
        assert re.search(named, note)
        assert f"call {n_before + 1}:" in note
        assert isinstance(found["model"]["output"], dict)
    else:
        assert "changed after the recorder was made" in found["model"]["output"]
        assert not any("changed while" in note for note in found.get("notes", []))


def test_a_module_that_is_no_transformers_model_runs_in_the_loop_only(tmp_path: Path) -> None:
    calls: list[int] = []
    module = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    module.register_forward_hook(lambda *_: calls.append(1))
    record(module, tmp_path / "a.zarr", lambda: module(torch.ones(4, 3)), "module:0@output")
    assert len(calls) == 1
