"""Measuring a server under load: the load generators and the report."""
