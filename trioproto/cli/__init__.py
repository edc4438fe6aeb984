"""The command line, ``python -m trioproto``: its commands, and the clients among them."""
