"""SPP inside other libraries: each is imported by name, such as spp.integrations.peft."""

from spp.supported import require_supported

require_supported()  # first: what follows may fail with other versions
