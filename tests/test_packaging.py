"""What the repository and its wheel hold."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOORS = ("integrations", "kernels", "evals", "demos")
LEAKS = re.compile(
    r"/(?:work|tmp|root|home|opt|Users)/\w"  # folders of somebody's machine
    r"|[/@](?:[\w-]+\.)*(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|npmjs\.(?:org|com))"  # package registries
    r"|file:/{2}"
)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "-qq", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def tracked() -> list[Path]:
    """Files of the repository: those that git tracks or would take."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file() and not path.is_symlink()]


# ------------------------------------------------------------------ wheel


def test_wheel_holds_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"vlprune", "vlprune-0.1.0.dist-info"}


def test_wheel_holds_what_the_package_holds(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("vlprune/")}
    # The demo shows published results, which lie in docs/ and come along by a link.
    linked = {f"vlprune/demos/results/{path.name}" for path in tracked() if path.parent == ROOT / "docs" / "results"}
    own = {path.relative_to(ROOT).as_posix() for path in tracked() if path.is_relative_to(ROOT / "vlprune")}
    assert packed == own | linked


def test_wheel_carries_the_weights_of_tinyvlm(wheel: Path) -> None:
    checkpoint = "vlprune/evals/tinyvlm/checkpoint"
    assert {f"{checkpoint}/config.json", f"{checkpoint}/model.safetensors"} <= set(zipfile.ZipFile(wheel).namelist())


def test_wheel_is_imported_from_a_clean_environment(installed: Path, tmp_path: Path) -> None:
    libraries = sysconfig.get_path("purelib")
    # -S leaves out the editable install's import hook, -I the working directory and PYTHONPATH.
    program = f"""
import sys
sys.path += [{str(installed)!r}, {libraries!r}]
import vlprune
print(vlprune.__file__, vlprune.__version__, len(vlprune.methods()), len(vlprune.supported_models()))
"""
    where, version, methods, families = run(sys.executable, "-I", "-S", "-c", program, cwd=tmp_path).split()
    assert Path(where).is_relative_to(installed)
    assert version == "0.1.0"
    assert int(methods) >= 5
    assert int(families) >= 2


# ------------------------------------------------------------------ repository


@pytest.mark.parametrize("door", DOORS)
def test_doors_are_relative_links(door: str) -> None:
    assert (ROOT / door).readlink() == Path("vlprune", door)
    assert (ROOT / door / "__init__.py").is_file()


def test_tests_are_no_door() -> None:
    assert (ROOT / "tests").is_dir()
    assert not (ROOT / "tests").is_symlink()


@pytest.mark.parametrize("door", DOORS)
def test_doors_are_no_modules_of_the_environment(door: str, tmp_path: Path) -> None:
    """An editable install that put the root on sys.path would shadow other packages of these names."""
    program = f"""
import importlib.util
spec = importlib.util.find_spec({door!r})
print(spec.origin if spec else None)
"""
    origin = run(sys.executable, "-c", program, cwd=tmp_path).strip()
    assert origin == "None" or not Path(origin).resolve().is_relative_to(ROOT / "vlprune")


def test_no_file_speaks_of_a_machine() -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), 1)
        found += [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for number, line in lines if LEAKS.search(line)]
    assert not found, "\n".join(found)


def test_constraints_are_exact() -> None:
    for name in ("constraints.txt", "constraints-oldest.txt", "constraints-vit.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
        assert any(line.startswith("torch==") for line in lines) or name == "constraints-vit.txt"
