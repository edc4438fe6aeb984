"""What makes a server a process: where it listens, TLS, signals, workers."""
