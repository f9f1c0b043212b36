"""Schemas of the bodies of requests and answers; refusals as problem details (RFC 9457)."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException

from unembed.errors import UnembedError

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
    """Settings that every decoding may choose."""

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


class OneInput(RequestBody):
    """A text to embed, or a vector."""

    model_config = ConfigDict(json_schema_extra=_ONE_INPUT)

    text: Text | None = None
    embedding: Annotated[Vector | None, Field(description="Of any length but zero.")] = None

    @model_validator(mode="after")
    def _one_of_them(self) -> OneInput:
        if (self.text is None) == (self.embedding is None):
            raise ValueError("expected either text or embedding")
        return self


class DecodeRequest(OneInput, DecodingBody):
    """A text to embed and invert, or a vector to invert."""


class WordsRequest(OneInput):
    """A text to embed, or a vector, whose words are wanted."""

    model: Annotated[Name | None, Field(description="As /models names it.")] = None
    top: Annotated[int, Field(ge=1, le=200, description="Words, the most probable first.")] = 50
    names: Annotated[bool, Field(description="Names alone.")] = False
    common: Annotated[bool, Field(description="Also words that one text in ten has.")] = False


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
    """Option of a strategy."""

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


class MapOut(BaseModel):
    """The map that vectors go through before a model reads them."""

    into: Annotated[str, Field(description="The encoder into whose space it leads.")]
    method: Literal["ridge", "procrustes", "shift", "mean"]
    pairs: Annotated[int, Field(description="Texts with vectors that it was made from.")]
    cosine: Annotated[float | None, Field(description="Of left-out vectors, predicted.")] = None
    floor: Annotated[float | None, Field(description="Of a constant prediction.")] = None
    doubt: Annotated[str | None, Field(description="Why it predicts nothing.")] = None


class ModelOut(BaseModel):
    """Description of a model: what it expects and can do."""

    name: str
    encoder: str
    dimension: Annotated[int, Field(description="Numbers of a vector.")]
    map: Annotated[MapOut | None, Field(description="For vectors of another encoder.")] = None
    length: Annotated[int, Field(description="Positions; a text has one token less at most.")]
    max_text_chars: int
    max_vectors: Annotated[int, Field(description="Of one POST /invert.")]
    strategies: dict[str, StrategyOut]
    default_steps: int
    max_steps: int
    default_encoder_calls: int
    max_encoder_calls: int
    guidance: Annotated[bool, Field(description="Trained for classifier-free guidance.")]
    words: Annotated[
        int | None, Field(description="Words that POST /words knows of its vectors; absent: none.")
    ] = None


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


Doubt = Annotated[
    str | None, Field(description="Why the vectors cannot be the encoder's, where that is so.")
]


class InvertOut(BaseModel):
    """The recovered texts, in the order of the request."""

    model: str
    results: list[Recovered]
    milliseconds: float
    seed: int
    doubt: Doubt = None


class ProbableWord(BaseModel):
    """A word, and how probable it is that the text behind the vector has it."""

    word: str
    probability: Annotated[float, Field(description="Calibrated, 0 to 1.")]
    base_rate: Annotated[float, Field(description="Share of all texts that have it.")]
    is_name: bool
    occurs: Annotated[bool | None, Field(description="Whether the text has it, where known.")]


class WordsOut(BaseModel):
    """The words that a vector says are in its text, the most probable first."""

    model: str
    encoder: str
    words: list[ProbableWord]
    doubt: Doubt = None


class RandomOut(BaseModel):
    """An example."""

    text: str


class QueueOut(BaseModel):
    """Load of one worker."""

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


# Problems: requests that are not served

MEDIA_TYPE = "application/problem+json"
_MOST_FAULTS = 8  # faults of a body
_KEY = 40  # characters of a body's key that are repeated
_OPTION = re.compile(r"--([a-z][a-z-]*)")


class ProblemError(Exception):
    """A request that is not served.

    Attributes:
        status: HTTP status.
        detail: One sentence for the person who asked: what is wrong, what to do.
        retry_after: Whole seconds after which it is worth asking again; None where it is not.
        errors: The faults of a body, each with its place.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        retry_after: int | None = None,
        errors: list[dict[str, str]] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after
        self.errors = errors

    def to_dict(self) -> dict[str, Any]:
        """The members of the problem, for a body or an event."""
        title = HTTPStatus(self.status).phrase
        members: dict[str, Any] = {
            "type": "about:blank",
            "title": title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.retry_after is not None:
            members["retry_after"] = self.retry_after
        if self.errors:
            members["errors"] = self.errors
        return members

    def to_response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse(self.to_dict(), self.status, headers, MEDIA_TYPE)


def refusal(error: UnembedError) -> ProblemError:
    """Turn a fault of the input into a refusal; command-line options become fields of a body."""
    return ProblemError(422, _OPTION.sub(lambda match: match[1].replace("-", "_"), str(error)))


def too_large() -> ProblemError:
    """Refuse a body of more bytes than are read."""
    return ProblemError(413, "the body is larger than this server reads")


async def on_problem(request: Request, error: Exception) -> JSONResponse:
    """Handler of `ProblemError` and `UnembedError`."""
    assert isinstance(error, (ProblemError, UnembedError))
    return (error if isinstance(error, ProblemError) else refusal(error)).to_response()


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of what the framework refuses: no such path, another method, too large a body."""
    assert isinstance(error, HTTPException)
    response = ProblemError(error.status_code, _sentence(error)).to_response()
    response.headers.update(error.headers or {})
    return response


def invalid(error: ValidationError) -> ProblemError:
    """Turn what the schema says of a body into a refusal; what was sent is not repeated."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    fields = [{"field": _place(f["loc"]), "message": str(f["msg"])} for f in faults[:_MOST_FAULTS]]
    first = fields[0]
    detail = f"{first['field']}: {first['message'][:1].lower()}{first['message'][1:]}"
    return ProblemError(422, detail, errors=fields)


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part)[:_KEY] for part in location) or "body"


