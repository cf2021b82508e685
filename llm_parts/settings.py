"""Which model is asked, where it is, how hard and at what price: the section `llm`, and `Settings` for library use.

Keys are no part of a config file. They come from the environment or from a file `.env` beside the run, or from code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from common.config import ConfigError, Section

DOTENV_PATH = Path(".env")

KEY_NAMES = {
    "openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
    "ollama": "OLLAMA_API_KEY",
    "triton": "TRITON_API_KEY",
}
PROVIDERS_THAT_NEED_A_KEY = frozenset(("openai", "anthropic", "openrouter"))
PROVIDERS_WITHOUT_A_BILL = frozenset(("ollama", "triton", "transformers", "extractive"))

DEFAULT_MODELS = {
    "ollama": "qwen3:30b",
    "openai": "gpt-5-mini",
    "anthropic": "claude-haiku-4-5",
    "openrouter": "qwen/qwen3-30b-a3b",
    "triton": "ensemble",
    "transformers": "Qwen/Qwen3-4B",
}
DEFAULT_URLS = {
    "ollama": "http://localhost:11434",
    "openai": "https://api.openai.com/v1",
    "anthropic": "https://api.anthropic.com",
    "openrouter": "https://openrouter.ai/api/v1",
    "triton": "http://localhost:8000",
}
# Names by which the official clients take another address; ours take them too where `llm.url` says nothing.
URL_NAMES = {
    "openai": "OPENAI_BASE_URL",
    "anthropic": "ANTHROPIC_BASE_URL",
    "openrouter": "OPENROUTER_BASE_URL",
}
TRITON_OPENAI_URL = "http://localhost:9000/v1"  # the OpenAI frontend listens on a port of its own

TritonApi = Literal["generate", "openai", "infer"]


class Price(Section):
    """What a million tokens cost, in the currency of the bill."""

    input: float = Field(ge=0, description="price of a million prompt tokens")
    output: float = Field(ge=0, description="price of a million answer tokens")


class TritonTensors(Section):
    """Tensor names of a model behind Triton's KServe endpoint; null leaves an input out."""

    text: str = Field("text", description="input that takes the prompt (BYTES)")
    max_tokens: str | None = Field("max_tokens", description="input that takes the length limit (INT32)")
    temperature: str | None = Field("temperature", description="input that takes the temperature (FP32)")
    response: str = Field("response", description="output that holds the answer (BYTES)")
    shape: tuple[int, ...] = Field((1,), min_length=1, description="shape of each input; [1, 1] where batches are on")


