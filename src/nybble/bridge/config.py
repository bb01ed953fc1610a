"""NybbleConfig: how transformers is told to put a model into few bits, and what a folder says of itself.

Registered with transformers (`register_quantization_config`, `AutoConfig.register`), so that `from_pretrained` opens a
folder whose weights only nybble reads once this is imported.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from nybble.calibration.search import check_searchable
from nybble.errors import ConfigError, FormatError, ModelError
from nybble.formats.bnb import MIXED, OWN_MODEL_TYPE, formats_from_config, true_config
from nybble.formats.format import DEFAULT_FORMAT, FORMATS
from nybble.formats.quant_spec import BaseFormats, QuantSpec

METHOD = "nybble"
QUALITIES = ("absmax", "search")
OPTIONS = ("format", "block_size", "double_quant", "quality", "skip_modules")
OF_FOLDERS = ("quant_method", "layers", "compute_dtype", "model_type")  # what else a folder's config holds


@register_quantization_config(METHOD)
class NybbleConfig(QuantizationConfigMixin):
    """How the linear layers of a model's blocks, and the experts of a mixture, go into few bits.

    Args:
        format: one of `nybble quantize --format`: nf4, fp4, int4, int4_asym, nf3, nf2.
        block_size: consecutive weights that share a scale.
        double_quant: store the scales in 8 bits too.
        quality: how scales are chosen, absmax as bitsandbytes or search by least error of the weights.
        skip_modules: what stays in 16 bits: names of modules, ends of names, or patterns. Embeddings, head, norms and
            routers do anyway.

    Raises:
        ConfigError: an option has an unknown name or value.
        FormatError: the format or block size is unknown, or its scales cannot be searched.

    Example:
        >>> config = nybble.NybbleConfig(format="nf4", skip_modules=["down_proj"])
        >>> model = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=config)
    """

    def __init__(
        self,
        format: str = DEFAULT_FORMAT,
        block_size: int = 64,
        double_quant: bool = True,
        quality: str = "absmax",
        skip_modules: Sequence[str] = (),
        **of_folder: Any,
    ):
        if unknown := [name for name in of_folder if name not in OF_FOLDERS]:
            near = difflib.get_close_matches(unknown[0], OPTIONS, n=1)
            raise ConfigError(
                f"NybbleConfig has no option {unknown[0]!r}.",
                f"Allowed: {', '.join(OPTIONS)}.",
                f"Did you mean {near[0]!r}?" if near else "",
            )
        self.quant_method = METHOD
        self.format, self.block_size, self.double_quant = format, block_size, double_quant
        self.quality, self.skip_modules = quality, [skip_modules] if isinstance(skip_modules, str) else [*skip_modules]
        self.layers: dict[str, str] = dict(of_folder.get("layers") or {})
        self.check()

    def check(self) -> None:
        """Refuse what cannot be made, before anything is read."""
        if self.quality not in QUALITIES:
            raise ConfigError(
                f"quality is {self.quality!r}.",
                f"Allowed while loading: {', '.join(QUALITIES)}.",
                "For calibrated weights write a folder with `nybble quantize --quality calibrated` and load that.",
            )
        for name in self.formats.names:
            if name not in FORMATS:
                raise FormatError(f"{name} is read and never made.", f"Allowed: {', '.join(FORMATS)}.")
            if self.quality != "absmax":
                check_searchable(name)

    @property
    def formats(self) -> BaseFormats:
        """As formats/ knows it."""
        given = {"format": self.format, "layers": self.layers, "double_quant": self.double_quant}
        config = {"quant_method": METHOD, "block_size": self.block_size, **given}
        found = formats_from_config({"quantization_config": config})
        assert found is not None
        return found

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds, as `nybble quantize` writes it."""
        stored = {name: value for name, value in vars(self).items() if name != "layers"}
        return stored | ({"layers": dict(self.layers)} if self.layers else {})


class _FolderConfig(PretrainedConfig):
    """Stands for the config of a folder that `nybble quantize` wrote in a format of its own: gives the true one."""

    model_type = OWN_MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **keywords: Any) -> Any:
        config = true_config(config_dict)
        if config.get("model_type") not in CONFIG_MAPPING:
            raise ModelError(
                f"The folder's model_type is {config.get('model_type')!r}.", "Allowed: those that transformers has."
            )
        return CONFIG_MAPPING[config["model_type"]].from_dict(config, **keywords)


AutoConfig.register(OWN_MODEL_TYPE, _FolderConfig)


def read_config(path: str, **keywords: Any) -> Any:
    """The config of a model that is stored in four bits, such that nybble loads it: bitsandbytes' folders too.

        AutoModelForCausalLM.from_pretrained(path, config=nybble.hf.read_config(path))

    Args:
        keywords: of `AutoConfig.from_pretrained`.

    Raises:
        ModelError: it is not in four bits, or in those of another program.
    """
    config = AutoConfig.from_pretrained(path, **keywords)
    stored = config.to_dict().get("quantization_config") or {}
    formats = None
    if stored.get("quant_method") in (METHOD, "bitsandbytes"):
        formats = formats_from_config({"quantization_config": stored})
    if formats is None:
        raise ModelError(
            f"{path} is stored by {stored.get('quant_method', 'nothing')!r}, in no format that is kept as it is.",
            "Allowed: folders in four bits of nybble or bitsandbytes.",
            "Load it with quantization_config=nybble.NybbleConfig(..), or write such a folder with `nybble quantize`.",
        )
    spec: QuantSpec = formats.spec
    config.quantization_config = {
        "quant_method": METHOD,
        "format": MIXED if formats.layers else spec.format,
        "layers": dict(formats.layers),
        "block_size": spec.block_size,
        "double_quant": spec.double_quant,
        "skip_modules": stored.get("skip_modules") or stored.get("llm_int8_skip_modules") or [],
    }
    return config
