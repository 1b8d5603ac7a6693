"""The commands, a module for each kind of work. All of them are imported for `--help`, so each
imports what it runs inside its function."""
