"""The command line: one thin file per verb, flags generated from `nybble.options.groups`."""
