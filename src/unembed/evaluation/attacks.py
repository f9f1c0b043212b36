"""What is compared: a decoding strategy with its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from unembed.errors import ConfigError

_FORM = (
    "NAME[:steps=N][:encoder_calls=N][:limit=N][:guidance=FIRST/LAST][:repetition=X]"
    "[:option=value]…"
)
# ``all``: every strategy; those that call the encoder are tried on fewer texts, all on the same
ALL = (
    "greedy",
    "greedy:steps=32",
    "greedy:repetition=0",
    "greedy:order=margin",
    "greedy:order=left-to-right",
    "greedy:lengths=3",
    "greedy:guidance=0.5/0.5",
    "entropy-bounded",
    "euler:temperature=0.5",
    "euler:repetition=0",
    "euler-remask:temperature=0.5",
    "euler-remask:temperature=0.5:threshold=0.3:probability=1",
    "two-stage:temperature=0.5",
    "best-of:samples=1:encoder_calls=1:limit=32",
    "best-of:encoder_calls=16:limit=32",
    "guided-search:encoder_calls=300:limit=32",
)


@dataclass(frozen=True)
class Attack:
    """A decoding strategy with its settings.

    Attributes:
        strategy: A name of `unembed.decoding.STRATEGIES`.
        steps: Denoiser passes per text; one per position when None.
        encoder_calls: Texts it may embed per vector; 0 is the threat model *vector only*.
        options: The strategy's own.
        guidance: Strength of classifier-free guidance at the first and at the last pass.
        repetition: What repeated tokens cost; the default of `Inverter.invert` when None.
        limit: Texts it is tried on, drawn from those of the evaluation; all when None.
    """

    strategy: str
    steps: int | None = None
    encoder_calls: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    guidance: tuple[float, float] | None = None
    repetition: float | None = None
    limit: int | None = None

    @property
    def threat_model(self) -> str:
        """Whether the attacker has only the vector or may call the encoder too."""
        return "vector + encoder" if self.encoder_calls else "vector only"

    def arguments(self, encoder: Any) -> dict[str, Any]:
        """The keywords for `Inverter.invert`; the encoder is only handed to who may call it."""
        found: dict[str, Any] = {"strategy": self.strategy, "steps": self.steps}
        if self.options:
            found["options"] = self.options
        if self.guidance is not None:
            found["guidance"] = self.guidance
        if self.repetition is not None:
            found["repetition"] = self.repetition
        if self.encoder_calls:
            found |= {"encoder": encoder, "encoder_calls": self.encoder_calls}
        return found


def parse_attack(text: str, steps: int | None = None) -> Attack:
    """The attack that ``greedy:steps=8`` or ``euler:temperature=0.5`` names.

    Args:
        text: ``NAME[:steps=N][:encoder_calls=N][:limit=N][:guidance=FIRST/LAST][:repetition=X]``
            and ``[:option=value]…``.
        steps: For one that does not say.

    Raises:
        ConfigError: Not of that form, or a number that is none.
    """
    name, *settings = text.strip().split(":")
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise ConfigError(f"a strategy as {_FORM}", repr(text), "Correct --strategies")
        options[key] = value
    numbers: dict[str, Any] = {"steps": steps, "encoder_calls": 0, "limit": None}
    for key in numbers.keys() & options.keys():
        value = options.pop(key)
        if not value.isdecimal() or (key == "limit" and int(value) < 1):
            raise ConfigError(f"a number of {key} in {text!r}", value, "Correct --strategies")
        numbers[key] = int(value)
    guidance = _strengths(text, options.pop("guidance", None))
    penalty = _penalty(text, options.pop("repetition", None))
    return Attack(name, options=options, guidance=guidance, repetition=penalty, **numbers)


def _penalty(text: str, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(
            f"a number of repetition in {text!r}", value, "Correct --strategies"
        ) from error


def _strengths(text: str, value: str | None) -> tuple[float, float] | None:
    if value is None:
        return None
    first, _, last = value.partition("/")
    try:
        return float(first), float(last)
    except ValueError as error:
        raise ConfigError(
            f"guidance=FIRST/LAST in {text!r}", value, "Say for example guidance=0/1"
        ) from error


def name_attacks(
    strategy: str | Sequence[str | Attack] | Attack, steps: int | None
) -> dict[str, Attack]:
    """The rows of a table: ``inverter`` for one attack, each as it was spelled for several.

    ``all`` stands for `ALL`.

    Raises:
        ConfigError: None, one twice, or not of the right form.
    """
    named = [strategy] if isinstance(strategy, (str, Attack)) else list(strategy)
    given = [one for item in named for one in (ALL if item == "all" else (item,))]
    found: dict[str, Attack] = {}
    for item in given:
        attack = item if isinstance(item, Attack) else parse_attack(item, steps)
        found[item.strip() if isinstance(item, str) else _spell(item)] = attack
    if not given or len(found) < len(given):
        raise ConfigError("different strategies", repr(given), "Correct --strategies")
    return {"inverter": next(iter(found.values()))} if len(found) == 1 else found


def _spell(attack: Attack) -> str:
    settings: dict[str, Any] = {"steps": attack.steps}
    settings["encoder_calls"] = attack.encoder_calls or None
    settings["limit"] = attack.limit
    settings["guidance"] = attack.guidance and "{:g}/{:g}".format(*attack.guidance)
    settings["repetition"] = attack.repetition
    settings |= attack.options
    given = [f"{key}={value}" for key, value in settings.items() if value is not None]
    return ":".join([attack.strategy, *given])
