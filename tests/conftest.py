"""What holds for every test: nothing reaches the network, GPU tests need a GPU; a tiny model that tests share."""

import functools
import gc
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, running
from tiny import ROWS, byte_tokenizer, make_data, make_model

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports huggingface_hub, which reads it once
os.environ["MATPLOTLIBRC"] = str(Path(__file__).parent)  # the same of matplotlib


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """A garbage collection, which some verbs ask for, need not look through all that imports made: half a second."""
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `kernels` runs under each backend that has bodies for a CPU here: it names none of them."""
    if "kernels" not in metafunc.fixturenames:
        return
    from nybble.kernels import registry

    rows = [row for row in registry.available() if row.available and row.device in ("cpu", "any")]
    metafunc.parametrize("kernels", list(dict.fromkeys(row.backend for row in rows)), indirect=True)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend whose bodies run; plain PyTorch's where it has none."""
    from nybble.kernels import registry

    with registry.use(request.param, "reference"):
        yield request.param


@pytest.fixture
def poisoned_slabs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever decoder blocks make of their own lies in a slab, as in training, and holds NaN at first."""
    from nybble.kernels import slabs

    fresh = slabs.Slabs.empty

    def poisoned(pool: slabs.Slabs, shape: Any, dtype: Any) -> Any:
        return fresh(pool, shape, dtype).fill_(float("nan") if dtype.is_floating_point else 113)

    monkeypatch.setattr(slabs, "SLABS_FROM", 1)
    monkeypatch.setattr(slabs.Slabs, "empty", poisoned)
    with slabs.slabs_in_use():
        yield


INST = (  # Mistral's
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks with a byte-level tokenizer, saved as transformers saves it, in two shards."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "rows.jsonl")


@pytest.fixture
def tiny_mixture(tmp_path: Path, tiny_model: Path) -> Path:
    """A Mixtral with the tokenizer of the tiny Llama."""
    from safetensors.torch import save_model
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path / "mixture"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    mixture = MixtralConfig(vocab_size=300, num_key_value_heads=2, num_local_experts=4, **sizes)
    mixture.save_pretrained(folder)
    save_model(MixtralForCausalLM(mixture).bfloat16(), str(folder / "model.safetensors"))
    return folder


@pytest.fixture
def mostly_dense(tmp_path: Path, tiny_model: Path) -> Path:
    """A JetMoE, whose experts are no parameters that transformers' interface knows, with the tiny Llama's tokenizer."""
    from safetensors.torch import save_model
    from transformers import JetMoeConfig, JetMoeForCausalLM

    folder = tmp_path / "jetmoe"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "kv_channels": 16}
    config = JetMoeConfig(vocab_size=300, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes)
    config.save_pretrained(folder)
    save_model(JetMoeForCausalLM(config).bfloat16(), str(folder / "model.safetensors"))
    return folder


# ---- a hub on this machine -----------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that the client asks, with a cache and a token of the test's own. What the client reads from the
    environment as it is imported is set where it keeps it.
    """
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with running() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        changed = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "hub")}
        changed |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_PROGRESS_BARS": True}
        for name, value in changed.items():
            monkeypatch.setattr(constants, name, value)
        yield hub


# ---- disks that fail ----------------------------------------------------------------------------


