"""Ten runs whose bytes a change of structure must not move: records their hashes and losses, or compares with a record.

    python benchmarks/recorded_runs.py --write before.json
    python benchmarks/recorded_runs.py --compare before.json [--nybble other/.venv/bin/nybble]

Only the command line is used, so that any two checkouts can be compared, on one machine, with one number of threads.
Each run's tensor and GGUF files (adapter, checkpoints, quantised bases, exports) are hashed, and the losses and
gradient norms of its events kept as they are written. The tiny models are made here, from a seed.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TENSORS = (".safetensors", ".gguf")
NOT_VERIFIED = 3  # exit code of an export that was kept aside; its files are compared all the same
NUMBERS = ("loss", "grad_norm")  # of events
SHAPE = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15,
}  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON = ("--data", "rows.jsonl", "--max-steps", "6", "--rows-per-step", "8", "--save-every", "3", "--eval-every", "3")
BF16, FP32 = ("--compute-dtype", "bf16"), ("--compute-dtype", "fp32")
GENERAL = ("--calibrate", "builtin:pydoc", "--calibration-tokens", "2048")


def train(model: str, *options: str) -> tuple[str, ...]:
    return ("train", "--model", model, *COMMON, *options)


# name -> the commands of a run, in its own folder, where `llama` and `gpt2` are models and `rows.jsonl` is there
RUNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "blocks-bf16-exported": (
        train("llama", *BF16, "--out", "run"),
        ("export", "--run", "run", "--to", "gguf", "--gguf-type", "q8_0", "--out", "gguf"),
        ("export", "--run", "run", "--to", "nf4", "--quality", "search", "--out", "nf4"),
        ("merge", "--run", "run", "--out", "merged"),
    ),
    "blocks-fp32": (train("llama", *FP32, "--keep", "attention", "--out", "run"),),
    "modules-bf16": (train("gpt2", *BF16, "--out", "run"),),
    "modules-fp32-padded": (train("llama", *FP32, "--no-packing", "--dropout", "0.1", "--out", "run"),),
    "streamed": (
        ("quantize", "--model", "llama", "--out", "base", "--quality", "search"),
        train("base", *BF16, "--stream-base", "always", "--keep", "nothing", "--out", "run"),
    ),
    "paged": (train("llama", *BF16, "--page-optimizer", "always", "--optimizer-bits", "8", "--out", "run"),),
    "calibrated": (train("llama", *BF16, "--quality", "calibrated", *GENERAL, "--out", "run"),),
    "mixed": (train("llama", *FP32, "--mixed", "3.6", "--quality", "absmax", *GENERAL, "--out", "run"),),
    "resumed": (
        train("llama", *BF16, "--out", "run"),
        ("train", "--resume", "--out", "run", "--max-steps", "9", "--allow-change", "config"),
    ),
    "smollm2": (
        ("train", "--model", "smollm2-135m-instruct", "--data", "builtin:pydoc", "--max-steps", "2", "--rows-per-step",
         "4", "--validation-rows", "8", "--max-seq-len", "256", "--save-every", "1", "--out", "run"),
        ("export", "--run", "run", "--to", "gguf", "--out", "gguf"),
    ),
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Models and rows of the tiny runs."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}, twice {n}."} for n in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in rows], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)
    ids: dict[str, Any] = {"vocab_size": len(fast), "eos_token_id": fast.eos_token_id, "bos_token_id": None}
    configs = {
        "llama": LlamaConfig(**SHAPE, **ids),
        "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=512, initializer_range=0.15, **ids),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)


def record(name: str, nybble: Path, inputs: Path, threads: int) -> dict[str, Any]:
    """Hashes and numbers of one run, made in a folder of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in inputs.iterdir():
            (folder / path.name).symlink_to(path)
        for command in RUNS[name]:
            done = subprocess.run([nybble, *command], cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode not in (0, NOT_VERIFIED):
                raise SystemExit(f"{name}: {' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}"
                                 f"{done.stderr[-2000:]}")  # fmt: skip
        made = [path for path in sorted(folder.rglob("*")) if path.suffix in TENSORS and path.is_file()]
        events = map(json.loads, (folder / "run" / "events.jsonl").read_text().splitlines())
        return {
            "files": {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in made},
            "events": [
                [event["event"], event.get("step"), *(event[number] for number in NUMBERS if number in event)]
                for event in events
            ],
        }


def differences(name: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not as it was, a line each."""
    files = before["files"].keys() | now["files"].keys()
    found = [
        f"{name}: {file} {'differs' if file in before['files'] and file in now['files'] else 'is in one of them only'}"
        for file in sorted(files)
        if before["files"].get(file) != now["files"].get(file)
    ]
    known = {event[0] for event in before["events"]}  # a run may tell of more than it did
    same = before["events"] == [event for event in now["events"] if event[0] in known]
    return found + ([] if same else [f"{name}: events, losses or gradient norms differ"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, help="file for the record")
    what.add_argument("--compare", type=Path, help="record to compare with")
    parser.add_argument("--nybble", type=Path, default=Path(sys.executable).with_name("nybble"), help="the command")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=RUNS, nargs="*", default=list(RUNS), help="some of the runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        make_inputs(Path(temporary))
        runs = {}
        for name in arguments.only:
            runs[name] = record(name, arguments.nybble.absolute(), Path(temporary), arguments.threads)
            print(f"{name}: {len(runs[name]['files'])} files, {len(runs[name]['events'])} events", flush=True)
    if arguments.write:
        arguments.write.write_text(json.dumps(runs, indent=1) + "\n")
        return
    before = json.loads(arguments.compare.read_text())
    found = [line for name, run in runs.items() for line in differences(name, before[name], run)]
    print("\n".join(found) or f"all {len(runs)} runs as they were, to the byte")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