class LlmSettings(Section):
    """Keys of the section `llm`."""

    provider: str = Field("ollama", min_length=1, description="ollama, openrouter, openai, anthropic, triton, …")
    model: str | None = Field(None, min_length=1, description="name of the model; null: the provider's default here")
    url: str | None = Field(None, min_length=1, description="address of the server; null: the provider's own")
    temperature: float | None = Field(0.0, ge=0, le=2, description="sent as it stands, 0.0 too; null: not sent")
    top_p: float | None = Field(None, gt=0, le=1, description="nucleus sampling; null: not sent")
    seed: int | None = Field(1, description="sent to ollama, and seeds local models; null: none")
    max_answer_tokens: int = Field(4096, ge=16, description="longest answer; doubled once where one was cut off")
    max_answer_chars: int = Field(1_000_000, ge=1000, description="a longer answer is refused as too_long")

    concurrency: int = Field(8, ge=1, le=1000, description="calls in flight at the same time, never more")
    requests_per_minute: float | None = Field(None, gt=0, description="calls sent a minute; null: no limit")
    timeout_s: float = Field(300.0, gt=0, description="longest silence of a server; a cold local model needs minutes")
    max_attempts: int = Field(6, ge=1, le=20, description="tries of one call against 408, 409, 429, 5xx and drops")
    retry_wait_s: float = Field(0.5, ge=0, description="first wait before a retry; doubles each time, with jitter")
    max_retry_wait_s: float = Field(300.0, ge=0, description="a server that asks for a longer wait ends the run")

    max_calls: int | None = Field(None, ge=0, description="calls that one run may send; null: no limit")
    max_cost: float | None = Field(None, ge=0, description="money that one run may spend by `prices`; null: no limit")
    max_tokens: int | None = Field(None, ge=0, description="tokens, in and out, that one run may use; null: no limit")
    prices: dict[str, Price] = Field(
        default_factory=dict, description="model -> {input, output} a million tokens; `default` for all others"
    )

    cache_path: str | None = Field(None, description="SQLite file of answers; null: beside the results of the run")
    retry_quarantined: bool = Field(False, description="ask again where the cache holds only answers not usable")

    num_ctx: int = Field(16384, ge=512, description="ollama: context length; doubled where a prompt needs more")
    think: bool | Literal["low", "medium", "high"] = Field(False, description="ollama: let the model think first")
    keep_alive: str = Field("10m", description="ollama: how long the model stays loaded after a call")
    triton_api: TritonApi = Field("generate", description="triton: generate, openai (its frontend) or infer (KServe)")
    triton_tensors: TritonTensors = TritonTensors()
    chat_template: Literal["plain", "chatml"] = Field(
        "plain", description="triton generate and infer: how messages become one text"
    )
    load_in_4bit: bool = Field(True, description="transformers: 4-bit weights by bitsandbytes where a GPU is")

    _keys: dict[str, SecretStr] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _price_for_a_limit(self) -> LlmSettings:
        if self.max_cost is not None and self.price is None:
            raise ValueError(
                f"max_cost is set, but the price of {self.model_name!r} is not known; add it to prices: "
                f"{{{self.model_name}: {{input: …, output: …}}}} (a million tokens)"
            )
        return self

    @property
    def model_name(self) -> str:
        """The model that is asked: the one given, or the provider's default."""
        return self.model or DEFAULT_MODELS.get(self.provider, self.provider)

    @property
    def base_url(self) -> str | None:
        """The address that is asked: as given, else from the environment, else the provider's own; None: no server."""
        given = self.url or _from_environment(URL_NAMES.get(self.provider))
        if given:
            return given
        if self.provider == "triton" and self.triton_api == "openai":
            return TRITON_OPENAI_URL
        return DEFAULT_URLS.get(self.provider)

    @property
    def price(self) -> Price | None:
        """The price of the model; None where it is not known. Providers without a bill cost nothing by default."""
        found = self.prices.get(self.model_name) or self.prices.get("default")
        if found is None and self.provider in PROVIDERS_WITHOUT_A_BILL:
            return Price(input=0.0, output=0.0)
        return found

    def with_keys(self, keys: Mapping[str, SecretStr]) -> LlmSettings:
        """A copy that holds keys by provider name; they win over the environment and are in no dump of the settings."""
        copy = self.model_copy()
        copy._keys = {**self._keys, **keys}
        return copy

    def api_key(self) -> SecretStr | None:
        """The key of the provider: given by code, else from the environment, else from `.env`; None where none is."""
        if self.provider in self._keys:
            return self._keys[self.provider]
        value = _from_environment(KEY_NAMES.get(self.provider))
        return SecretStr(value) if value else None


