"""The command line: one thin file a command, each a few lines around a function of the library."""
