"""The blocking client of the daemon: used by the node pack, the commands, the ranks and tests."""
