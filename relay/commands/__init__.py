"""The subcommands of `relay`, a module for each group of them: `relay.cli` imports the one that was asked for."""
