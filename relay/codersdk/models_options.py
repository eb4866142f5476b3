"""Options that are passed on to the providers of models.

The server checks none of these values; one that a provider cannot use is dropped when the model is called.
"""

from pydantic import Field, JsonValue

from relay.codersdk.model import CoderModel, Int64, Omit


class ChatModelOpenAIProviderOptions(CoderModel):
    """Options of OpenAI, and of Azure. Go: `codersdk.ChatModelOpenAIProviderOptions`."""

    include: Omit[list[str]] = Field(default_factory=list)
    """Model names to include in discovery."""
    instructions: Omit[str | None] = None
    """System-level instructions prepended to the conversation."""
    logit_bias: Omit[dict[str, Int64]] = Field(default_factory=dict)
    """Token IDs mapped to bias values from -100 to 100."""
    log_probs: Omit[bool | None] = None
    """Whether to return log probabilities of output tokens."""
    top_log_probs: Omit[Int64 | None] = None
    """Number of most likely tokens to return log probabilities for."""
    max_tool_calls: Omit[Int64 | None] = None
    """Maximum number of tool calls per response."""
    parallel_tool_calls: Omit[bool | None] = None
    """Whether the model may make multiple tool calls in parallel."""
    user: Omit[str | None] = None
    """Unique identifier for the end user for abuse monitoring."""
    reasoning_effort: Omit[str | None] = None
    """Controls the level of reasoning effort: none, minimal, low, medium, high, xhigh."""
    reasoning_summary: Omit[str | None] = None
    """Controls whether reasoning tokens are summarized in the response."""
    max_completion_tokens: Omit[Int64 | None] = None
    """Upper bound on tokens the model may generate."""
    text_verbosity: Omit[str | None] = None
    """Controls the verbosity of the text response: low, medium, high."""
    prediction: Omit[dict[str, JsonValue]] = Field(default_factory=dict)
    """Predicted output content to speed up responses."""
    store: Omit[bool | None] = None
    """Whether to store the response on OpenAI for later retrieval via the API and dashboard logs."""
    metadata: Omit[dict[str, JsonValue]] = Field(default_factory=dict)
    """Arbitrary metadata to attach to the request."""
    prompt_cache_key: Omit[str | None] = None
    """Key for enabling cross-request prompt caching."""
    safety_identifier: Omit[str | None] = None
    """Developer-specific safety identifier for the request."""
    service_tier: Omit[str | None] = None
    """Latency tier to use for processing the request."""
    structured_outputs: Omit[bool | None] = None
    """Whether to enable structured JSON output mode."""
    strict_json_schema: Omit[bool | None] = None
    """Whether to enforce strict adherence to the JSON schema."""
    web_search_enabled: Omit[bool | None] = None
    """Enable OpenAI web search tool for grounding responses with real-time information."""
    search_context_size: Omit[str | None] = None
    """Amount of search context to use: low, medium, high."""
    allowed_domains: Omit[list[str]] = Field(default_factory=list)
    """Restrict web search to these domains."""


class ChatModelAnthropicThinkingOptions(CoderModel):
    """How much Anthropic's models may think. Go: `codersdk.ChatModelAnthropicThinkingOptions`."""

    budget_tokens: Omit[Int64 | None] = None
    """Maximum number of tokens the model may use for thinking."""


class ChatModelAnthropicProviderOptions(CoderModel):
    """Options of Anthropic, and of Bedrock. Go: `codersdk.ChatModelAnthropicProviderOptions`."""

    send_reasoning: Omit[bool | None] = None
    """Whether to include reasoning content in the response."""
    thinking: Omit[ChatModelAnthropicThinkingOptions | None] = None
    """Configuration for extended thinking."""
    effort: Omit[str | None] = None
    """Controls the level of reasoning effort: low, medium, high, max."""
    disable_parallel_tool_use: Omit[bool | None] = None
    """Whether to disable parallel tool execution."""
    web_search_enabled: Omit[bool | None] = None
    """Enable Anthropic web search tool for grounding responses with real-time information."""
    allowed_domains: Omit[list[str]] = Field(default_factory=list)
    """Restrict web search to these domains (cannot be used with blocked_domains)."""
    blocked_domains: Omit[list[str]] = Field(default_factory=list)
    """Block web search on these domains (cannot be used with allowed_domains)."""


class ChatModelGoogleThinkingConfig(CoderModel):
    """How much Google's models may think. Go: `codersdk.ChatModelGoogleThinkingConfig`."""

    thinking_budget: Omit[Int64 | None] = None
    """Maximum number of tokens the model may use for thinking."""
    include_thoughts: Omit[bool | None] = None
    """Whether to include thinking content in the response."""


class ChatModelGoogleSafetySetting(CoderModel):
    """What Google blocks. Go: `codersdk.ChatModelGoogleSafetySetting`."""

    category: Omit[str] = ""
    """The harm category to configure."""
    threshold: Omit[str] = ""
    """The blocking threshold for the harm category."""


class ChatModelGoogleProviderOptions(CoderModel):
    """Options of Google. Go: `codersdk.ChatModelGoogleProviderOptions`."""

    thinking_config: Omit[ChatModelGoogleThinkingConfig | None] = None
    """Configuration for extended thinking."""
    cached_content: Omit[str] = ""
    """Resource name of a cached content object."""
    safety_settings: Omit[list[ChatModelGoogleSafetySetting]] = Field(default_factory=list)
    """Safety filtering settings for harmful content categories."""
    threshold: Omit[str] = ""
    web_search_enabled: Omit[bool | None] = None
    """Enable Google Search grounding for real-time information."""


