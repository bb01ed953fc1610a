"""How errors of other libraries become messages for the user."""

import pytest

from nybble.errors import DataError, ModelError, foreign_errors


def explained(error: BaseException) -> BaseException:
    with pytest.raises(BaseException) as raised, foreign_errors(lambda e: ModelError(f"It cannot be read: {e}.")):
        raise error
    return raised.value


def test_whatever_another_library_raises_is_explained():
    class Strange(Exception):
        pass

    for error in (Strange("odd"), RuntimeError("odd"), KeyError("odd"), ValueError("odd")):
        said = explained(error)
        assert isinstance(said, ModelError) and "odd" in str(said) and said.__cause__ is error


NO_ROOM = (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), RuntimeError("CUDA out of memory."))


@pytest.mark.parametrize(
    "error", [MemoryError(), *NO_ROOM, KeyboardInterrupt(), SystemExit(), DataError("already explained")]
)
def test_what_is_not_about_what_was_read_stays_what_it_is(error):
    assert explained(error) is error


def test_a_failed_allocation_is_not_taken_for_an_unknown_architecture(monkeypatch):
    from transformers import AutoModelForCausalLM, LlamaConfig

    from nybble.sources.skeleton import build_skeleton

    def fail(*arguments, **keywords):
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fail)
    with pytest.raises(MemoryError):
        build_skeleton(LlamaConfig())
