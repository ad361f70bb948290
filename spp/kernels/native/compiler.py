"""The C files beside this one, each compiled once for this machine by the C compiler that is here, and loaded.

A library is in the user's cache (SPP_CACHE, else $XDG_CACHE_HOME/spp, else ~/.cache/spp), named by a hash of its
source, the compiler and the processor: another machine with the same home makes its own. Where the cache cannot be
written it is made in a temporary folder and lives as long as the process. SPP_CC or CC name the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from spp.files.places import cache_directory

_log = logging.getLogger(__name__)
_preparing = threading.Lock()  # several threads may want a library first

ABI = 5
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=c11", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
SECONDS = 120  # a compiler that takes longer is given up; the usual time is two seconds

i64, f32p, i32 = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int


@dataclass(frozen=True)
class Source:
    """A C file.

    Attributes:
        name: of the file, without its ending.
        abi: the version that its function spp_abi returns.
        required: of the processor, as Linux names it.
        flags: of the compiler, beside FLAGS.
    """

    name: str
    abi: int
    required: tuple[str, ...]
    flags: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Where the file is."""
        return Path(__file__).with_name(f"{self.name}.c")


SPARSE = Source("sparse", ABI, ("avx2", "fma", "f16c"), ("-fopenmp",))


class Block(ctypes.Structure):
    """`block` of sparse.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "left", "right", "codes", "starts")),
        *((name, i64) for name in ("stride", "rows", "cols", "first", "all_rows", "parts", "terms")),
        *((name, i64) for name in ("code_bytes", "stretches", "values", "row_values", "kept", "group")),
        *((name, ctypes.c_int32) for name in ("dtype", "rounded_to", "form", "wide_starts", "adds")),
    ]


class Refused(Exception):
    """A compiled library cannot be had here; the message says why."""


def prepared(
    source: Source, prepare: Callable[[ctypes.CDLL], None], without: str
) -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library of a C file, or None and why it cannot be had here.

    Args:
        source: the file.
        prepare: declares its functions and tries them; raises Refused where they are not what they must be.
        without: what is logged of a machine without the library.
    """
    with _preparing:
        return _prepared(source, prepare, without)


@cache
def _prepared(
    source: Source, prepare: Callable[[ctypes.CDLL], None], without: str
) -> tuple[ctypes.CDLL | None, str | None]:
    try:
        loaded = load(source)
        prepare(loaded)
    except Refused as refusal:
        _log.info("%s: %s", without, refusal)
        return None, str(refusal)
    return loaded, None


def load(source: Source) -> ctypes.CDLL:
    """Return the library of a C file, after compiling it where it is not there yet.

    Raises:
        Refused: the system, the processor or the compiler is none for it.
    """
    path = _compiled(source)
    try:
        # torch has its OpenMP runtime loaded by now; the library takes the same one, and so the same threads
        loaded = ctypes.CDLL(str(path))
        found = loaded.spp_abi()
    except (OSError, AttributeError) as error:
        raise Refused(f"{path} cannot be loaded: {error}") from error
    if found != source.abi:
        raise Refused(f"{path} has version {found}, expected {source.abi}")
    return loaded


def _compiled(source: Source) -> Path:
    """Return the path of the library, after compiling it where it is not there yet."""
    processor = _processor(source.required)
    compiler = _compiler()
    flags = (*FLAGS, *source.flags)
    identity = "\n".join([source.path.read_text(encoding="utf-8"), compiler, _version(compiler), *flags, processor])
    name = f"{source.name}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    folder = _folder()
    target = folder / name
    if target.is_file():
        return target
    try:
        handle, partial = tempfile.mkstemp(suffix=".so", prefix=f"{source.name}-", dir=folder)
    except OSError as error:  # the disk, or a quota, is full
        raise Refused(f"{folder} cannot be written: {error.strerror}") from error
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, *flags, "-o", partial, str(source.path)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            env={**os.environ, "TMPDIR": str(folder)},  # the usual one may be small
        )
        if done.returncode:
            raise Refused(f"{compiler} could not compile {source.path.name}: {done.stderr.strip()[-500:]}")
        os.replace(partial, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"{compiler} could not compile {source.path.name}: {error}") from error
    finally:
        with suppress(OSError):
            os.unlink(partial)
    return target


def _processor(required: Sequence[str]) -> str:
    """Return what the processor can do, as Linux tells it."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise Refused(f"they are for Linux on x86-64, and this is {platform.system()} on {platform.machine()}")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError as error:
        raise Refused(f"the processor's description cannot be read: {error}") from error
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    missing = [name for name in required if name not in flags.split()]
    if missing:
        raise Refused(f"the processor lacks {', '.join(missing)}")
    return flags


def _compiler() -> str:
    names = [os.environ[name] for name in ("SPP_CC", "CC") if os.environ.get(name)]
    names = names or list(COMPILERS)
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise Refused(f"there is no C compiler ({', '.join(names)}); install one, or name it in SPP_CC")
    return found


def _version(compiler: str) -> str:
    try:
        done = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"{compiler} --version: {error}") from error
    return done.stdout.partition("\n")[0]


def _folder() -> Path:
    """Return a folder of the user's own that can be written."""
    folder = cache_directory() / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        ours = state.st_uid == os.getuid() and not state.st_mode & 0o022  # nobody else may put a library there
        if ours and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    try:
        return Path(_temporary().name)
    except OSError as error:  # no folder for temporaries can be written
        raise Refused(f"{folder} cannot be written, nor can any folder for temporary files: {error}") from error


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="spp-native-")


def _declare(loaded: ctypes.CDLL) -> None:
    """Tell the types of sparse.c's functions."""
    block = ctypes.POINTER(Block)
    loaded.spp_pack.argtypes = [f32p, i64, i64, i64, i64, f32p, i32]
    loaded.spp_product.argtypes = [f32p, block, i32, i64, i64, i64, f32p, i64, i32, i64, ctypes.c_void_p, i32]
    loaded.spp_reduce.argtypes = [f32p, f32p, block, i64, i64, f32p, f32p, i64, i64, i64, ctypes.c_void_p, i32]
    for name in ("spp_pack", "spp_product", "spp_reduce"):
        getattr(loaded, name).restype = None
    loaded.spp_product_scratch.argtypes, loaded.spp_product_scratch.restype = [i64, i64, i64], i64
    loaded.spp_reduce_scratch.argtypes, loaded.spp_reduce_scratch.restype = [i64], i64


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in sparse.c
