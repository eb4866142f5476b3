"""Providers, models, prices, and every option that a model can be called with."""

from decimal import Decimal
from typing import Any, ClassVar
from uuid import UUID

from pydantic import Field

from relay.codersdk.codec import NIL_UUID
from relay.codersdk.enums import ChatModelProviderUnavailableReason, ChatProviderConfigSource
from relay.codersdk.model import CoderModel, Float64, Int32, Int64, Omit
from relay.codersdk.models_options import ChatModelProviderOptions
from relay.codersdk.timestamp import ZERO_TIME, Timestamp


class ChatModel(CoderModel):
    """A model that users can choose. Go: `codersdk.ChatModel`."""

    id: str = ""
    """`<provider>:<model>`, not the id of a model config."""
    provider: str = ""
    model: str = ""
    display_name: str = ""


class ChatModelProvider(CoderModel):
    """A provider and its models. Go: `codersdk.ChatModelProvider`."""

    provider: str = ""
    available: bool = False
    unavailable_reason: Omit[ChatModelProviderUnavailableReason] = ChatModelProviderUnavailableReason("")
    models: list[ChatModel] | None = None


class ChatModelsResponse(CoderModel):
    """The catalog of models. Go: `codersdk.ChatModelsResponse`."""

    providers: list[ChatModelProvider] | None = None


class ChatProviderConfig(CoderModel):
    """A provider as administrators see it. Go: `codersdk.ChatProviderConfig`."""

    id: UUID = NIL_UUID
    """The nil UUID when nothing is stored for it; the times are zero then."""
    provider: str = ""
    display_name: str = ""
    enabled: bool = False
    has_api_key: bool = False
    base_url: Omit[str] = ""
    source: ChatProviderConfigSource = ChatProviderConfigSource("")
    created_at: Omit[Timestamp] = ZERO_TIME
    updated_at: Omit[Timestamp] = ZERO_TIME


class CreateChatProviderConfigRequest(CoderModel):
    """A provider to set up. Go: `codersdk.CreateChatProviderConfigRequest`."""

    provider: str = ""
    display_name: Omit[str] = ""
    api_key: Omit[str] = Field(default="", repr=False)
    base_url: Omit[str] = ""
    enabled: Omit[bool | None] = None


class UpdateChatProviderConfigRequest(CoderModel):
    """What to change of a provider. Go: `codersdk.UpdateChatProviderConfigRequest`."""

    display_name: Omit[str] = ""
    """Empty keeps it."""
    api_key: Omit[str | None] = Field(default=None, repr=False)
    """None keeps it, an empty one takes it away; so with `base_url`."""
    base_url: Omit[str | None] = None
    enabled: Omit[bool | None] = None


class ModelCostConfig(CoderModel):
    """Prices in US dollars per million tokens, exact; None is unknown, not free. Go: `codersdk.ModelCostConfig`."""

    input_price_per_million_tokens: Omit[Decimal | None] = None
    output_price_per_million_tokens: Omit[Decimal | None] = None
    cache_read_price_per_million_tokens: Omit[Decimal | None] = None
    cache_write_price_per_million_tokens: Omit[Decimal | None] = None


class ChatModelCallConfig(CoderModel):
    """How a model is called. Go: `codersdk.ChatModelCallConfig`.

    The prices of an older version, which stand beside `cost` and not in it, are read too; those in `cost` win.
    """

    max_output_tokens: Omit[Int64 | None] = None
    temperature: Omit[Float64 | None] = None
    """0 to 2."""
    top_p: Omit[Float64 | None] = None
    top_k: Omit[Int64 | None] = None
    presence_penalty: Omit[Float64 | None] = None
    frequency_penalty: Omit[Float64 | None] = None
    cost: Omit[ModelCostConfig | None] = None
    provider_options: Omit[ChatModelProviderOptions | None] = None

    _old_keys: ClassVar[dict[str, Any]] = dict.fromkeys(ModelCostConfig.model_fields, Decimal | None)

    def _take_old_keys(self, found: dict[str, Any]) -> None:
        """Go: `codersdk.ChatModelCallConfig.UnmarshalJSON`."""
        prices = {name: price for name, price in found.items() if price is not None}
        if not prices:
            return
        cost = self.cost or ModelCostConfig()
        for name, price in prices.items():
            if getattr(cost, name) is None:
                setattr(cost, name, price)
        self.cost = cost


class ChatModelConfig(CoderModel):
    """A model as administrators see it. Go: `codersdk.ChatModelConfig`."""

    id: UUID = NIL_UUID
    provider: str = ""
    model: str = ""
    display_name: str = ""
    enabled: bool = False
    is_default: bool = False
    context_limit: Int64 = 0
    """Tokens."""
    compression_threshold: Int32 = 0
    """Percent of the context at which it is compacted."""
    call_config: Omit[ChatModelCallConfig | None] = Field(
        default=None, validation_alias="model_config", serialization_alias="model_config"
    )
    """The key is `model_config`, a name that pydantic keeps for itself."""
    created_at: Timestamp = ZERO_TIME
    updated_at: Timestamp = ZERO_TIME


class CreateChatModelConfigRequest(CoderModel):
    """A model to set up. Go: `codersdk.CreateChatModelConfigRequest`."""

    provider: str = ""
    model: str = ""
    display_name: Omit[str] = ""
    enabled: Omit[bool | None] = None
    is_default: Omit[bool | None] = None
    context_limit: Omit[Int64 | None] = None
    compression_threshold: Omit[Int32 | None] = None
    call_config: Omit[ChatModelCallConfig | None] = Field(
        default=None, validation_alias="model_config", serialization_alias="model_config"
    )


class UpdateChatModelConfigRequest(CoderModel):
    """What to change of a model; empty keeps it. Go: `codersdk.UpdateChatModelConfigRequest`."""

    provider: Omit[str] = ""
    model: Omit[str] = ""
    display_name: Omit[str] = ""
    enabled: Omit[bool | None] = None
    is_default: Omit[bool | None] = None
    context_limit: Omit[Int64 | None] = None
    compression_threshold: Omit[Int32 | None] = None
    call_config: Omit[ChatModelCallConfig | None] = Field(
        default=None, validation_alias="model_config", serialization_alias="model_config"
    )
    """Replaces the stored one as a whole."""
