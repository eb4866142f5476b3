"""A Coder chats server for tests, demos and other people's consumers. Imports nothing from the rest of the relay."""

from relay.simulator.server import Simulator, SimulatorConfig
from relay.simulator.state import ModelConfig, User

__all__ = ["ModelConfig", "Simulator", "SimulatorConfig", "User"]
