"""Fine-tune a model, ask it, write it for another program: `python examples/finetune.py [MODEL DATA OUT]`."""

import sys

import nybble

model, data, out = sys.argv[1:] or ("smollm2-135m-instruct", "builtin:pydoc", "runs/finetuned")
run = nybble.train(model=model, data=data, out=out, max_seq_len=512, rows_per_step=8, max_steps=20, lr=5e-4)
print(f"held-out loss: {run.loss_before:.3f} before, {run.loss_after:.3f} after; adapter: {run.adapter}")
print(nybble.open_run(run).generate("What does `os.path.join` do?", max_new_tokens=48))
print(nybble.export(run, to="peft", out=f"{out}-peft").outcome)