class ChatModelOpenAICompatProviderOptions(CoderModel):
    """Options of servers that speak as OpenAI's does. Go: `codersdk.ChatModelOpenAICompatProviderOptions`."""

    user: Omit[str | None] = None
    """Unique identifier for the end user for abuse monitoring."""
    reasoning_effort: Omit[str | None] = None
    """Controls the level of reasoning effort: none, minimal, low, medium, high, xhigh."""


class ChatModelReasoningOptions(CoderModel):
    """How much a model may reason, at OpenRouter and Vercel. Go: `codersdk.ChatModelReasoningOptions`."""

    enabled: Omit[bool | None] = None
    """Whether reasoning is enabled."""
    exclude: Omit[bool | None] = None
    """Whether to exclude reasoning content from the response."""
    max_tokens: Omit[Int64 | None] = None
    """Maximum number of tokens for reasoning output."""
    effort: Omit[str | None] = None
    """Controls the level of reasoning effort: none, minimal, low, medium, high, xhigh."""


class ChatModelOpenRouterProvider(CoderModel):
    """Where OpenRouter may send a request. Go: `codersdk.ChatModelOpenRouterProvider`."""

    order: Omit[list[str]] = Field(default_factory=list)
    """Ordered list of preferred provider names."""
    allow_fallbacks: Omit[bool | None] = None
    """Whether to allow fallback to other providers."""
    require_parameters: Omit[bool | None] = None
    """Whether to require all parameters to be supported by the provider."""
    data_collection: Omit[str | None] = None
    """Data collection policy preference."""
    only: Omit[list[str]] = Field(default_factory=list)
    """Restrict to only these provider names."""
    ignore: Omit[list[str]] = Field(default_factory=list)
    """Provider names to exclude from routing."""
    quantizations: Omit[list[str]] = Field(default_factory=list)
    """Allowed model quantization levels."""
    sort: Omit[str | None] = None
    """Sort order for provider selection."""


class ChatModelOpenRouterProviderOptions(CoderModel):
    """Options of OpenRouter. Go: `codersdk.ChatModelOpenRouterProviderOptions`."""

    reasoning: Omit[ChatModelReasoningOptions | None] = None
    """Configuration for reasoning behavior."""
    extra_body: Omit[dict[str, JsonValue]] = Field(default_factory=dict)
    """Additional fields to include in the request body."""
    include_usage: Omit[bool | None] = None
    """Whether to include token usage information in the response."""
    logit_bias: Omit[dict[str, Int64]] = Field(default_factory=dict)
    """Token IDs mapped to bias values from -100 to 100."""
    log_probs: Omit[bool | None] = None
    """Whether to return log probabilities of output tokens."""
    parallel_tool_calls: Omit[bool | None] = None
    """Whether the model may make multiple tool calls in parallel."""
    user: Omit[str | None] = None
    """Unique identifier for the end user for abuse monitoring."""
    provider: Omit[ChatModelOpenRouterProvider | None] = None
    """Routing preferences for provider selection."""


class ChatModelVercelGatewayProviderOptions(CoderModel):
    """Where Vercel's gateway may send a request. Go: `codersdk.ChatModelVercelGatewayProviderOptions`."""

    order: Omit[list[str]] = Field(default_factory=list)
    """Ordered list of preferred provider names."""
    models: Omit[list[str]] = Field(default_factory=list)
    """Model identifiers to route across."""


class ChatModelVercelProviderOptions(CoderModel):
    """Options of Vercel. Go: `codersdk.ChatModelVercelProviderOptions`."""

    reasoning: Omit[ChatModelReasoningOptions | None] = None
    """Configuration for reasoning behavior."""
    provider_options: Omit[ChatModelVercelGatewayProviderOptions | None] = Field(
        default=None, validation_alias="providerOptions", serialization_alias="providerOptions"
    )
    """Gateway routing options for provider selection."""
    user: Omit[str | None] = None
    """Unique identifier for the end user for abuse monitoring."""
    logit_bias: Omit[dict[str, Int64]] = Field(default_factory=dict)
    """Token IDs mapped to bias values from -100 to 100."""
    logprobs: Omit[bool | None] = None
    """Whether to return log probabilities of output tokens."""
    top_logprobs: Omit[Int64 | None] = None
    """Number of most likely tokens to return log probabilities for."""
    parallel_tool_calls: Omit[bool | None] = None
    """Whether the model may make multiple tool calls in parallel."""
    extra_body: Omit[dict[str, JsonValue]] = Field(default_factory=dict)
    """Additional fields to include in the request body."""


class ChatModelProviderOptions(CoderModel):
    """The options of whichever provider the model has. Go: `codersdk.ChatModelProviderOptions`."""

    openai: Omit[ChatModelOpenAIProviderOptions | None] = None
    anthropic: Omit[ChatModelAnthropicProviderOptions | None] = None
    google: Omit[ChatModelGoogleProviderOptions | None] = None
    openaicompat: Omit[ChatModelOpenAICompatProviderOptions | None] = None
    openrouter: Omit[ChatModelOpenRouterProviderOptions | None] = None
    vercel: Omit[ChatModelVercelProviderOptions | None] = None
