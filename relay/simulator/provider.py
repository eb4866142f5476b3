"""How the server tells the failures of a model's provider, and which of them it tries again."""

from relay.simulator import model
from relay.simulator.dialect import Features
from relay.simulator.state import ChatError, ModelConfig

PROVIDERS = {
    "anthropic": "Anthropic",
    "azure": "Azure OpenAI",
    "bedrock": "AWS Bedrock",
    "google": "Google",
    "openai": "OpenAI",
    "openai-compat": "OpenAI Compatible",
    "openrouter": "OpenRouter",
    "vercel": "Vercel AI Gateway",
}

REFUSED = "this request is not valid"


def passing_failure(text: str, config: ModelConfig | None, features: Features) -> ChatError:
    """What a `retry` says. `text` is the scripted provider's error."""
    if not features.rich_errors:
        return ChatError(text)
    name, provider = _names(config)
    message = f"{name} is temporarily overloaded."
    return ChatError(message, _rest_of(text), "overloaded", provider, True, 503)


def final_failure(text: str, config: ModelConfig | None, features: Features) -> ChatError:
    """What a run ends with. Servers that classify errors say nothing of the provider's text but as detail."""
    if not features.rich_errors:
        return ChatError(f"stream response: {text}")
    if model.is_transient(text):
        return passing_failure(text, config, features)
    name, provider = _names(config)
    # The scripted provider refuses with 401 in the seed's recordings and with 400 in all later ones.
    message = f"{name} returned an unexpected error"
    message += "." if features.error_object else " (HTTP 400)."
    return ChatError(message, REFUSED + _rest_of(text), "generic", provider, False, 400)


def _names(config: ModelConfig | None) -> tuple[str, str]:
    provider = config.provider if config else ""
    return PROVIDERS.get(provider, provider), provider


def _rest_of(text: str) -> str:
    """What a script has put behind the provider's error to make it long."""
    for known in (model.UNAUTHORIZED, model.OVERLOADED, model.BROKEN_STREAM):
        _, found, rest = text.partition(known)
        if found:
            return rest
    return ""
