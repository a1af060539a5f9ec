"""``import vlprune`` is cheap."""

import subprocess
import sys

import vlprune

LIMIT = 0.1
TRIES = 5
HEAVY = ("triton", "gradio", "datasets", "matplotlib", "typer", "rich", "timm", "peft", "transformers.modeling_utils")

ADDED_SECONDS = """
import time, torch, transformers
started = time.process_time()
import vlprune
print(time.process_time() - started)
"""
ADDED_MODULES = f"""
import sys, torch, transformers
before = set(sys.modules)
import vlprune
print(*(name for name in {HEAVY!r} if name in sys.modules and name not in before))
"""


def python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_quick() -> None:
    seconds = []
    # Processor time, the best of several: other processes on the machine only ever slow it down.
    for _ in range(TRIES):
        seconds.append(float(python(ADDED_SECONDS)))
        if seconds[-1] < LIMIT:
            return
    raise AssertionError(f"import vlprune adds {min(seconds):.3f} s at best, {LIMIT} s are allowed: {seconds}")


def test_import_pulls_in_no_extra() -> None:
    assert python(ADDED_MODULES) == ""


def test_methods_are_imported_when_asked_for() -> None:
    loaded = "print('vlprune.methods.hired' in sys.modules, end=' ')"
    assert python(f"import sys, vlprune; {loaded}; vlprune.HiRED; {loaded}") == "False True"


def test_every_method_has_its_name_in_the_package() -> None:
    assert {cls.__name__ for cls in vlprune.methods().values()} | {"chain"} <= set(vlprune.__all__) <= set(dir(vlprune))
    assert all(getattr(vlprune, name) is not None for name in vlprune.__all__)


def test_a_function_stays_one_where_a_module_has_its_name() -> None:
    assert python("import vlprune; vlprune.HiRED; print(type(vlprune.chain).__name__)") == "function"
