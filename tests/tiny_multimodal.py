"""Small vision-language models with random weights and their processors, as transformers saves them, and rows of small
pictures with known answers.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIDE, PATCH = 16, 4
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
KINDS = ("llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "gemma3")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220), "white": (240, 240, 240)}

# As published ones are made: all content in parts (LLaVA, Idefics), or a text too (Qwen, Gemma).
IN_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}{IMAGE}"
    "{% elif c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OR_TEXT = IN_PARTS.replace(
    "{% for c in m.content %}", "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
).replace("{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>")
MARKS = {
    "llava": ("<image>",),
    "qwen2_5_vl": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "qwen3_vl": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "idefics3": (
        "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    ),
    "gemma3": ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
}  # fmt: skip
WRITTEN = {  # by the template, where a picture stands
    "llava": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "idefics3": "<image>",
    "gemma3": "<start_of_image>",
}


def template_of(kind: str) -> str:
    """The chat template that a kind's processor has."""
    return (IN_PARTS if kind in ("llava", "idefics3") else OR_TEXT).replace("{IMAGE}", WRITTEN[kind])


def make_processor(kind: str) -> Any:
    """The processor of a kind, over a byte-level tokenizer."""
    from transformers import (
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        LlavaImageProcessorPil,
        LlavaProcessor,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessorPil,
        Qwen3VLProcessor,
    )

    template, tokenizer = template_of(kind), _tokenizer(kind)
    if kind == "llava":
        square = {"height": SIDE, "width": SIDE}
        images = LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
        more = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaProcessor(images, tokenizer, chat_template=template, **more)
    if kind.startswith("qwen"):
        images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, min_pixels=SIDE**2, max_pixels=4 * SIDE**2)
        made = without_video(Qwen2_5_VLProcessor if kind == "qwen2_5_vl" else Qwen3VLProcessor)
        return made(images, tokenizer, None, chat_template=template)
    if kind == "idefics3":
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=True
        )
        return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)


def without_video(kind: Any) -> Any:
    """A class of processors that takes None for what reads videos, which transformers has with torchvision alone."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if argument is None else kind.check_argument_for_proper_class(self, name, argument)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


def _tokenizer(kind: str) -> Any:
    from tiny import byte_tokenizer

    tokenizer = byte_tokenizer(290)
    named: dict[str, str] = {}
    if kind == "gemma3":
        names = ("image_token", "boi_token", "eoi_token")
        named = dict(zip(names, MARKS[kind], strict=True))
    tokenizer.add_special_tokens({"extra_special_tokens": list(MARKS[kind])})
    if named:
        tokenizer._set_model_specific_special_tokens(named)
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def make_config(kind: str, tokenizer: Any, **own: Any) -> Any:
    """Of a small model of a kind; `own` values are the text model's."""
    from transformers import AutoConfig

    def token(mark: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(mark))

    text = TEXT | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id} | own
    if kind == "llava":
        vision = VISION | {"model_type": "clip_vision_model", "projection_dim": 32}
        more = {"image_token_id": token("<image>"), "vision_feature_layer": -2}
        return AutoConfig.for_model(kind, text_config=text | {"model_type": "llama"}, vision_config=vision, **more)
    if kind.startswith("qwen"):
        vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "patch_size": PATCH}
        vision |= {"spatial_merge_size": 2, "out_hidden_size": 64}
        ids = {"image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>")}
        ids |= {"vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>")}
        if kind == "qwen2_5_vl":
            vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
            text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
        else:
            vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
            rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
            text |= {"rope_parameters": rope, "head_dim": 16}
        return AutoConfig.for_model(kind, text_config=text, vision_config=vision, **ids)
    if kind == "idefics3":
        more = {"image_token_id": token("<image>"), "scale_factor": 2}
        return AutoConfig.for_model(kind, text_config=text | {"model_type": "llama"}, vision_config=VISION, **more)
    marks = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
    names = ("image_token_id", "boi_token_index", "eoi_token_index")
    more = dict(zip(names, map(token, marks), strict=True)) | {"mm_tokens_per_image": 4}
    text |= {"head_dim": 16, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    vision = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
    return AutoConfig.for_model(kind, text_config=text | {"query_pre_attn_scalar": 16}, vision_config=vision, **more)


def make_multimodal(folder: Path, kind: str, **own: Any) -> Path:
    """A model of a kind in fp32 and its processor."""
    import torch
    from transformers import AutoModelForImageTextToText

    processor = make_processor(kind)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(make_config(kind, processor.tokenizer, **own))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # so that what differs shows
    model.save_pretrained(folder)
    for part in (processor.tokenizer, processor.image_processor):  # as publishers did before they had one file for all
        part.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template_of(kind))
    own = {name: value for name, value in processor.to_dict().items() if name not in ("image_processor", "tokenizer")}
    (folder / "processor_config.json").write_text(json.dumps(own))
    return folder


# ---- rows ----------------------------------------------------------------------------------------


def picture(colour: str, number: int = 0) -> Any:
    """A picture of one colour, of a size and a shade of its own."""
    from PIL import Image

    shade = tuple(max(0, min(255, part + number * 7 % 30 - 15)) for part in COLOURS[colour])
    return Image.new("RGB", (20 + number * 5 % 17, 18 + number * 3 % 13), shade)


def make_rows(folder: Path, count: int = 24, seed: int | None = None) -> Path:
    """Rows of pictures and what colour they are of, beside the PNG files that they name; the colours in turn, or drawn,
    so that no question tells its answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        drawn = number if seed is None else random.Random(seed + number).randrange(len(COLOURS))
        colour = tuple(COLOURS)[drawn % len(COLOURS)]
        name = f"{number:03}.png"
        picture(colour, number).save(folder / name)
        rows.append(row_of([name], f"Which colour, {number}?", colour))
    return write_rows(folder / "rows.jsonl", rows)


def row_of(pictures: Sequence[Any], question: str, answer: str) -> dict[str, Any]:
    """A row in parts."""
    asked = [*({"type": "image", "image": each} for each in pictures), {"type": "text", "text": question}]
    said = [{"type": "text", "text": answer}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