class Settings(BaseModel):
    """Settings of the library: keyword arguments, else the environment (names in capitals), else `.env`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    default_llm_provider: str = "ollama"
    ollama_model: str = DEFAULT_MODELS["ollama"]
    ollama_api_url: str = "http://localhost:11434/api"
    ollama_api_key: SecretStr | None = None
    openai_model: str = DEFAULT_MODELS["openai"]
    openai_api_url: str | None = None
    openai_api_key: SecretStr | None = None
    anthropic_model: str = DEFAULT_MODELS["anthropic"]
    anthropic_api_url: str | None = None
    anthropic_api_key: SecretStr | None = None
    openrouter_model: str = DEFAULT_MODELS["openrouter"]
    openrouter_api_url: str | None = None
    openrouter_api_key: SecretStr | None = None
    triton_model: str = DEFAULT_MODELS["triton"]
    triton_api_url: str | None = None
    triton_api_key: SecretStr | None = None
    triton_api: TritonApi = "generate"
    transformers_model: str = DEFAULT_MODELS["transformers"]

    default_temperature: float | None = Field(0.0, ge=0, le=2)
    default_max_tokens: int = Field(4096, ge=16)
    parallel_inference_batch_size: int = Field(8, ge=1)
    llm_timeout_s: float = Field(300.0, gt=0)
    llm_max_calls: int | None = Field(None, ge=0)
    llm_max_cost: float | None = Field(None, ge=0)
    llm_max_tokens: int | None = Field(None, ge=0)
    llm_cache_path: str | None = None

    clustering_batch_size: int = Field(50, ge=1)
    max_clusters_per_batch: int = Field(20, ge=1)
    judge_batch_size: int = Field(1, ge=1)
    judge_shortlist: int | Literal["all"] = 12
    max_failure_rate: float = Field(0.05, ge=0, le=1)
    business_context: str = ""
    output_language: str = ""
    registry_path: str | None = None

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as invalid:
            lines = [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in invalid.errors()]
            raise ConfigError("\n  ".join(["settings of llm_cluster:", *lines])) from None

    @model_validator(mode="before")
    @classmethod
    def _fill_from_the_environment(cls, values: dict[str, Any]) -> dict[str, Any]:
        dotenv = read_dotenv(DOTENV_PATH)
        found = {name: os.environ.get(name.upper()) or dotenv.get(name.upper()) for name in cls.model_fields}
        return {**{name: value for name, value in found.items() if value}, **values}

    @field_validator("judge_shortlist", mode="before")
    @classmethod
    def _number_from_text(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdigit() else value

    def llm_settings(self, provider: str | None = None) -> LlmSettings:
        """The section `llm` that these settings amount to, for `provider` or the default one, with its keys."""
        name = provider or self.default_llm_provider
        values = {
            "provider": name,
            "model": getattr(self, f"{name}_model", None),
            "url": getattr(self, f"{name}_api_url", None),
            "temperature": self.default_temperature,
            "max_answer_tokens": self.default_max_tokens,
            "concurrency": self.parallel_inference_batch_size,
            "timeout_s": self.llm_timeout_s,
            "max_calls": self.llm_max_calls,
            "max_cost": self.llm_max_cost,
            "max_tokens": self.llm_max_tokens,
            "cache_path": self.llm_cache_path,
            "triton_api": self.triton_api,
        }
        keys = {name: getattr(self, f"{name}_api_key") for name in KEY_NAMES}
        return LlmSettings(**values).with_keys({name: key for name, key in keys.items() if key})


def _from_environment(name: str | None) -> str | None:
    return (os.environ.get(name) or read_dotenv(DOTENV_PATH).get(name)) if name else None


_DOTENV_LINE = re.compile(r"""^\s*(?:export\s+)?(?P<name>[A-Za-z_]\w*)\s*=\s*(?P<value>.*?)\s*$""")


def read_dotenv(path: Path) -> dict[str, str]:
    """NAME=value lines of a `.env` file; comments, `export` and quotes are understood, and no file gives no values."""
    if not path.is_file():
        return {}
    values = {}
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        match = _DOTENV_LINE.match(line)
        if match:
            values[match["name"]] = _unquote(match["value"])
    return values


def _unquote(value: str) -> str:
    quoted = re.match(r"""^(['"])(.*?)\1(\s+#.*)?$""", value)
    return quoted[2] if quoted else re.sub(r"(^|\s+)#.*$", "", value)
