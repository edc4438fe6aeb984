"""The command line, ``python -m trioproto``: servers, clients and the benchmark."""