class Disk:
    """Faults of a disk that the system itself reports, for an open file given by its descriptor."""

    @staticmethod
    def fail(descriptor: int) -> None:
        """Reads and writes give EIO: a process has nothing at the addresses that the file is used at."""
        Disk._replace(descriptor, "/proc/self/mem")

    @staticmethod
    def fill(descriptor: int) -> None:
        """Writes give ENOSPC, reads zeros."""
        Disk._replace(descriptor, "/dev/full")

    @staticmethod
    def shorten(descriptor: int) -> None:
        """A third of the file is left."""
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 3)

    @staticmethod
    @contextmanager
    def largest_file(num_bytes: int) -> Iterator[None]:
        """Files cannot grow beyond so many bytes."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    @staticmethod
    def _replace(descriptor: int, path: str) -> None:
        other = os.open(path, os.O_RDWR)
        os.dup2(other, descriptor)
        os.close(other)


@pytest.fixture
def disk() -> type[Disk]:
    return Disk


# ---- runs ---------------------------------------------------------------------------------------

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # logits far enough apart that rounding rarely changes their order
}


def write_rows(path: Path) -> Path:
    return make_data(path, [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(60)])


def save_tokenizer(folder: Path) -> Any:
    """A byte-level tokenizer with merges, without which llama.cpp takes none."""
    tokenizer = byte_tokenizer(merged_to=300)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_sentencepiece(folder: Path, first_only: bool = False, bare: bool = False) -> Any:
    """SentencePiece's BPE as Llama 2 and Mistral have it: byte fallback, and a space before the text; after special
    tokens too, or where the text itself begins only. Bare, as Gemma 4 has it, none, and tokens for line breaks.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    before = [] if bare else [normalizers.Prepend("▁")]
    spaces = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    draft = Tokenizer(models.BPE())
    draft.normalizer = spaces
    corpus = [row["prompt"] + row["completion"] for row in ROWS]
    if bare:
        draft.pre_tokenizer = pre_tokenizers.Split("\n", behavior="contiguous")
        corpus += ["\n" * count for count in (2, 3, 4)] * len(ROWS)
    draft.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(draft.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *sorted(learned["vocab"])]
    merges = [tuple(merge) for merge in learned["merges"]]
    ids = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = spaces
    strip = [] if bare else [decoders.Strip(" ", 1, 0)]
    spelled = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*spelled, *strip])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in pieces[:3]])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=INST, **names)
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt its rows well enough to be told from its base."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nybble.options.option import build_options
    from nybble.options.verbs import TrainConfig
    from nybble.training.session import train

    folder = tmp_path_factory.mktemp("trained")
    tokenizer = save_tokenizer(folder / "base")
    torch.manual_seed(0)
    shape = SHAPE | {"initializer_range": 0.02, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None)).save_pretrained(folder / "base")
    options = {
        "model": str(folder / "base"),
        "data": str(write_rows(folder / "rows.jsonl")),
        "out": str(folder / "run"),
    }
    options |= {"max_steps": 60, "rows_per_step": 16, "lr": 1e-2, "rank": 8, "eval_every": 60, "validation_rows": 12}
    options |= {"validation_fraction": 0.2, "compute_dtype": "fp32", "quality": "search"}
    train(build_options(TrainConfig, options))
    return folder / "run"


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model of a family with its tokenizer; made once for all that ask for the same."""
    import torch
    import transformers
    from tiny_families import EXTRA, set_layer_factors
    from transformers import AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(family: str, tokenizer: Callable[[Path], Any], **overrides: object) -> Path:
        key = repr((family, tokenizer, overrides))
        if key not in made:
            made[key] = _make(family, tokenizer, **overrides)
        return made[key]

    def _make(family: str, tokenizer: Callable[[Path], Any], **overrides: object) -> Path:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(family)
        words = tokenizer(folder)
        vocabulary = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id}
        if family == "gpt2":
            config = transformers.GPT2Config(
                n_embd=64, n_layer=2, n_head=4, n_positions=512, initializer_range=0.15, **vocabulary
            )
        else:
            extra = {"sliding_window": None} if family == "mistral" else EXTRA.get(family, {})
            config = transformers.AutoConfig.for_model(family, **(SHAPE | vocabulary | extra | overrides))
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():  # norms of ones and biases of zeros would hide mistakes
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or "ln" in name else 0.0, std=0.2)
        set_layer_factors(model, torch.bfloat16)
        model.to(torch.bfloat16).save_pretrained(folder)
        return folder

    return make


SENTENCEPIECES: dict[str, tuple[str, dict[str, bool], dict[str, Any]]] = {
    "spaces after special tokens too": ("mistral", {}, {}),
    "a space where texts begin": ("mistral", {"first_only": True}, {}),
    "no such space": ("gemma4_text", {"bare": True}, {"hidden_size_per_layer_input": 0}),
}


@pytest.fixture(params=SENTENCEPIECES)
def sentencepiece_run(request: pytest.FixtureRequest, make_run: Callable[..., Path]) -> Path:
    """A run whose tokenizer is of SentencePiece's kinds."""
    family, options, overrides = SENTENCEPIECES[request.param]
    return make_run(family, tokenizer=functools.partial(save_sentencepiece, **options), **overrides)


@pytest.fixture
def make_run(tmp_path: Path, make_base: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a run on a tiny model of a family whose adapter is random, ‖ΔW‖ about `size` of ‖W‖."""
    import torch
    from transformers import AutoModelForCausalLM

    from nybble.layers.convert import adapters_of, attach_adapters, quantizable_linears
    from nybble.layers.quantized_experts import expert_shapes
    from nybble.options.option import build_options, config_to_yaml
    from nybble.options.verbs import TrainConfig
    from nybble.runs.adapter_writing import adapter_config, write_adapter
    from nybble.sources.open import open_model

    def make(
        family: str = "llama",
        size: float = 0.3,
        rslora: bool = False,
        tokenizer: Callable[[Path], Any] = save_tokenizer,
        experts: bool = False,
        **overrides: object,
    ) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / family
        shutil.copytree(make_base(family, tokenizer, **overrides), folder / "base", dirs_exist_ok=True)
        options = {"model": str(folder / "base"), "data": str(write_rows(tmp_path / "rows.jsonl"))}
        options |= {"out": str(folder / "run"), "rank": 4, "alpha": 8.0, "rslora": rslora, "validation_rows": 12}
        config = build_options(TrainConfig, options | {"validation_fraction": 0.2, "quality": "absmax"})
        (folder / "run" / "adapter").mkdir(parents=True, exist_ok=True)
        (folder / "run" / "config.yaml").write_text(config_to_yaml(config))
        fingerprint = {"model": "base", "fingerprint": open_model(str(folder / "base")).fingerprint()}
        (folder / "run" / "base.json").write_text(json.dumps(fingerprint))
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        names = [*quantizable_linears(model), *(expert_shapes(model) if experts else ())]
        attach_adapters(model, names, rank=4, alpha=8.0, rslora=rslora, seed=1)
        for adapter in adapters_of(model).values():
            torch.nn.init.normal_(adapter.lora_B)
            delta = adapter.scaling * (adapter.lora_B @ adapter.lora_A)
            adapter.lora_B.data *= size * adapter.base.weight.norm() / delta.norm()
        write_adapter(model, folder / "run" / "adapter", adapter_config(model, "base"))
        return folder / "run"

    return make
