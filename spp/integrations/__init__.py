"""SPP inside other libraries: each is imported by name, such as spp.integrations.peft."""
