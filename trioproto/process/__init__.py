"""Running a server as a process: listeners, TLS, signals, workers, systemd, metrics."""
