"""Small vision models as transformers saves them, and folders of small pictures that can be told apart."""

from pathlib import Path
from typing import Any

SIDE = 16
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 4}
OWN_SIZES = {  # of those that are made of stages
    "convnext": {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2, "image_size": SIDE},
    "convnextv2": {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2, "image_size": SIDE},
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 1, 1]},
    "hiera": {
        "embed_dim": 32,
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 4],
        "num_query_pool": 2,
        "image_size": [64, 64],
    },
    "resnet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]},
    "segformer": {
        **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [32, 64]},
        **{"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]},
    },
    "swin": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2},
    "swinv2": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2},
}
for _swin in ("swin", "swinv2"):
    OWN_SIZES[_swin] |= {"image_size": SIDE, "patch_size": 2}
WITH_TEXTS = ("clip", "metaclip_2", "siglip", "siglip2")
CLASSES = {"across": lambda x, y: y, "down": lambda x, y: x, "slanted": lambda x, y: x + y}  # which way stripes run


def make_vision(folder: Path, kind: str = "vit", labels: tuple[str, ...] = (), **own: Any) -> Path:
    """A model of this kind with random weights: the bare one, or one that scores pictures; and its image processor."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageClassification,
        Siglip2ImageProcessorPil,
        SiglipImageProcessorPil,
        ViTImageProcessorPil,
    )

    sizes = SIZES | ({} if kind.startswith("dino") else {"intermediate_size": 64})
    sizes = OWN_SIZES.get(kind, sizes) | own
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    more = named if labels else {}
    if kind in WITH_TEXTS:
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = AutoConfig.for_model(kind, vision_config=sizes, text_config=text | {"vocab_size": 99}, **more)
    else:
        config = AutoConfig.for_model(kind, **sizes, **more)
    torch.manual_seed(0)
    model = (AutoModelForImageClassification if labels or kind in WITH_TEXTS else AutoModel).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that what differs shows
    model.save_pretrained(folder)
    if kind == "siglip2":
        Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16).save_pretrained(folder)
        return folder
    processor = SiglipImageProcessorPil if kind == "siglip" else ViTImageProcessorPil
    side = sizes.get("image_size", SIDE)
    side = side[0] if isinstance(side, list) else side
    processor(size={"height": side, "width": side}).save_pretrained(folder)
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
