"""Small vision models as transformers saves them, and folders of small pictures that can be told apart."""

from pathlib import Path
from typing import Any

SIDE = 16
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 4}
CLASSES = {"across": lambda x, y: y, "down": lambda x, y: x, "slanted": lambda x, y: x + y}  # which way stripes run


def make_vision(folder: Path, kind: str = "vit", labels: tuple[str, ...] = (), **own: Any) -> Path:
    """A model of this kind with random weights: the bare one, or one that scores pictures; and its image processor."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageClassification,
        SiglipImageProcessorPil,
        ViTImageProcessorPil,
    )

    sizes = SIZES | ({} if kind.startswith("dino") else {"intermediate_size": 64}) | own
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    more = named if labels else {}
    if kind == "siglip":
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = AutoConfig.for_model(kind, vision_config=sizes, text_config=text | {"vocab_size": 99}, **more)
    else:
        config = AutoConfig.for_model(kind, **sizes, **more)
    torch.manual_seed(0)
    model = (AutoModelForImageClassification if labels or kind == "siglip" else AutoModel).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that what differs shows
    model.save_pretrained(folder)
    processor = SiglipImageProcessorPil if kind == "siglip" else ViTImageProcessorPil
    processor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def picture(kind: str, number: int) -> Any:
    """Stripes that run one way, of a colour of their own."""
    import numpy as np
    from PIL import Image

    x, y = np.meshgrid(np.arange(20), np.arange(20))
    light = ((CLASSES[kind](x, y) + number % 2) // 4 % 2).astype(np.uint8)
    colour = np.array([200 + number % 50, 150 + number * 7 % 100, 90 + number * 13 % 120], dtype=np.uint8)
    return Image.fromarray(light[..., None] * colour)


def make_pictures(folder: Path, each: int = 16) -> Path:
    """PNG files, a folder a class."""
    for kind in CLASSES:
        (folder / kind).mkdir(parents=True)
        for number in range(each):
            picture(kind, number).save(folder / kind / f"{number:03}.png")
    return folder
