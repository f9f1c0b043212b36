import pytest

from unembed.decoding import STRATEGIES, Decoding
from unembed.errors import ConfigError
from unembed.evaluation.rows import ALL, Attack, name_attacks


def test_attack_parse_reads_a_decoding_and_a_limit():
    assert Attack.parse("greedy") == Attack(Decoding())
    attack = Attack.parse(" euler:steps=8:limit=20:temperature=0.5", 3)
    assert attack == Attack(Decoding.of("euler", steps=8, temperature=0.5), 20)
    assert Attack.parse("greedy", 3).decoding.steps == 3
    assert Attack.parse(str(attack)) == attack


@pytest.mark.parametrize(
    "text", ["greedy:limit=0", "greedy:limit=-3", "greedy:limit=few", "greedy:limit=1:limit=2"]
)
def test_attack_parse_refuses_a_limit_that_is_no_number_from_one(text):
    with pytest.raises(ConfigError, match="one limit of at least 1"):
        Attack.parse(text)


def test_name_attacks_names_one_inverter_and_several_as_spelled():
    assert name_attacks("greedy", 4) == {"inverter": Attack(Decoding(steps=4))}
    assert name_attacks(["greedy"], None) == {"inverter": Attack(Decoding())}
    guided = Decoding.of("guided-search", encoder_calls=50, beam=3)
    attacks = name_attacks(["greedy", guided, Attack(Decoding(), 5)], 4)
    assert list(attacks) == [
        "greedy",
        "guided-search:steps=8:encoder_calls=50:beam=3",
        "greedy:steps=8:limit=5",
    ]
    assert attacks["greedy"].decoding.steps == 4


@pytest.mark.parametrize("specs", [[], ["greedy", "greedy"], ["greedy", " greedy "]])
def test_name_attacks_refuses_none_or_one_twice(specs):
    with pytest.raises(ConfigError, match="different strategies"):
        name_attacks(specs, None)


def test_name_attacks_takes_all_for_every_registered_strategy():
    attacks = name_attacks("all", 8)
    assert list(attacks) == list(ALL)
    assert {attack.decoding.name for attack in attacks.values()} == set(STRATEGIES)
    for attack in attacks.values():
        attack.decoding.check(has_encoder=True)
        assert not attack.decoding.strategy.needs_encoder or attack.limit, "calls are dear"
    assert attacks["greedy:steps=32"].decoding.steps == 32