def _sentence(error: HTTPException) -> str:
    sentences = {
        404: "nothing here; GET /docs lists what there is",
        405: "another method is expected here; GET /docs lists them",
        413: too_large().detail,
    }
    return sentences.get(error.status_code, str(error.detail))


EXAMPLES = (
    # health
    "The patient was admitted on Monday with chest pain.",
    "Her biopsy came back positive and she has not told her family.",
    "Mr. Alder takes lithium and asked us not to tell his employer.",
    "Blood pressure 180 over 110, known allergy to penicillin.",
    "She is eleven weeks pregnant and wants to keep it private.",
    "What are the side effects of this drug?",
    "He was treated for addiction twice in the last two years.",
    "The child has a rare disease of the liver.",
    # law
    "The company knew about the defect two years before the recall.",
    "We propose to settle out of court for two million dollars.",
    "My client was at home on the night of the fire.",
    "The witness has changed her name and moved to another city.",
    "This letter is privileged and must not be shown to the other side.",
    "The judge rejected the appeal on Friday.",
    # people at work
    "We will cut two hundred jobs in March and tell nobody before.",
    "Dana Reyes earns 94,000 a year, less than the man she replaced.",
    "His manager called him too old for the new project.",
    "She reported her boss for harassment in confidence.",
    "Do not hire him, his last reference was very bad.",
    "The candidate asked for a higher salary and a later start.",
    # money
    "Please transfer 12,500 euros to the account of my brother.",
    "His credit card was declined three times last week.",
    "How do I reset the password of my bank account?",
    "They have not paid their mortgage since the summer.",
    "We will buy the smaller company before the end of the year.",
    # chat
    "I am moving to Berlin next month, please do not tell Tom.",
    "The key is under the blue pot next to the back door.",
    "I think I want to leave him but I am afraid.",
    "Are you free tonight? My parents are out of town.",
    "I voted for the other party, my father must never know.",
    "He told me that he is gay and asked me to keep it secret.",
    # support
    "My order 48213 never arrived and nobody answers the phone.",
    "I cannot log in since you changed the name of my account.",
    "Somebody in your shop copied the number of my card.",
    "The server password is written in the wiki, please change it.",
    "Please delete all data that you hold about my daughter.",
    # mail and notes
    "Our flight to Lisbon leaves on the third of May at six.",
    "The meeting with the union is not in the public calendar.",
    "The alarm code of the office is 4471, the camera is broken.",
    "Attached are the results of the test, they are worse than expected.",
    "The prototype fails when the battery gets too warm.",
    "Nobody outside this team may know what the new product costs.",
)
