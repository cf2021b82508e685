"""The keys of the section `clio`; those of one step alone stand in a section of their own, beside the step."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.config import ConfigError, Section, settings_from_values
from llm_parts.clio.vector_settings import VectorSettings
from llm_parts.settings import LlmSettings, Price

FacetType = Literal["text", "number", "choice"]
PromptVariant = Literal["plain", "detailed", "examples"]
Naming = Literal["summarize", "contrastive", "centroid"]


class Facet(Section):
    """One question put to every dialogue. The first facet of the list is the one that is clustered."""

    name: str = Field(min_length=1, max_length=60, pattern=r"^\w+$", description="column of the answers")
    question: str = Field(min_length=1, description="what is asked")
    type: FacetType = Field("text", description="text, number (between minimum and maximum) or choice (of choices)")
    choices: tuple[str, ...] = Field((), description="type choice: the only answers")
    minimum: float = Field(1, description="type number: least answer")
    maximum: float = Field(5, description="type number: greatest answer")
    max_chars: int = Field(300, ge=10, le=2000, description="longest answer; a longer one is cut at a word's end")
    prefix: str = Field("", description="how an answer begins, such as: The user asked to")
    weight: float = Field(0.0, ge=0, description="weight in the vectors beside the first facet's 1; 0: a column only")

    @model_validator(mode="after")
    def _fits_its_type(self) -> Facet:
        if self.type == "choice" and len(set(self.choices)) < 2:
            raise ValueError("a facet of type choice needs two different choices or more")
        if self.type != "choice" and self.choices:
            raise ValueError(f"choices are for type choice, not {self.type}")
        if self.minimum >= self.maximum:
            raise ValueError("minimum should be below maximum")
        return self


DEFAULT_FACETS = (
    Facet(
        name="request",
        question="What does the user want overall? Say what they ask for and why, in one or two sentences.",
    ),
    Facet(name="task", question="What is the assistant asked to do? One sentence that begins with a verb."),
    Facet(name="language", question="Which language does the user mainly write in? Its English name.", max_chars=40),
    Facet(
        name="concern",
        question="How much should an operator worry about this dialogue? 1: not at all, 5: very much.",
        type="number",
    ),
)


class ModelChoice(Section):
    """A model beside the one of section `llm`; keys that are left out are those of `llm`."""

    provider: str | None = Field(None, min_length=1, description="provider; null: that of llm")
    model: str | None = Field(None, min_length=1, description="model; null: the provider's default")
    url: str | None = Field(None, min_length=1, description="address; null: the provider's own")
    temperature: float | None = Field(None, ge=0, le=2, description="null: that of llm")
    prices: dict[str, Price] | None = Field(None, description="prices by model; null: those of llm")

    def llm_settings(self, llm: LlmSettings) -> LlmSettings:
        """The section `llm` with this model in it; raises ConfigError where the two do not fit, as a limit of cost
        without a price."""
        named = self.model_dump(include=set(ModelChoice.model_fields))
        given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        if self.provider not in (None, llm.provider):  # model and address of another provider are not this one's
            given = {"model": None, "url": None, **given}
        elif self.model is None:
            given.pop("model", None)
        source = f"of clio, for the further model {named['model'] or named['provider']}"
        return settings_from_values(LlmSettings, {**llm.model_dump(), **given}, source=source).with_keys(llm._keys)

    def label(self, llm: LlmSettings) -> str:
        """The name of this model in reports."""
        chosen = self.llm_settings(llm)
        where = [] if self.url is None else [f"({self.url})"]
        temperature = [] if self.temperature is None else [f"at {self.temperature:g}"]
        return " ".join(dict.fromkeys([chosen.provider, chosen.model_name, *where, *temperature]))


class Extractor(ModelChoice):
    """A model, a prompt or both that extract the facets of a sample, to be compared with the run's own."""

    facet_prompt: PromptVariant | None = Field(None, description="null: that of the run")


class SamplingSweep(Section):
    """Temperatures and values of top_p by which the taxonomy is made anew, to see what they change; empty for none."""

    temperatures: tuple[Annotated[float, Field(ge=0, le=2)], ...] = Field((), description="each with the run's top_p")
    top_ps: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((), description="each with the run's temperature")

    def variants(self) -> list[dict[str, float]]:
        """The keys of `clio` that each further taxonomy changes."""
        return [
            *({"temperature": value} for value in self.temperatures),
            *({"top_p": value} for value in self.top_ps),
        ]


