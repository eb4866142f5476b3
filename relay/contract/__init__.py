"""The contract as documents: JSON Schemas, AsyncAPI and the list of metrics, made from the code that keeps it."""

from relay.contract.command import contract

__all__ = ["contract"]
