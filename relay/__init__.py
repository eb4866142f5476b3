"""Coder Chat Relay: every chat of a Coder server as one ordered event stream on RabbitMQ."""