class ClioSettings(VectorSettings):
    """Section `clio`; the model that is asked is that of section `llm`.

    The keys from facets to base clusters (embedder, algorithm, n_clusters, sweep …) are those of VectorSettings.
    """

    input: str | None = Field(None, min_length=1, description="file, folder or glob: JSON lines, parquet or CSV")
    output_dir: str = Field("runs/clio", min_length=1, description="folder that everything is written to")
    messages_column: str = Field("messages", min_length=1, description="column of [{role, content}], if there is one")
    text_column: str = Field("text", min_length=1, description="else: column of a dialogue's text")
    label_column: str | None = Field(None, description="column of true labels, for reports only; null: none")
    limit: int | None = Field(None, ge=1, description="only the first so many rows; null: all")
    max_chars: int = Field(8000, ge=200, description="longer dialogues are cut from the middle, and counted")

    facets: tuple[Facet, ...] = Field(DEFAULT_FACETS, min_length=1, description="the first is clustered")
    facet_prompt: PromptVariant = Field("plain", description="plain, detailed (with rules) or examples (with samples)")
    output_language: str = Field("English", min_length=1, description="of facets, names, summaries; auto: of the input")
    temperature: float | None = Field(None, ge=0, le=2, description="of all steps but judges; null: llm.temperature")
    top_p: float | None = Field(None, gt=0, le=1, description="of all steps but judges; null: llm.top_p")

    naming: Naming = Field("contrastive", description="summarize, contrastive (with outsiders), centroid")
    compare_naming: tuple[Naming, ...] = Field((), description="further ways of naming to compare in the report")
    n_members: int = Field(50, ge=1, le=500, description="members in a naming prompt")
    n_outsiders: int = Field(50, ge=0, le=500, description="nearest outsiders in a naming prompt")
    n_truth_checks: int = Field(2, ge=0, description="members per name that must choose it among siblings; 0: none")

    levels: int = Field(2, ge=1, le=10, description="levels above the base clusters")
    n_top: int = Field(10, ge=1, description="clusters of the top level")

    mask: bool = Field(True, description="mask mail, phone, card, IBAN and mask_names before any prompt")
    mask_names: tuple[str, ...] = Field((), description="names of people that are masked, in any case of letters")
    min_cluster_size: int = Field(5, ge=1, description="privacy: smaller base clusters are shown nowhere")
    min_unique_users: int = Field(3, ge=1, description="privacy: the same, by users; needs a column user_id")
    audit_threshold: int = Field(3, ge=1, le=5, description="privacy: summaries scored lower are dropped; 1: no audit")
    show_conversations: bool = Field(False, description="show dialogues, masked, in the report; else facets alone")

    judges: tuple[ModelChoice, ...] = Field((ModelChoice(),), description="models that judge; {} is the one of llm")
    judge_sample: int = Field(20, ge=0, description="facets, names and placements that each judge sees; 0: none")
    extractors: tuple[Extractor, ...] = Field((), description="others whose facets are compared on judge_sample rows")
    sampling_sweep: SamplingSweep = SamplingSweep()
    max_failure_rate: float = Field(
        0.05, ge=0, le=1, description="share of dialogues without facets above which exit is 1"
    )
    log_prompts: bool = Field(True, description="write every prompt and answer to prompts.jsonl")
    random_state: int = Field(7, ge=0, description="seed of all that is drawn")

    @model_validator(mode="after")
    def _nothing_stands_twice(self) -> ClioSettings:
        names = [facet.name for facet in self.facets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"facets: the name {twice[0]!r} stands twice")
        judges = [judge.model_dump_json() for judge in self.judges]
        if len(set(judges)) < len(judges):
            raise ValueError("judges: the same judge stands twice; its two votes would be one")
        if self.facets[0].type != "text":
            raise ValueError(f"facets: the first is clustered and must be of type text, not {self.facets[0].type}")
        return self

    @property
    def input_path(self) -> str:
        """The input, which only mode `clio` demands; raises ConfigError where it is not set."""
        if self.input is None:
            raise ConfigError("clio.input: required, but missing; give clio.input=FILE")
        return self.input
