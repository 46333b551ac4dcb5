"""The command line: one module a command, none of which is imported before its command is called."""
