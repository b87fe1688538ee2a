"""The daemon's processes and commands: broker, keepers, ranks, and what starts them."""
