"""Schemas of the bodies of requests and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_LARGEST_SEED = 2**53 - 1  # that JavaScript can write

Name = Annotated[str, Field(min_length=1, max_length=200)]
Text = Annotated[str, Field(min_length=1, max_length=100_000, examples=["I lost my keys."])]
Vector = Annotated[list[float], Field(fail_fast=True, min_length=1, max_length=8192)]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=1024)]
Vectors = Annotated[list[Vector], Field(fail_fast=True, min_length=1, max_length=1024)]
Strength = Annotated[float, Field(ge=0.0, le=20.0)]
OptionValue = bool | int | float | Annotated[str, Field(max_length=100)]
_ONE_INPUT: dict[str, Any] = {"oneOf": [{"required": ["text"]}, {"required": ["embedding"]}]}
_INPUTS: dict[str, Any] = {"oneOf": [{"required": ["texts"]}, {"required": ["embeddings"]}]}


class RequestBody(BaseModel):
    """No unknown keys, no guessed types, no NaN; a list ends at its first fault."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class DecodingBody(RequestBody):
    """What every decoding may choose."""

    model: Annotated[Name | None, Field(description="As /models names it.")] = None
    strategy: Annotated[Name, Field(description="As /models names it.")] = "greedy"
    options: Annotated[
        dict[Name, OptionValue], Field(max_length=32, description="Of the strategy.")
    ] = {}
    steps: Annotated[int | None, Field(ge=1, description="Denoiser passes; 8 if not given.")] = None
    guidance: Annotated[
        Annotated[list[Strength], Field(fail_fast=True, min_length=2, max_length=2)] | None,
        Field(description="Strength at the first and the last pass."),
    ] = None
    encoder_calls: Annotated[
        int | None,
        Field(
            ge=0,
            description="Texts that may be embedded for each vector, where the strategy "
            "asks the encoder; the default of /models if not given.",
        ),
    ] = None
    seed: Annotated[int, Field(ge=0, le=_LARGEST_SEED)] = 0


class EncodeRequest(RequestBody):
    """A text to embed."""

    text: Text
    model: Name | None = None


class DecodeRequest(DecodingBody):
    """A text to embed and invert, or a vector to invert."""

    model_config = ConfigDict(json_schema_extra=_ONE_INPUT)

    text: Text | None = None
    embedding: Annotated[Vector | None, Field(description="Of any length but zero.")] = None

    @model_validator(mode="after")
    def _one_of_them(self) -> DecodeRequest:
        if (self.text is None) == (self.embedding is None):
            raise ValueError("expected either text or embedding")
        return self


class InvertRequest(DecodingBody):
    """Texts to embed and invert, or vectors to invert."""

    model_config = ConfigDict(json_schema_extra=_INPUTS)

    texts: Texts | None = None
    embeddings: Vectors | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> InvertRequest:
        if (self.texts is None) == (self.embeddings is None):
            raise ValueError("expected either texts or embeddings")
        return self


class Option(BaseModel):
    """One option of a strategy."""

    default: bool | int | float | str
    type: Literal["bool", "int", "float", "str"]
    description: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: list[str] | None = None


class StrategyOut(BaseModel):
    """A strategy of decoding."""

    options: dict[str, Option]
    needs_encoder: bool


class ModelOut(BaseModel):
    """What a model expects and can do."""

    name: str
    encoder: str
    dimension: Annotated[int, Field(description="Numbers of a vector.")]
    length: Annotated[int, Field(description="Positions; a text has one token less at most.")]
    max_text_chars: int
    max_vectors: Annotated[int, Field(description="Of one POST /invert.")]
    strategies: dict[str, StrategyOut]
    default_steps: int
    max_steps: int
    default_encoder_calls: int
    max_encoder_calls: int
    guidance: Annotated[bool, Field(description="Trained for classifier-free guidance.")]


class ModelsOut(BaseModel):
    """The models served."""

    models: list[ModelOut]
    default: str


class EncodeOut(BaseModel):
    """An embedding."""

    model: str
    encoder: str
    dimension: int
    length: int
    embedding: list[float]
    tokens: Annotated[list[str], Field(description="Of the text, as the model spells them.")]
    truncated: Annotated[
        bool, Field(description="The text has more tokens than the model can write.")
    ]


class Token(BaseModel):
    """A recovered token and the probability it was given when it was unmasked."""

    text: str
    confidence: float


class Word(BaseModel):
    """A word of the original beside what came back in its place."""

    kind: Literal["right", "wrong", "missing", "extra"]
    original: str | None
    recovered: str | None


class Recovered(BaseModel):
    """A recovered text; what needs an original is null where there is none."""

    text: str
    tokens: list[Token]
    alignment: list[Word] | None
    token_accuracy: float | None
    exact_match: bool | None
    token_f1: float | None
    cosine: float | None
    passes: int
    encoder_calls: int


class InvertOut(BaseModel):
    """The recovered texts, in the order of the request."""

    model: str
    results: list[Recovered]
    milliseconds: float
    seed: int


class RandomOut(BaseModel):
    """An example."""

    text: str


class QueueOut(BaseModel):
    """How busy one worker is."""

    model: str
    serves: Annotated[
        Literal["quick", "bulk", "search"],
        Field(description="Few denoiser passes, many, or strategies that ask the encoder."),
    ]
    asks_encoder: Annotated[bool, Field(description="Serves strategies that ask the encoder.")]
    waiting: int
    running: Annotated[int, Field(description="Worked on, those whose client has left among them.")]
    limit: Annotated[int, Field(description="Requests that may wait.")]


class HealthOut(BaseModel):
    """The server answers."""

    status: Literal["ok"]
    models: list[str]


class ProblemOut(BaseModel):
    """Problem details (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    retry_after: Annotated[int | None, Field(description="Seconds.")] = None
    errors: list[dict[str, str]] | None = None
