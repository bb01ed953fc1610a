"""Bad files, built in code: each with the command that meets it and the words that its message must have.

A case names the file, and the place in it where there is one. Nothing here is stored; `build` writes it.
"""

from bad_file import BadFile
from bad_gguf import gguf_cases
from bad_models import config_cases, safetensors_cases, tokenizer_cases
from bad_rows import data_cases, yaml_cases
from bad_runs import run_cases


def all_cases() -> list[BadFile]:
    groups = (data_cases, yaml_cases, safetensors_cases, config_cases, tokenizer_cases, gguf_cases, run_cases)
    cases = [case for group in groups for case in group()]
    assert len({case.name for case in cases}) == len(cases), "names are unique"
    return cases
