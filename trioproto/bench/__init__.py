"""What a server does under load: the load, the latencies, the report."""
