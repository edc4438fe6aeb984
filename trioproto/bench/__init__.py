"""What a server does under load: the load and the report."""
