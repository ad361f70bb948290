"""Files: atomic directories, the checked safetensors reader, a streaming writer, JSON and hashes."""

from spp.errors import output_error
from spp.files.atomic import atomic_directory, atomic_file, check_target, require_directory
from spp.files.hashes import content_crc32, content_sha256, dtype_name, mask_sha256, values_sha256
from spp.files.jsonio import read_json, write_json
from spp.files.leftovers import recover
from spp.files.reader import CheckpointReader
from spp.files.recognised import require_replaceable
from spp.files.writer import save_tensors, write_tensors

__all__ = [
    "CheckpointReader",
    "atomic_directory",
    "atomic_file",
    "check_target",
    "content_crc32",
    "content_sha256",
    "dtype_name",
    "mask_sha256",
    "output_error",
    "read_json",
    "recover",
    "require_directory",
    "require_replaceable",
    "save_tensors",
    "values_sha256",
    "write_json",
    "write_tensors",
]
