"""Tiny vision-language models with random weights, and their processors, built without any download.

`MULTIMODAL` maps a name to a function that builds model and processor. The tokenizer knows one word a token.
"""

from collections.abc import Callable
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel

from tests.models.tiny_vision import build

_HF: Any = hf  # their processors have no annotations
LAYERS = 3
_WORDS = (
    "what is in this picture and that one a small red cat user assistant Here the original some crops to help you see"
)
_SPECIAL = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<image>",
    "<boi>",
    "<eoi>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
] + [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
_TEMPLATE = (
    "<bos>{% for m in messages %}{{ m.role }} {% for p in m.content %}"
    "{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,  # as many as the text model
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def tokenizer(image: str = "<image>", **extra: str) -> hf.PreTrainedTokenizerFast:
    """Return a tokenizer of words; `extra` names more tokens that a processor asks for, by kind."""
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *dict.fromkeys(_WORDS.split()), "\n", "\n\n"])}
    backend = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(_SPECIAL)
    made: hf.PreTrainedTokenizerFast = _HF.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{kind}_token": f"<{kind}>" for kind in ("pad", "bos", "eos", "unk")},
        extra_special_tokens={f"{kind}_token": word for kind, word in {"image": image, **extra}.items()},
    )
    return made


def _id(word: str) -> int:
    return _SPECIAL.index(word)


def _size() -> int:
    return len(tokenizer())


def _llava() -> tuple[PreTrainedModel, Any]:
    words = tokenizer()
    image = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    made = _HF.LlavaProcessor(
        image,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_TEXT, vocab_size=_size()),
        vision_config=hf.CLIPVisionConfig(**_VISION),
        image_token_index=_id("<image>"),
        image_seq_length=16,
    )
    return build(hf.LlavaForConditionalGeneration, config), made


class _WithoutVideos(hf.Qwen2VLProcessor):
    """Qwen2-VL's processor, where torchvision is not installed, which its videos need."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        """Accept that there is no video processor."""
        if argument_name != "video_processor":
            super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[no-untyped-call]  # theirs


def _qwen2_vl() -> tuple[PreTrainedModel, Any]:
    words = tokenizer("<|image_pad|>", video="<|video_pad|>")
    image = hf.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
    )
    make: Any = _WithoutVideos
    made = make(image, words, chat_template=_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"))
    config = hf.Qwen2VLConfig(
        text_config={
            **_TEXT,
            "vocab_size": _size(),
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0},
        },
        vision_config={
            "depth": LAYERS,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
        },
        image_token_id=_id("<|image_pad|>"),
        video_token_id=_id("<|video_pad|>"),
        vision_start_token_id=_id("<|vision_start|>"),
        vision_end_token_id=_id("<|vision_end|>"),
    )
    return build(hf.Qwen2VLForConditionalGeneration, config), made


def _gemma3() -> tuple[PreTrainedModel, Any]:
    words = tokenizer(boi="<boi>", eoi="<eoi>")
    image = hf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    made = hf.Gemma3Processor(image, words, image_seq_length=4, chat_template=_TEMPLATE.replace("IMAGE", "<boi>"))
    config = hf.Gemma3Config(
        text_config={**_TEXT, "vocab_size": _size(), "head_dim": 8, "sliding_window": 16},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=_id("<image>"),
        boi_token_index=_id("<boi>"),
        eoi_token_index=_id("<eoi>"),
    )
    return build(hf.Gemma3ForConditionalGeneration, config), made


def _paligemma() -> tuple[PreTrainedModel, Any]:
    image = _HF.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    image.image_seq_length = 16
    made = _HF.PaliGemmaProcessor(image, tokenizer())
    options: dict[str, Any] = {
        "text_config": {**_TEXT, "vocab_size": _size(), "head_dim": 8, "model_type": "gemma"},
        "vision_config": {**_VISION, "projection_dim": 32, "vision_use_head": False},
        "projection_dim": 32,
        "image_token_index": _id("<image>"),
    }
    return build(hf.PaliGemmaForConditionalGeneration, hf.PaliGemmaConfig(**options)), made


def _idefics3() -> tuple[PreTrainedModel, Any]:
    words = tokenizer(
        fake_image="<fake_token_around_image>", global_image="<global-img>", end_of_utterance="<end_of_utterance>"
    )
    image = hf.Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    made = hf.Idefics3Processor(image, words, image_seq_len=4, chat_template=_TEMPLATE.replace("IMAGE", "<image>"))
    config = hf.Idefics3Config(
        text_config={**_TEXT, "vocab_size": _size(), "model_type": "llama"},
        vision_config=_VISION,
        scale_factor=2,
        image_token_id=_id("<image>"),
    )
    return build(hf.Idefics3ForConditionalGeneration, config), made


Made = Callable[[], tuple[PreTrainedModel, Any]]

MULTIMODAL: dict[str, Made] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
}

WITHOUT_CHATS: dict[str, Made] = {"llava": _llava, "paligemma": _paligemma}
"""Models whose processors take texts with places for images."""
