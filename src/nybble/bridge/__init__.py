"""nybble inside other libraries' scripts: transformers' `from_pretrained`, PEFT, Trainer, TRL."""
